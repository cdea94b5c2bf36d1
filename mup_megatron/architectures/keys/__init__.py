"""Keys of a model file that some models alone have, one file for each kind of layer, with the flags that say the same.

A file has a mixin, which `ModelFile` inherits, FLAGS, and UNREAD: which keys are read only beside which. Every key was
`added`, so that the fingerprint of what has none of them stays as it was.
"""

from mup_megatron.architectures.keys import experts, latent, mtp
from mup_megatron.architectures.keys.unread import Unread, absent

UNREAD: tuple[Unread, ...] = (*experts.UNREAD, *latent.UNREAD, *mtp.UNREAD)
"""Of the keys of all of them."""
PLAIN_LAYERS = absent(
    "Megatron's BERT and T5 have no such layers.",
    *("num_experts", "multi_latent_attention", "mtp_num_layers", "qk_layernorm"),
)
