"""Folds of weights and of what an optimizer keeps of them: whole and in parts, there and back."""

from dataclasses import replace

import pytest
import torch
from support.exported import KINDS, tokens, trained

from mup_megatron.architectures.registry import shapes_of
from mup_megatron.errors import InputError
from mup_megatron.export.folding import ORDERS, Folding, changed, folding
from mup_megatron.export.folds import Fold


def a_folding(name: str, *, optimizer: bool = True) -> Folding:
    model = trained(KINDS[name])
    _, shape = shapes_of(model.model, model.model)
    return folding(model.plan, shape.tensors, optimizer=optimizer)


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3", "deepseek_v3"])
def test_a_folding_comes_back_from_its_text(name: str) -> None:
    made = a_folding(name)
    assert made.folds
    assert Folding.from_text(made.to_text(), source="s", remedy="r") == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "fingerprint": "", "optimizer": true, "folded": []}'])
def test_a_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^beside it"):
        Folding.from_text(text, source="beside it", remedy="Fold it again.")


ROWS = Fold("w", 4.0, rows=(range(1, 3), range(5, 7)))
SHIFTED = Fold("w", 0.5, 0.25)


def test_parts_of_a_tensor_are_changed_as_the_whole_is() -> None:
    whole = torch.randn(8, 3, dtype=torch.float64)
    for back in (False, True):
        wanted = changed(whole, [ROWS, SHIFTED], back=back)
        for cut in range(9):
            parts = [
                changed(whole[:cut], [ROWS, SHIFTED], back=back),
                changed(whole[cut:], [ROWS, SHIFTED], back=back, first_row=cut),
            ]
            assert torch.equal(torch.cat(parts), wanted)
    assert torch.equal(changed(whole, [ROWS])[3:5], whole[3:5])
    assert torch.equal(changed(whole, [ROWS])[5:7], 4 * whole[5:7])


@pytest.mark.parametrize("state", ORDERS)
def test_powers_of_two_come_back_to_the_bit_and_others_to_rounding(state: str) -> None:
    kept = torch.randn(8, 3, dtype=torch.float64)
    order = ORDERS[state]
    there = changed(kept, [ROWS], order=order)
    assert not torch.equal(there, kept)
    assert torch.equal(changed(there, [ROWS], order=order, back=True), kept)
    for fold in (Fold("w", 1.7), Fold("w", 0.3, -0.7)):
        there = changed(kept, [fold], order=order)
        assert (changed(there, [fold], order=order, back=True) - kept).abs().max() < 1e-14


def test_what_adam_keeps_of_a_folded_weight_is_what_it_would_have_kept() -> None:
    """Against Adam itself: one function, of a weight and of what it is folded into."""
    fold = Fold("w", 1.6, 0.6)
    plain = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    own = torch.nn.Parameter(changed(plain.detach(), [fold]))
    optimizers = [torch.optim.AdamW([each], amsgrad=True, lr=0.0) for each in (plain, own)]
    data = torch.randn(5, 3, 4, dtype=torch.float64)
    for given in data:
        (given @ plain).square().sum().backward()
        (given @ changed_back(own, fold)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    kept, wanted = optimizers[0].state[plain], optimizers[1].state[own]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(changed(kept[name], [fold], order=ORDERS[name]), wanted[name])


def changed_back(weight: torch.Tensor, fold: Fold) -> torch.Tensor:
    return (weight - fold.offset) / fold.factor


def test_a_type_is_kept_and_nothing_in_place() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    assert changed(half, [Fold("w", 3.0)]).dtype == torch.bfloat16
    assert torch.equal(half, torch.ones(2, dtype=torch.bfloat16))


def test_what_leaves_the_range_of_its_type_is_refused() -> None:
    half = torch.full((2, 2), 3e4, dtype=torch.float16)
    with pytest.raises(InputError, match=r"^w: has values that are too large for float16"):
        changed(half, [Fold("w", 3.0)])
    # Of a run that diverged, which is no matter of folds.
    half[0, 0] = float("inf")
    assert changed(half, [Fold("w", 2.0)])[0, 0] == float("inf")


def test_what_was_done_is_what_is_done_to_the_model() -> None:
    model = trained(KINDS["llama"])
    _, shape = shapes_of(model.model, model.model)
    made = folding(model.plan, shape.tensors, optimizer=True)
    made.require_of(model.plan, shape.tensors, source="s")
    first, *rest = made.folds
    rounded = (replace(first, factor=first.factor * (1 + 1e-12)), *rest)
    replace(made, folds=rounded).require_of(model.plan, shape.tensors, source="s")
    wrong = (
        (replace(first, factor=2 * first.factor), *rest),
        (replace(first, offset=0.5), *rest),
        (replace(first, rows=(range(3),)), *rest),
        made.folds[:-1],
        (*made.folds, first),
    )
    for folds in wrong:
        with pytest.raises(InputError, match=r"^s: says of [\w.]+ what is not done to a model of this recipe"):
            replace(made, folds=folds).require_of(model.plan, shape.tensors, source="s")


@pytest.mark.parametrize("name", ["gpt2", "llama with biases", "qwen3", "mixtral"])
def test_a_training_goes_on_as_if_it_had_not_been_folded(name: str) -> None:
    """In double precision, with multipliers of any size, and with clipping."""
    made = a_folding(name)

    def losses(*, there_and_back: bool) -> list[float]:
        model = trained(KINDS[name])
        given = tokens(model.model)
        parameters = dict(model.live.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        found = []
        for step in range(6):
            if step == 3 and there_and_back:
                for back in (False, True):
                    for own, parameter in parameters.items():
                        folds = made.by_name.get(own, ())
                        parameter.data = changed(parameter.data, folds, back=back)
                        state = optimizer.state[parameter]
                        for kept in ("exp_avg", "exp_avg_sq"):
                            state[kept] = changed(state[kept], folds, order=ORDERS[kept], back=back)
            logits = model.live(given)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(there_and_back=True) == pytest.approx(losses(there_and_back=False), abs=1e-10)
