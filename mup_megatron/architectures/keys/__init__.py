"""Keys of a model file that some models alone have, one file for each kind of layer, with the flags that say the same.

A file has a mixin, which `ModelFile` inherits, and FLAGS. Every key was `added`, so that the fingerprint of what has
none of them stays as it was.
"""

from collections.abc import Collection, Mapping

from mup_megatron.architectures.keys.experts import READ_WITH_EXPERTS
from mup_megatron.architectures.keys.latent import READ_WITH_LATENT
from mup_megatron.architectures.keys.mtp import READ_WITH_MTP

READ_WITH: Mapping[str, Collection[str]] = {
    "num_experts": READ_WITH_EXPERTS,
    "multi_latent_attention": READ_WITH_LATENT,
    "mtp_num_layers": READ_WITH_MTP,
}
"""Key that asks for a kind of layer → the keys that Megatron reads with it alone."""
