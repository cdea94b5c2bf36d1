"""Qwen3: a Llama with norms of queries and keys, and no biases in its MLP."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.export.architectures import layers
from mup_megatron.export.architectures.llama import LlamaLike
from mup_megatron.export.architectures.target import Piece


class Qwen3(LlamaLike):
    """Qwen3."""

    name: ClassVar[str] = "qwen3"
    model_class: ClassVar[str] = "Qwen3ForCausalLM"
    requires: ClassVar[Mapping[str, Any]] = {**LlamaLike.requires, "qk_layernorm": True, "add_bias_linear": False}

    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns Llama's keys that it has, and that no layer has a window."""
        own = super().config(model)
        del own["mlp_bias"]
        return {**own, "use_sliding_window": False, "sliding_window": None}

    def attention(self, model: ModelFile, name: str, index: int) -> Iterator[Piece]:
        """Yields Llama's, and the two norms."""
        yield from super().attention(model, name, index)
        for kind in ("q", "k"):
            prefix = f"{layers.attention(index)}.{kind}_layernorm."
            yield from layers.norm(model, f"{name}.{kind}_norm", prefix, model.head_size)


QWEN3 = Qwen3()
"""Qwen3."""
