"""MLPs in plain torch."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import linear


class PlainMlp(nn.Module):
    """GELU, or SwiGLU whose first half of fc1's rows is the gate."""

    gelu: Literal["none", "tanh"] = "none"
    """The approximation of GELU; exact by default, with the error function."""

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.gated = model.swiglu
        rows = 2 * model.ffn_size if model.swiglu else model.ffn_size
        self.linear_fc1 = linear(model.hidden_size, rows, bias=model.add_bias_linear)
        self.linear_fc2 = linear(model.ffn_size, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.linear_fc2(functional.silu(gate) * up)
        return self.linear_fc2(functional.gelu(x, approximate=self.gelu))
