"""The block around a layer of multi-token prediction; the layer itself is of the model's own families."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mup_megatron.architectures.families.family import Block, Growth, alike, linear, norm
from mup_megatron.architectures.keys import mtp
from mup_megatron.architectures.layout import Layout
from mup_megatron.architectures.measured import STREAM, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import WORD_EMBEDDINGS
from mup_megatron.theory import Side, Tensor


class MultiTokenPrediction(Block):
    """Joins the stream with the next token's embedding before the layer, and norms it for the model's readout behind.

    Embedding and readout are the model's own; their multipliers act here too, since their modules are called.
    """

    name: ClassVar[str] = "multi-token prediction"
    shared: ClassVar[Mapping[str, str]] = alike("mtp_num_layers", "mtp_loss_scaling_factor")

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields the norms of embedding and stream, the projection of both together, and the norm for the readout."""
        hidden = Side(model.hidden_size, grows=True)
        yield from norm(model, f"{layer}.enorm.", hidden)
        yield from norm(model, f"{layer}.hnorm.", hidden)
        yield from linear(f"{layer}.eh_proj", Side(2 * hidden.size, grows=True), hidden, bias=False)
        yield from norm(model, f"{layer}.final_layernorm.", hidden)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projection and of another readout."""
        hidden = model.hidden_size
        return {"multi_token_prediction": 6.0 * hidden * (2 * hidden + model.padded_vocab_size())}

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns the number of such layers and the factor of their loss."""
        return {key: getattr(model, key) for key in mtp.FLAGS}

    def problems(self, model: ModelFile, layout: Layout) -> Iterator[str]:
        """Yields that tied embeddings cannot be on several stages."""
        if layout.pipeline_model_parallel_size > 1 and model.tied:
            yield (
                f"--pipeline-model-parallel-size {layout.pipeline_model_parallel_size}: Megatron cannot save tied "
                "embeddings with mtp_num_layers on several stages. Use untie_embeddings_and_output_weights, or one "
                "stage."
            )

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields both norms and the projection, which is the stream of the layer inside."""
        joined = [f"{layer}.enorm", f"{layer}.hnorm"]
        yield inside(joined[0], "Residual stream", WORD_EMBEDDINGS.rpartition(".")[0])
        yield inside(joined[1], "Residual stream", STREAM)
        yield inside(f"{layer}.eh_proj", "Residual stream", *joined)


MTP = MultiTokenPrediction()
"""The block around a layer of multi-token prediction."""
