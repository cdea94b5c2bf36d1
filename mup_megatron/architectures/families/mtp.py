"""The block around a layer of multi-token prediction; the layer itself is of the model's own families."""

from collections.abc import Iterator, Mapping

from mup_megatron.architectures.families.family import Growth, alike, linear, norm
from mup_megatron.architectures.measured import STREAM, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import WORD_EMBEDDINGS
from mup_megatron.theory import Place, Side, Tensor


class MultiTokenPrediction:
    """Joins the stream with the next token's embedding before the layer, and norms it for the model's readout behind.

    Embedding and readout are the model's own; their multipliers act here too, since their modules are called.
    """

    name = "multi-token prediction"
    shared: Mapping[str, str] = alike("mtp_num_layers", "mtp_loss_scaling_factor")

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields the norms of embedding and stream, the projection of both together, and the norm for the readout."""
        hidden = Side(model.hidden_size, grows=True)
        yield from norm(model, f"{layer}.enorm.", hidden)
        yield from norm(model, f"{layer}.hnorm.", hidden)
        yield from linear(f"{layer}.eh_proj", Side(2 * hidden.size, grows=True), hidden, bias=False)
        yield from norm(model, f"{layer}.final_layernorm.", hidden)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields nothing: no factor acts here but those of single weights."""
        yield from ()

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projection and of another readout."""
        hidden = model.hidden_size
        return {"multi_token_prediction": 6.0 * hidden * (2 * hidden + model.padded_vocab_size())}

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields both norms and the projection, which is the stream of the layer inside."""
        joined = [f"{layer}.enorm", f"{layer}.hnorm"]
        yield inside(joined[0], "Residual stream", WORD_EMBEDDINGS.rpartition(".")[0])
        yield inside(joined[1], "Residual stream", STREAM)
        yield inside(f"{layer}.eh_proj", "Residual stream", *joined)


MTP = MultiTokenPrediction()
"""The block around a layer of multi-token prediction."""
