"""benchmarks/lr_width.py but for training: what it concludes from losses, which rates it tries, and that it goes on."""

import contextlib
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lr_width
import pytest
from lr_width import Runs, Settings
from lr_width_table import (
    EXACT,
    EXACT_AT_POWERS_OF_2,
    Agreement,
    agreement,
    broken,
    markdown,
    overview,
    summary,
    tenths,
    worst_change,
)
from many_runs import KeptRuns, read_runs
from small_models import dense

from mup_megatron.recipe import Hyperparameters, Recipe, load_recipe, save_recipe

ROOT = Path(__file__).parents[1]

# ---- conclusions ---------------------------------------------------------------------------------------------------


def _basin(vertex: float, least: float) -> dict[float, list[list[float]]]:
    """Two seeds of two tenths each, at half octaves around -7; the second tenth is the loss at the end."""
    rates = [-7 + step / 2 for step in range(-4, 5)]
    of_seeds = (-0.01, 0.01)
    return {2.0**x: [[2 * least + off, least + 0.1 * (x - vertex) ** 2 + off] for off in of_seeds] for x in rates}


BASINS = {64: _basin(-7, 3.0), 128: _basin(-7.5, 2.5), 256: _basin(-8.25, 2.6)}


def test_optima_and_octaves_are_those_of_the_parabolas() -> None:
    found = summary(BASINS)
    assert [optimum.log2_lr for optimum in found.optima.values()] == pytest.approx([-7, -7.5, -8.25])
    assert found.moved == (256, pytest.approx(-1.25))
    # What a seed adds everywhere moves nothing.
    assert found.shift_interval == pytest.approx((-1.25, -1.25))


def test_the_regret_is_what_the_best_rate_of_the_base_costs() -> None:
    found = summary(BASINS)
    least = 2.6 + 0.1 * 0.25**2  # at 256 the best of the rates are -8 and -8.5
    assert found.least == pytest.approx({64: 3.0, 128: 2.5, 256: least})
    assert found.regrets == pytest.approx(
        {64: 0.0, 128: 0.1 * 0.5**2 / 2.5, 256: (2.6 + 0.1 * 1.25**2 - least) / least}
    )
    assert found.regret[0] == 256


def test_wider_is_better_where_every_next_width_is() -> None:
    found = summary(BASINS)
    least = 2.6 + 0.1 * 0.25**2
    assert found.worst_at_best == pytest.approx((least - 2.5) / 2.5)
    # At the base's rate: 6, 5, 5.2 in the first tenth.
    at_end = [3.0, 2.5 + 0.1 * 0.25, 2.6 + 0.1 * 1.25**2]
    assert found.worst_by_tenth == pytest.approx((0.2 / 5, (at_end[2] - at_end[1]) / at_end[1]))
    assert worst_change([3.0, 2.7, 2.4]) == pytest.approx(-0.1)


def test_a_rate_at_which_a_seed_diverges_costs_everything() -> None:
    wide: dict[float, Any] = {**_basin(-8, 2.4), 2.0**-7: [None, [4.0, 2.4]], 2.0**-6.5: [None, None]}
    found = summary({**BASINS, 256: wide})
    assert found.regrets[256] == math.inf
    assert found.worst_by_tenth == (math.inf, math.inf)
    assert found.worst_at_best < 0
    assert found.to_json()["regret"][256] is None
    assert "| ours |" in markdown({"ours": found}, {})[2]
    assert "diverges at 256" in markdown({"ours": found}, {})[2]


def test_the_table_says_it() -> None:
    head, _, row, refusal = markdown({"native": summary(BASINS)}, {"microsoft": "it does not know this"})
    assert head.startswith("|  | 64 | 128 | 256 | moved by, octaves | regret |")
    assert "| -7.50 (-7.50 … -7.50), 2.500 |" in row
    assert "| -1.25 at 256; at 256 -1.25 … -1.25 | 5.76 % at 256 | no (+4.25 %) | not in 1, 2 (worst +9.16 %) |" in row
    assert refusal.startswith("| microsoft | refused: it does not know this |")
    assert len({line.count("|") for line in (head, row, refusal)}) == 1
    wider = {**BASINS, 512: _basin(-8.25, 2.5)}
    wide_head, _, without_512, with_512 = markdown({"native": summary(BASINS), "ours": summary(wider)}, {})
    assert wide_head.startswith("|  | 64 | 128 | 256 | 512 | moved by")
    assert without_512.startswith(row.partition(" | -1.25")[0] + " |  | -1.25 at 256")
    assert len({line.count("|") for line in (wide_head, without_512, with_512)}) == 1
    of_shapes = overview("ours", {"bert": summary(BASINS), "ffn": summary(BASINS)})
    conclusions = row.split(" | ", maxsplit=4)[-1]
    assert of_shapes[2:] == [f"| {shape} | 64, 128, 256 | {conclusions}" for shape in ("bert", "ffn")]
    assert len({line.count("|") for line in of_shapes}) == 1


def test_tenths_of_a_run() -> None:
    assert tenths([*map(float, range(20))]) == [0.5 + 2 * tenth for tenth in range(10)]
    assert tenths([1.0, 3.0]) == [1.0, 3.0]
    assert tenths([*map(float, range(25))])[-1] == 23.0  # of the last three


def _rows(*losses: float | None, start: str = "a") -> dict[int, dict[str, Any]]:
    return {i: {"curve": loss and [2 * loss, loss], "start": start} for i, loss in enumerate(losses)}


def test_agreement_is_to_the_last_bit_or_how_far_off() -> None:
    assert agreement(_rows(2.0, None), _rows(2.0, None)) == Agreement(2, True, True, 0.0, 0.0)
    found = agreement(_rows(2.0, 4.0), _rows(2.0, 4.0 + 1e-12, start="b"))
    assert (found.same_start, found.same_digits) == (False, False)
    assert found.furthest == pytest.approx(2.5e-13, rel=0.01)
    assert agreement(_rows(2.0), _rows(None)).furthest == math.inf
    assert agreement(_rows(2.0, 3.0), _rows(2.0)).runs == 1


def test_what_has_to_agree_at_the_base_does_or_is_named() -> None:
    same, near, off = (
        Agreement(1, True, True, 0, 0),
        Agreement(1, True, False, 1e-7, 0),
        Agreement(1, False, False, 1, 1),
    )
    assert broken("ffn", 64, {"standard": same, "native": same, "microsoft": near}, EXACT_AT_POWERS_OF_2) == []
    assert broken("ffn", 64, {"standard": same, "native": near}, EXACT) == []
    assert broken("ffn", 64, {"native": near, "microsoft": off}, EXACT_AT_POWERS_OF_2) == [
        "ffn: microsoft begins with other weights at 64",
        "ffn: native gives other digits at 64",
    ]


# ---- which rates, and going on -------------------------------------------------------------------------------------

TUNED = lr_width.SHAPES["proportional"].recipe(
    dense(64), Recipe(base=dense(64), hyperparameters=Hyperparameters(lr=2.0**-7, output_multiplier=4.0)), 0
)
SETTINGS = Settings(
    widths={"proportional": (64, 128, 256)}, arms=("standard", "ours"), seeds=2, rates=3, steps=20, batch=8, tuned=TUNED
)
VERTEX = {"ours": {64: -6.0, 128: -6.0, 256: -6.0}, "standard": {64: -6.0, 128: -7.0, 256: -8.0}}


class Trained(Executor):
    """In place of worker processes: runs whose losses are parabolas."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int, float, int]] = []

    def submit(self, _train: Any, arms: Any, run: Any, _data: Any) -> Future[Any]:  # type: ignore[override]
        model, recipe, _steps, _batch, seed = run
        future: Future[Any] = Future()
        x = math.log2(recipe.hyperparameters.lr)
        loss = {arm: 3 + (x - VERTEX[arm][model.hidden_size]) ** 2 + 0.01 * seed for arm in arms}
        self.runs += [(arm, model.hidden_size, x, seed) for arm in arms]
        future.set_result({arm: {"curve": [5.0, loss[arm]], "start": "a", "seconds": 1.0} for arm in arms})
        return future


def _rates(trained: Trained, arm: str, width: int) -> list[float]:
    return sorted({x for own, at, x, _ in trained.runs if (own, at) == (arm, width)})


def _sweep(file: Path, trained: Trained, **changes: Any) -> Mapping[str, Any]:
    settings = Settings(**{**vars(SETTINGS), **changes})
    return Runs(settings, KeptRuns(file), trained, Path("data/text"), ["cpu"]).sweep("proportional", {}).rows


def test_rates_go_on_until_the_best_is_between_two_and_the_base_has_its_own(tmp_path: Path) -> None:
    trained = Trained()
    _sweep(tmp_path / "runs.jsonl", trained)
    assert _rates(trained, "ours", 64) == [-7.5, -7.0, -6.5, -6.0, -5.5]  # from the middle, -7, up
    assert _rates(trained, "ours", 256) == [-6.5, -6.0, -5.5]  # around the best of the width before
    assert _rates(trained, "standard", 128) == [-7.5, -7.0, -6.5, -6.0, -5.5]
    # Around the best at 128, down to the other side of its own, and the base's.
    assert _rates(trained, "standard", 256) == [-8.5, -8.0, -7.5, -7.0, -6.5, -6.0]


@pytest.mark.parametrize("name", lr_width.PROTOCOLS)
def test_the_protocol_of_others_is_a_grid_at_every_width(name: str, tmp_path: Path) -> None:
    protocol = lr_width.PROTOCOLS[name]
    trained = Trained()
    _sweep(tmp_path / "runs.jsonl", trained, seeds=1, grid=protocol.grid)
    low, high = protocol.octaves
    for width in SETTINGS.widths["proportional"]:
        assert _rates(trained, "standard", width) == [-7 + octave for octave in range(low, high + 1)]


def test_what_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    first, second, other = Trained(), Trained(), Trained()
    rows = _sweep(tmp_path / "runs.jsonl", first)
    assert len(first.runs) == len(set(first.runs))
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(first.runs)
    # Interrupted: the last three are not there.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    assert _sweep(tmp_path / "runs.jsonl", second) == rows
    assert sorted(second.runs) == sorted(first.runs[-3:])
    # Another length is another run.
    _sweep(tmp_path / "runs.jsonl", other, steps=21)
    assert sorted(other.runs) == sorted(first.runs)


@pytest.mark.parametrize(("shape", "widths"), [*lr_width.PUBLISHED.items(), *lr_width.SIXTEENFOLD.items()], ids=str)
def test_a_shape_has_models_at_every_published_width(shape: str, widths: tuple[int, ...]) -> None:
    base, *wider = (lr_width.SHAPES[shape].model(width, widths[0]) for width in widths)
    recipe = lr_width.SHAPES[shape].recipe(base, TUNED, 1)
    assert recipe.hyperparameters.lr == pytest.approx(2.0**-6.5)
    assert recipe.hyperparameters.output_multiplier == 4.0
    for model in wider:
        assert recipe.plan(model).by_name


def test_what_stays_is_as_wide_as_the_base_has_it() -> None:
    def of(shape: str, key: str, base: int, width: int) -> Any:
        return getattr(lr_width.SHAPES[shape].model(width, base), key)

    for base, head in ((64, 32), (16, 16)):
        wide = 4 * base
        assert of("proportional", "num_attention_heads", base, wide) == wide // head
        assert of("ffn", "ffn_hidden_size", base, wide) == 4 * base
        assert of("groups", "num_query_groups", base, wide) == base // head
        assert of("heads", "num_attention_heads", base, wide) == base // head
        assert (of("deeper", "num_layers", base, base), of("deeper", "num_layers", base, wide)) == (2, 4)
        assert of("latent", "kv_lora_rank", base, wide) == base // 2
        assert of("latent", "qk_head_dim", base, wide) + of("latent", "qk_pos_emb_head_dim", base, wide) == head
        assert of("experts", "num_attention_heads", base, wide) == wide // head


def test_a_recipe_says_what_was_tuned() -> None:
    shape = lr_width.SHAPES["deeper"]
    tuned = shape.recipe(shape.model(64, 64), TUNED, 0)
    values = {"lr": 0.01, "min_lr": 0.002, "init_method_std": 0.03, "weight_decay": 0.0}
    cosine = tuned.schedule.model_copy(update={"lr_decay_style": "cosine"})
    given = {"hyperparameters": tuned.hyperparameters.model_copy(update=values), "schedule": cosine}
    found = shape.recipe(shape.model(64, 64), tuned.model_copy(update=given), -2)
    assert found.hyperparameters.model_dump() == {
        **tuned.hyperparameters.model_dump(),
        **values,
        "lr": 0.005,
        "min_lr": 0.001,
    }
    assert found.schedule == cosine
    assert found.parametrization.depth is not None


def test_the_published_values_were_tuned_at_the_base_that_they_are_used_at() -> None:
    assert load_recipe(lr_width.RECIPE).base == lr_width.SHAPES["ffn"].model(64, 64)
    assert lr_width.SHAPES["ffn"].model(64, 64).ffn_hidden_size == 4 * 64  # as in the others


PAGE = (ROOT / "docs" / "results" / "lr_width.md").read_text(encoding="utf-8")
FROM = "benchmarks/tables/lr_width/runs.jsonl.gz"


COMMANDS = re.findall(rf"python benchmarks/lr_width\.py (.*) --from {FROM} -o", PAGE)


@functools.cache
def _told(words: str) -> tuple[str, Mapping[str, int]]:
    """What a command says of the kept runs, and the sizes of its pictures by name."""
    said = io.StringIO()
    with TemporaryDirectory() as output, contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lr_width.py", *words.split(), "--from", str(ROOT / FROM), "-o", output])
        lr_width.main()
        sizes = {path.stem: path.stat().st_size for path in Path(output).glob("*.png")}
    return said.getvalue(), sizes


@pytest.mark.parametrize("words", COMMANDS)
def test_the_page_has_the_tables_of_the_kept_runs(words: str) -> None:
    told, pictures = _told(words)
    assert [line for line in told.splitlines() if line.startswith("|") and line not in PAGE] == []
    shapes = re.findall(r"^## (\w+)$", told, flags=re.MULTILINE)
    assert shapes
    together = re.findall(r"--(?:like )?(megatron-3058|nanogpt-mup|sixteenfold)", words)
    assert pictures.keys() == {*(together or shapes)}
    for name in pictures:
        assert pictures[name] > 10_000
        assert f"](lr_width_{name}.png)" in PAGE


def test_each_row_of_the_page_is_of_the_kept_runs() -> None:
    told = {line for words in COMMANDS for line in _told(words)[0].splitlines()}
    assert [line for line in PAGE.splitlines() if line.startswith("|") and line not in told] == []


def test_a_file_of_runs_that_go_on_tells_of_the_rates_that_are_done() -> None:
    rows: dict[tuple[int, int], Any] = {(rate, seed): None for rate in range(4) for seed in (1, 2, 3)}
    begun = {key: rows[key] for key in rows if key != (3, 2)}
    assert lr_width._with_basins({128: begun, 64: rows, 256: {(0, 1): None}}, 3) == {
        64: rows,
        128: {key: rows[key] for key in rows if key[0] < 3},
    }


PACKED = (ROOT / FROM).read_bytes()
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "a line that was cut": ("runs.jsonl", b'{"key": ["ours"]}\n{"key": ["ou', "line 2: no run, .* Take the line out"),
    "a line of something else": ("runs.jsonl", b"[1]\n", "line 1: no run"),
    "packed and cut": ("runs.jsonl.gz", PACKED[: len(PACKED) // 2], "no file of runs"),
    "not packed": ("runs.jsonl.gz", b"{}", "no file of runs"),
    "no text": ("runs.jsonl", b"\xff\xfe", "no file of runs"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_runs_is_named(damage: str, tmp_path: Path) -> None:
    name, content, said = DAMAGED[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=rf"{name}(, |: ){said}"):
        read_runs(tmp_path / name)


def test_a_file_of_runs_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing\.jsonl: no file of runs .*No such file"):
        read_runs(tmp_path / "nothing.jsonl")


@pytest.mark.slow  # a server that has imported Megatron, and thirty runs
def test_the_command_runs(tmp_path: Path) -> None:
    # Multipliers that are powers of 2: the command fails if native then gives other digits than ours at the base.
    values = Hyperparameters(lr=0.01, output_multiplier=2.0, attention_multiplier=0.3)
    save_recipe(Recipe(base=dense(64), hyperparameters=values), tmp_path / "tuned.recipe.yaml")
    words = "--shapes ffn --widths 64 96 128 --seeds 2 --rates 3 --steps 2 --recipe tuned.recipe.yaml -o out".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "lr_width.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ffn: no microsoft: decoder.layers.0.mlp.linear_fc1 has infinite fan-in" in done.stdout
    assert "standard beside ours at 64" in done.stdout
    assert (tmp_path / "out" / "ffn.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "out" / "lr_width.json").read_text())
    assert [*told["shapes"]["ffn"]["arms"]["ours"]["loss"]] == ["64", "96", "128"]
