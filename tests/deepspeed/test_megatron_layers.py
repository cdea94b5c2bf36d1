"""Which models DeepSpeed's pipeline can be made of."""

import pytest
from support.processes import run_ranks
from support.shapes import gpt, hybrid

from mup_megatron.errors import InputError

MODELS = {"hybrid": hybrid(gpt()), "experts": gpt(num_experts=4, mtp_num_layers=1, position_embedding_type="rope")}


def _refusal(which: str) -> str:
    from mup_megatron.deepspeed.megatron_layers import pipeline_layers

    with pytest.raises(InputError) as raised:
        pipeline_layers(None, MODELS[which])
    return str(raised.value)


@pytest.mark.parametrize(
    ("which", "said"),
    [("hybrid", "the model is a hybrid model"), ("experts", "has layers of experts and multi-token prediction")],
)
def test_other_layers_than_a_plain_gpts_are_refused(which: str, said: str) -> None:
    assert said in run_ranks(_refusal, 1, which)[0]
