"""The keys of latent attention (MLA): ranks and head sizes, and the YaRN factor that is a part of its softmax scale."""

import math
from collections.abc import Mapping
from operator import not_
from typing import Annotated, Literal

from pydantic import Field

from mup_megatron.architectures.flag import Flag, number, whole_number
from mup_megatron.architectures.keys.unread import Unread, only_with, without
from mup_megatron.validation import Strict, added

_Count = Annotated[int, Field(gt=0, le=10**9)]
_Factor = Annotated[float, Field(gt=0)]


class LatentKeys(Strict):
    """Queries, keys and values that go through latents of a small rank (DeepSeek-V2, arXiv 2405.04434)."""

    multi_latent_attention: bool = added("0.2", False)
    q_lora_rank: _Count | None = added("0.2", None)
    """The rank of queries; None where they are projected at once."""
    kv_lora_rank: _Count = added("0.2", 32)
    qk_head_dim: _Count = added("0.2", 128)
    """Channels of a head's queries and keys without positions."""
    qk_pos_emb_head_dim: _Count = added("0.2", 64)
    """Further channels, which rotary embeddings turn."""
    v_head_dim: _Count = added("0.2", 128)
    rope_type: Literal["rope", "yarn"] | None = added("0.2", None)
    """None: YaRN with latent attention, else ordinary rotary embeddings."""
    rotary_scaling_factor: _Factor = added("0.2", 1.0)
    mscale: float = added("0.2", 1.0)
    mscale_all_dim: Annotated[float, Field(ge=0, le=1000)] = added("0.2", 0.0)
    """Below 0 the softmax scale could be 0, and logits with it."""

    @property
    def latent_head_size(self) -> int:
        """Channels of the queries and keys of a head of latent attention."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    def latent_heads(self, size: int) -> dict[str, int]:
        """Returns the keys of heads whose queries and keys have so many channels, in about the same parts."""
        part = 2 * round(size * self.qk_pos_emb_head_dim / self.latent_head_size / 2)
        turned = max(2, min(part, 2 * ((size - 1) // 2)))
        values = max(1, round(size * self.v_head_dim / self.latent_head_size))
        return {"qk_head_dim": size - turned, "qk_pos_emb_head_dim": turned, "v_head_dim": values}

    @property
    def stock_softmax_scale(self) -> float | None:
        """Its attention multiplies logits by this if nothing is said; None for 1/√(head size)."""
        if not self.multi_latent_attention or self.rotary_scaling_factor <= 1.0 or not self.mscale_all_dim:
            return None
        # YaRN (arXiv 2309.00071, §3.4); Megatron takes it whatever `rope_type` is. In Megatron's own order of
        # operations, so that an unchanged scale is bitwise unchanged.
        yarn = 0.1 * self.mscale_all_dim * math.log(self.rotary_scaling_factor) + 1.0
        return yarn * yarn / math.sqrt(self.latent_head_size)


FLAGS: Mapping[str, Flag] = {
    "multi_latent_attention": Flag("--multi-latent-attention", "multi_latent_attention", False),
    "q_lora_rank": Flag("--q-lora-rank", "q_lora_rank", None, whole_number),
    "kv_lora_rank": Flag("--kv-lora-rank", "kv_lora_rank", 32, whole_number),
    "qk_head_dim": Flag("--qk-head-dim", "qk_head_dim", 128, whole_number),
    "qk_pos_emb_head_dim": Flag("--qk-pos-emb-head-dim", "qk_pos_emb_head_dim", 64, whole_number),
    "v_head_dim": Flag("--v-head-dim", "v_head_dim", 128, whole_number),
    "rope_type": Flag("--rope-type", "rope_type", None, str),
    "rotary_scaling_factor": Flag("--rotary-scaling-factor", "rotary_scaling_factor", 1.0, number),
    "mscale": Flag("--mscale", "mscale", 1.0, number),
    "mscale_all_dim": Flag("--mscale-all-dim", "mscale_all_dim", 0.0, number),
}
_NO_GROUPS = "latent attention has no groups of queries. Remove the key."
UNREAD = (
    only_with("multi_latent_attention", *(key for key in FLAGS if key not in ("multi_latent_attention", "rope_type"))),
    without("multi_latent_attention", "kv_channels", "num_query_groups"),
    Unread(("group_query_attention",), _NO_GROUPS, "multi_latent_attention", not_, on_lines=False),
)
