"""What a verdict says in words, in its files and in its picture comes from its measurements, and from nothing else."""

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import COORDINATES, Key, MeasuredRun, Measurements, Quantity
from mup_megatron.check.report.picture import png
from mup_megatron.check.report.report import alike, comparison_csv, measurements_csv, section_csv, text, verdict_json
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Finding, compare, findings
from mup_megatron.check.verdict.verdict import CheckOutcome, Section, Verdict

WIDTHS = (32, 64, 128, 256)
STEPS = (3, 8)
HIDDEN = [f"decoder.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("linear_fc1", "linear_fc2")]
MODULES = ["embedding.word_embeddings", "decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "output_layer"]
CAUSE = Cause("learning-rate-collapsed", "all groups have one learning rate.", f"{HIDDEN[0]}.weight", 0.9)

Factor = Callable[[Key, int], float]


def measured(seeds: int, *, factor: Factor = lambda _key, _width: 1.0, first: int = 0) -> Measurements:
    """Runs in which everything is 1 but for noise of a hundredth, times a factor."""
    keys = [Key(Quantity.INITIAL, f"{name}.weight", 0) for name in HIDDEN]
    for step in STEPS:
        keys += [Key(Quantity.UPDATE, name, step) for name in (*MODULES, *HIDDEN)]
        keys += [Key(Quantity.LEARNING_RATE, f"{name}.weight", step) for name in HIDDEN]
        keys += [Key(Quantity.GRADIENT, f"{name}.weight", step) for name in HIDDEN]
    runs = []
    for width in WIDTHS:
        for seed in range(first, first + seeds):
            noise = random.Random(1000 * width + seed)
            values = {key: factor(key, width) * math.exp(noise.gauss(0, 0.005)) for key in keys}
            runs.append(MeasuredRun(width, seed, values, (5.0, 4.5, 4.2)))
    return Measurements(tuple(runs))


def verdict(factor: Factor | None = None, *causes: Cause, **changes: object) -> Verdict:
    """Judged by nothing but the comparison."""
    reference, control = measured(4, first=10), measured(2, factor=lambda _key, width: width / 32, first=20)
    subject = measured(3) if factor is None else measured(3, factor=factor)
    comparison = compare(subject, reference)
    off = findings(comparison)
    sections = [
        section(name, tuple(finding for finding in off if (finding.key.quantity in COORDINATES) == coordinates))
        for name, coordinates in (("coordinates", True), ("gradients and updates", False))
    ]
    made = Verdict(
        outcome=CheckOutcome.FAIL if off else CheckOutcome.PASS,
        level=Level.QUICK,
        fingerprint="0123456789abcdef",
        culprit=causes[0].culprit if causes else (off[0].key.name if off else None),
        causes=causes,
        sections=tuple(sections),
        remarks=("Dropout is off.",),
        widths=WIDTHS,
        seeds=3,
        seconds=41.0,
        subject=subject,
        reference=reference,
        control=control,
        comparison=comparison,
        control_comparison=compare(control, reference),
        measured=tuple(GPT.measured(gpt(num_layers=3))),
        entries=recipe_for(gpt()).plan(gpt(num_layers=3)).by_name,
    )
    return replace(made, **changes)


def section(name: str, found: tuple[Finding, ...]) -> Section:
    outcome = CheckOutcome.FAIL if found else CheckOutcome.PASS
    return Section(name=name, outcome=outcome, lines=("what was looked at",), findings=found)


def collapsed(key: Key, width: int) -> float:
    """A learning rate that grows with the width at every layer's fc1."""
    wrong = key.quantity is Quantity.LEARNING_RATE and "linear_fc1" in key.name
    return width / 32 if wrong else 1.0


def of(verdict: Verdict, **more: object) -> str:
    return text(verdict, title="target.yaml", files=(), **more)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_a_pass_says_so_and_of_what() -> None:
    head, conditions, *_ = of(verdict()).splitlines()
    assert head == "PASS target.yaml"
    assert conditions == "level quick, recipe 0123456789ab, widths 32, 64, 128, 256, 3 seeds each, 41 s"


def test_a_fail_begins_with_the_culprit() -> None:
    assert of(verdict(collapsed, CAUSE)).splitlines()[0] == f"FAIL target.yaml: {CAUSE.culprit}"


def test_no_verdict_begins_with_why() -> None:
    none = Section(name="training", outcome=CheckOutcome.NO_VERDICT, lines=("loss: not finite", "Lower the lr."))
    told = of(verdict(outcome=CheckOutcome.NO_VERDICT, sections=(none,)))
    assert told.splitlines()[0] == "NO VERDICT target.yaml: Lower the lr."


def test_a_finding_is_one_line_with_where_when_expected_and_found() -> None:
    (line,) = [line for line in of(verdict(collapsed)).splitlines() if "learning rate" in line]
    assert line.startswith(
        "  decoder.layers.0-2.mlp.linear_fc1.weight: learning rate, after 3 steps: slope over width +1.0"
    )
    assert "expected" in line
    found, expected = line.partition("at width 256: ")[2].split(" (")[0].split(", expected ")
    assert float(found) == pytest.approx(8.0, rel=0.05)
    assert float(expected) == pytest.approx(1.0, rel=0.05)
    assert line.endswith("(also after 8 steps)")


def test_what_is_alike_in_several_layers_is_told_once_and_the_rest_not_hidden() -> None:
    groups = alike(findings(verdict(collapsed).comparison))
    assert [group.name for group in groups] == ["decoder.layers.0-2.mlp.linear_fc1.weight"]
    assert len(groups[0].findings) == 6

    def in_two(key: Key, width: int) -> float:
        return collapsed(key, width) if key.name.startswith(("decoder.layers.0.", "decoder.layers.2.")) else 1.0

    assert "decoder.layers.0,2.mlp.linear_fc1.weight" in of(verdict(in_two))


def test_of_a_section_five_findings_are_told_and_the_others_counted() -> None:
    told = of(verdict(lambda key, width: width / 32 if key.quantity is Quantity.UPDATE else 1.0))
    # Embedding, readout, residual stream, fc1 and fc2 are five; the gradients make a section of their own.
    assert told.count("activation update") == 5
    assert "more, which" not in told
    told = of(verdict(lambda key, width: width / 32 if key.quantity is not Quantity.UPDATE else 1.0))
    assert told.count(": slope over width") == 5
    assert "… and 1 more" in told


def test_a_wrong_level_is_told_as_a_factor() -> None:
    told = of(verdict(lambda key, _: 0.5 if key.quantity is Quantity.INITIAL and "fc2" in key.name else 1.0))
    assert "decoder.layers.0-2.mlp.linear_fc2.weight: initial weight, before training: 0.5" in told


@pytest.mark.parametrize(
    ("subject", "reference", "values"),
    [(0.0, 1.0, "0, expected "), (1.0, 0.0, r"(1|0\.99\d|1\.0\d), expected 0")],
    ids=["gone", "arisen"],
)
def test_what_is_0_and_should_not_be_has_values_and_no_slope_or_factor(
    subject: float, reference: float, values: str
) -> None:
    def of_fc2(size: float) -> Factor:
        return lambda key, _: size if key.quantity is Quantity.INITIAL and "fc2" in key.name else 1.0

    sides = measured(3, factor=of_fc2(subject)), measured(4, factor=of_fc2(reference), first=10)
    comparison = compare(*sides)
    made = verdict(
        subject=sides[0],
        reference=sides[1],
        comparison=comparison,
        sections=(section("gradients and updates", tuple(findings(comparison))),),
    )
    [line] = [line for line in of(made).splitlines() if "linear_fc2.weight: initial weight" in line]
    assert re.match(
        rf"  decoder\.layers\.0-2\.mlp\.linear_fc2\.weight: initial weight, before training: at width 256: {values}",
        line,
    )
    assert "slope" not in line
    assert "times" not in line


def test_causes_come_ranked_with_their_shares() -> None:
    second = Cause("other", "eps is not scaled.", "decoder.layers.0.mlp.linear_fc2.weight", 0.125)
    told = of(verdict(collapsed, CAUSE, second))
    assert f"  1. 90%  {CAUSE.culprit}: {CAUSE.sentence}\n  2. 12%  {second.culprit}: {second.sentence}" in told


# ---- files ---------------------------------------------------------------------------------------------------------


def test_json_is_the_verdict_and_has_only_what_json_has() -> None:
    made = verdict(collapsed, CAUSE)
    content = json.loads(verdict_json(made, title="target.yaml"))
    assert (content["target"], content["outcome"], content["culprit"]) == ("target.yaml", "fail", CAUSE.culprit)
    assert content["causes"][0]["share"] == 0.9
    infinite = Section(name="transfer", outcome=CheckOutcome.PASS, lines=(), rows=({"lr": 1.0, "loss": math.inf},))
    told = verdict_json(replace(made, sections=(infinite,)), title="t")

    def refused(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(told, parse_constant=refused)["sections"][0]["rows"] == [{"lr": 1.0, "loss": "inf"}]


def test_measurements_are_all_there_to_the_last_digit() -> None:
    made = verdict()
    rows = list(csv.DictReader(io.StringIO(measurements_csv(made))))
    sides = {"subject": made.subject, "reference": made.reference, "control": made.control}
    assert len(rows) == sum(len(run.values) for side in sides.values() for run in side.runs)
    for row in rows[:: len(rows) // 50]:
        (run,) = [r for r in sides[row["side"]].at(int(row["width"])) if r.seed == int(row["seed"])]
        assert float(row["value"]) == run.values[Key(Quantity(row["quantity"]), row["name"], int(row["step"]))]


def test_the_comparison_marks_what_is_off_and_gives_the_ratio_at_each_width() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(verdict(collapsed)))))
    off = [row for row in rows if row["off"]]
    assert {(row["quantity"], row["off"]) for row in off} == {("learning rate", "slope")}
    assert {row["name"] for row in off} == {name + ".weight" for name in HIDDEN if "fc1" in name}
    for row in off:
        assert [float(row[f"ratio_{width}"]) for width in WIDTHS] == pytest.approx([1, 2, 4, 8], rel=0.05)
        assert float(row["control_slope"]) == pytest.approx(1, abs=0.05)


def test_a_section_with_a_table_gets_all_its_columns() -> None:
    made = Section(name="x", outcome=CheckOutcome.PASS, lines=(), rows=({"a": 1}, {"a": 2, "b": 3}))
    assert section_csv(made) == "a,b\n1,\n2,3\n"


# ---- picture -------------------------------------------------------------------------------------------------------


def drawn(verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, str]]:
    """Title of every panel → width of its red frame, 0 without; its words."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: kept.append(figure))
    png(verdict, title="target.yaml")
    (figure,) = kept
    found = {}
    for axes in figure.axes:
        spine = axes.spines["top"]
        red = spine.get_visible() and to_hex(spine.get_edgecolor()) == "#c0271c"
        found[axes.get_title(loc="left")] = (
            spine.get_linewidth() if red else 0.0,
            "\n".join(words.get_text() for words in axes.texts),
        )
    found["figure"] = (0.0, "\n".join(words.get_text() for words in figure.texts))
    return found


def test_the_picture_is_one_png() -> None:
    assert png(verdict(collapsed, CAUSE), title="target.yaml").startswith(b"\x89PNG")


def test_a_pass_has_no_red_frame_and_at_most_twelve_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(verdict(), monkeypatch)
    assert "PASS target.yaml" in panels.pop("figure")[1]
    assert len(panels) <= 12
    assert {width for width, _ in panels.values()} == {0.0}


def test_the_panel_at_fault_has_the_thick_frame_and_what_follows_the_thin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def factor(key: Key, width: int) -> float:
        follows = key.quantity is Quantity.UPDATE and key.name == "decoder.layers.1"
        return width / 32 if follows else collapsed(key, width)

    panels = drawn(verdict(factor, CAUSE), monkeypatch)
    words = panels.pop("figure")[1]
    assert f"FAIL target.yaml: {CAUSE.culprit}" in words
    assert CAUSE.sentence in words
    framed = {title: width for title, (width, _) in panels.items() if width}
    assert set(framed) == {"Learning rate that acted", "Residual stream, layer 1"}
    assert framed["Learning rate that acted"] > 3 > framed["Residual stream, layer 1"]
    told = panels["Learning rate that acted"][1]
    assert told.startswith("decoder.layers.0.mlp.linear_fc1.weight\nslope +1.0")
    assert ", expected " in told


def test_a_panel_tells_what_is_0_and_should_not_be_by_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = verdict(lambda key, _: 0.0 if key.quantity is Quantity.INITIAL and "fc2" in key.name else 1.0)
    told = drawn(gone, monkeypatch)["Initial weights"][1]
    assert told.startswith("decoder.layers.0.mlp.linear_fc2.weight\nat width 256: 0, expected ")


def test_panels_are_those_of_what_the_architecture_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = list(drawn(verdict(), monkeypatch))
    assert [title.partition(",")[0] for title in panels[4:10]] == [
        "Embedding",
        "Residual stream",
        "Attention logits",
        "Attention output",
        "MLP output",
        "Readout (the model's logits)",
    ]


def test_a_model_with_more_families_gets_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = verdict()
    titles = ("Router logits", "Expert output", "Mamba output")
    more = tuple(Measured(f"decoder.layers.0.{title}", Kind.BRANCH, title, (), leads=True) for title in titles)
    panels = drawn(replace(made, measured=made.measured + more), monkeypatch)
    assert [title for title in panels if title in titles] == [*titles]
    assert {"Training loss by width", "Gradients and weights: found / expected"} < set(panels)
    assert len(panels) == 4 + 9 + 2 + 2, "one of them empty, and the words beside"


def test_a_model_of_other_names_is_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str) -> str:
        return name.replace("decoder.layers", "blocks").replace("output_layer", "head")

    def renamed(side: Measurements) -> Measurements:
        runs = [
            replace(run, values={Key(k.quantity, other(k.name), k.step): v for k, v in run.values.items()})
            for run in side.runs
        ]
        return Measurements(tuple(runs))

    made = verdict()
    subject, reference = renamed(made.subject), renamed(made.reference)
    panels = drawn(
        replace(made, subject=subject, reference=reference, comparison=compare(subject, reference), measured=()),
        monkeypatch,
    )
    assert any(title.startswith("blocks.") for title in panels)
    assert len(panels) <= 13


def test_runs_without_a_measurement_are_drawn_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Measurements(tuple(MeasuredRun(width, 1, {}, (), "loss: not finite after 1 step") for width in WIDTHS))
    none = Section(name="training", outcome=CheckOutcome.FAIL, lines=("loss: not finite after 1 step",))
    made = verdict(culprit="loss", outcome=CheckOutcome.FAIL, sections=(none,))
    made = replace(made, subject=nothing, comparison={}, control_comparison={})
    assert drawn(made, monkeypatch)["Training loss by width"][0] > 3
    assert "FAIL target.yaml: loss" in of(made)
    assert comparison_csv(made).count("\n") == 1
