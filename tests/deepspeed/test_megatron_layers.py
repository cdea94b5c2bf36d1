"""Which models DeepSpeed's pipeline can be made of."""

import pytest
from support.processes import run_ranks
from support.shapes import gpt, hybrid

from mup_megatron.errors import InputError


def _refusal() -> str:
    from mup_megatron.deepspeed.megatron_layers import pipeline_layers

    with pytest.raises(InputError) as raised:
        pipeline_layers(None, hybrid(gpt()))
    return str(raised.value)


def test_another_architecture_than_a_gpt_is_refused() -> None:
    assert "the model is a hybrid model" in run_ranks(_refusal, 1)[0]
