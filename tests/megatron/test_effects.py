"""The table of Megatron's flags: none is missing, none is in two places, and the page for people says what it says."""

from collections import Counter
from pathlib import Path

import pytest
from support.lm_arguments import parser_of_megatron

from mup_megatron.megatron.arguments.effects import Effect, page, row_of, rows
from mup_megatron.megatron.arguments.table import HYPERPARAMETERS, NOT_SAID, SCHEDULE, STOPPED, every, refused
from mup_megatron.megatron.pretrain import flags

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_every_flag_of_the_installed_megatron_is_known() -> None:
    """A flag that is new in a release has to be looked at before the plug-in is tested with that release."""
    names = {name for action in parser_of_megatron()._actions for name in action.option_strings}
    assert [name for name in sorted(names) if row_of(name) is None] == []


def test_flags_of_the_oldest_release_are_known() -> None:
    """Those of core_v0.16 that later ones lack."""
    gone = (
        "--disable-async-tensor-model-parallel-allreduce --disable-chunked-prefill --hybrid-attention-ratio "
        "--hybrid-mlp-ratio --inference-max-batch-size --langrl-external-server --legacy-tokenizer --moe-extended-tp "
        "--moe-use-legacy-grouped-gemm --muon-use-nesterov --no-rl-reset-cuda-graphs --tiktoken-special-tokens "
        "--no-scatter-gather-tensors-in-pipeline --tokenizer-hf-use-fast --use-legacy-models"
    )
    assert [name for name in gone.split() if row_of(name) is None] == []


def test_each_flag_has_one_place() -> None:
    assert [name for name, count in Counter(row.name for row in rows()).items() if count > 1] == []


def test_what_is_read_has_the_effect_that_reading_it_has() -> None:
    effects = {row.name: row.effect for row in rows()}
    assert {effects[flag.name] for flag in refused()} == {Effect.REFUSED}
    assert {effects[flag.name] for flag in STOPPED} == {Effect.STOPPED}
    assert {effects[flag.name] for flag in NOT_SAID} == {Effect.ALIKE}
    assert {effects[flag.name] for flag in SCHEDULE} == {Effect.RECIPE}
    assert {effects[flag.name] for flag in every()} >= {Effect.MODEL}
    assert {effects[flag.name] for flag in HYPERPARAMETERS.values()} == {Effect.RECIPE, Effect.MODEL}
    assert all(row_of(name) is not None for name in flags.NAMES)


def test_a_flag_is_known_by_its_whole_name_first() -> None:
    exact, beginning = row_of("--logits-load-dir"), row_of("--log-progress")
    assert exact is not None
    assert exact.effect is Effect.ALIKE
    assert beginning is not None
    assert beginning.effect is Effect.HARMLESS
    assert row_of("--loglevel") is None
    assert row_of("--no-such-flag") is None


def test_every_reason_is_said() -> None:
    assert [row.name for row in rows() if not row.reason and row.effect is not Effect.ALIKE] == []


def test_the_page_is_up_to_date() -> None:
    if PAGE.read_text(encoding="utf-8") != page():
        pytest.fail("docs/flags.md is not what the table says. Run tools/flags-page.")
