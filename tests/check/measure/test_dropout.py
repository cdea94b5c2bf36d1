"""What is off for the time of a check, and what stays torch's own."""

import subprocess
import sys

_IMPORTED_WITHIN = """
import torch
own = torch.nn.functional.scaled_dot_product_attention
from mup_megatron.check.measure.dropout import without_dropout
with without_dropout():
    assert torch.nn.functional.scaled_dot_product_attention is not own
    from mup_megatron.modules import forward
    from mup_megatron.check.subjects import sight
assert torch.nn.functional.scaled_dot_product_attention is own
assert forward.FUSED_ATTENTION is sight.FUSED_ATTENTION is own
"""


def test_torchs_own_attention_is_known_even_to_what_is_imported_within_a_check() -> None:
    subprocess.run([sys.executable, "-c", _IMPORTED_WITHIN], check=True)
