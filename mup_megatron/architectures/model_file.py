"""Model files: the shape of a model in Megatron-LM's own argument names, with Megatron's own defaults.

Not what its parameters are called: that is `families/`. Files are read by `registry.py`, which knows of what
architecture one is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mup_megatron.architectures.keys import UNREAD
from mup_megatron.architectures.keys.custom import CustomKeys
from mup_megatron.architectures.keys.experts import ExpertKeys
from mup_megatron.architectures.keys.latent import LatentKeys
from mup_megatron.architectures.keys.mtp import MtpKeys
from mup_megatron.architectures.keys.unread import Unread, unread
from mup_megatron.errors import InputError
from mup_megatron.validation import Strict

Count = Annotated[int, Field(gt=0, le=10**9)]
Depth = Annotated[int, Field(gt=0, le=10**4)]
_NOT_SUPPORTED = ("moe_latent_", "moe_use_upcycling", "moe_single_grouped_")
"""How the keys of Megatron's begin that ask for layers which `families/` does not know."""

_MOST_EXPERTS = 10**5
"""Of all layers together: each has rows of its own in a plan."""

Probability = Annotated[float, Field(ge=0, lt=1)]


class _Keys(Strict):
    """The keys of every model."""

    num_layers: Depth
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    """Before padding."""
    seq_length: Count
    ffn_hidden_size: Count | None = None
    """Default: 4·hidden_size, with swiglu ⌊8/3·hidden_size/64⌋·64."""
    kv_channels: Count | None = None
    """The head size. Default: hidden_size / num_attention_heads."""
    group_query_attention: bool = False
    num_query_groups: Count = 1
    """Read only with `group_query_attention`."""
    swiglu: bool = False
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    apply_layernorm_1p: bool = False
    """Norm gains are stored as their distance from 1."""
    qk_layernorm: bool = False
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    rotary_base: Count = 10000
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    make_vocab_size_divisible_by: Count = 128
    max_position_embeddings: Count | None = None
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """What a script passes to Megatron. With a recipe, the recipe's `init_method_std` is what counts."""
    attention_dropout: Probability = 0.0
    hidden_dropout: Probability = 0.0
    transformer_impl: Literal["local", "transformer_engine"] = "transformer_engine"


class ModelFile(CustomKeys, MtpKeys, LatentKeys, ExpertKeys, _Keys):
    """The shape of a language model of one stack.

    Field names, meanings and defaults are Megatron-LM's arguments of the same name.

    Two defaults differ: dropout is 0, and `max_position_embeddings` follows `seq_length`.
    """

    # Of several bases the last one's keys come first, in messages and in files.

    unread: ClassVar[tuple[Unread, ...]] = UNREAD
    """Keys that are read only beside others, and those of layers that no model of this kind has."""

    following: ClassVar[Mapping[str, str]] = {
        "ffn_hidden_size": "ffn_size",
        "kv_channels": "head_size",
        "num_query_groups": "query_groups",
        "moe_ffn_hidden_size": "expert_ffn_size",
    }
    """Keys whose values may follow from others → the property that has them."""

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns the value of each key that a file does not say."""
        return {key: field.default for key, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, content: Any) -> Any:
        for key in content if isinstance(content, Mapping) else ():
            if isinstance(key, str) and key not in cls.model_fields and key.startswith(_NOT_SUPPORTED):
                raise ValueError(f"{key}: models with latent experts are not supported yet. Choose a model without.")
        return content

    @model_validator(mode="after")
    def _possible(self) -> "ModelFile":
        if problem := next(unread(self.unread, dict(self), self.defaults()), None):
            raise ValueError(problem)
        if self.ffn_size == 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is too small for the default ffn_hidden_size of a gated MLP, which is "
                "a multiple of 64. Give ffn_hidden_size."
            )
        latent = self.multi_latent_attention
        if self.kv_channels is None and not latent and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}. "
                "Change one of them, or give kv_channels."
            )
        if self.group_query_attention and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups "
                f"{self.num_query_groups}. Choose a divisor of the number of heads."
            )
        if self.max_position_embeddings is not None and self.max_position_embeddings < self.seq_length:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} is smaller than seq_length {self.seq_length}. "
                "Raise it, or shorten the sequence."
            )
        if self.position_embedding_type == "rope" and not latent and self.head_size % 2:
            raise ValueError(f"kv_channels {self.head_size} is odd, which rotary embeddings cannot use. Make it even.")
        if latent and self.qk_pos_emb_head_dim % 2:
            raise ValueError(
                f"qk_pos_emb_head_dim {self.qk_pos_emb_head_dim} is odd, which rotary embeddings cannot use. Make it "
                "even."
            )
        if not latent and self.rope_type == "yarn":
            raise ValueError(
                "rope_type yarn: only with multi_latent_attention; ordinary attention would need a factor that a model "
                "file does not know. Choose rope."
            )
        if self.mtp_num_layers and self.position_embedding_type == "learned_absolute":
            raise ValueError(
                "mtp_num_layers: Megatron has multi-token prediction with position_embedding_type rope or none alone. "
                "Choose one of them."
            )
        self.require_possible_experts(self.num_layers, biases=self.add_bias_linear)
        if (self.num_experts or 0) * self.expert_layers > _MOST_EXPERTS:
            raise ValueError(
                f"num_experts {self.num_experts} in {self.expert_layers} layers: more than {_MOST_EXPERTS} experts in "
                "all are not supported. Lower it."
            )
        return self

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts; of those of multi-token prediction, all that may have them."""
        return sum(map(self.has_experts, range(self.num_layers))) + (self.mtp_num_layers or 0)

    def value_of(self, key: str) -> Any:
        """Returns what a key says, or where it says nothing what follows from others."""
        return getattr(self, self.following.get(key, key))

    @property
    def ffn_size(self) -> int:
        """Hidden size of the MLP; with swiglu, of each of its two halves."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int((4 * self.hidden_size * 2 / 3) / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def expert_ffn_size(self) -> int:
        """Hidden size of one expert; with swiglu, of each of its two halves."""
        return self.ffn_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size

    @property
    def head_size(self) -> int:
        """Channels of the queries and keys of one attention head."""
        if self.multi_latent_attention:
            return self.latent_head_size
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads

    def heads(self, number: int, *, size: int, groups: int) -> dict[str, int]:
        """Returns the keys of a model of this kind with so many heads of this size, in so many groups if it has any."""
        sizes = self.latent_heads(size) if self.multi_latent_attention else {"kv_channels": size}
        return {
            "num_attention_heads": number,
            **sizes,
            "num_query_groups": groups if self.group_query_attention else 1,
        }

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def positions(self) -> int:
        """Longest sequence for which there are position embeddings."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length

    @property
    def bias_on_qkv(self) -> bool:
        """True where the projection to queries, keys and values has a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def tied(self) -> bool:
        """True where the readout is the token embedding."""
        return not self.untie_embeddings_and_output_weights

    def padded_vocab_size(self, tensor_model_parallel_size: int = 1) -> int:
        """Returns the vocabulary as Megatron pads it at this tensor parallelism."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def require_tensor_parallel(self, size: int) -> None:
        """Raises InputError unless the model can be split over `size` tensor-parallel ranks."""
        for key, value in (
            ("num_attention_heads", self.num_attention_heads),
            ("num_query_groups", self.query_groups),
            ("ffn_hidden_size", self.ffn_size),
        ):
            if value % size:
                raise InputError(
                    f"--tensor-model-parallel-size {size} does not divide {key} {value}. Choose a divisor of it."
                )
