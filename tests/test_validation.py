"""From plain values to checked ones: what is wrong is said with file, key and remedy, wherever it is nested."""

from typing import Annotated, Any

import pytest
from pydantic import Field

from mup_megatron.errors import InputError
from mup_megatron.validation import Strict, listed, validated


class Wheel(Strict):
    spokes: int = 32
    pressure: Annotated[float, Field(gt=0)] = 2.5


class Bicycle(Strict):
    name: str
    front: Wheel = Wheel()
    spares: Annotated[tuple[Wheel, ...], Field(strict=False)] = ()


def _bicycle(**content: Any) -> Bicycle:
    return validated(Bicycle, {"name": "x", **content}, source="b.yaml")


def _message(**content: Any) -> str:
    with pytest.raises(InputError) as caught:
        _bicycle(**content)
    return str(caught.value)


def test_defaults_and_values() -> None:
    made = _bicycle(front={"spokes": 20}, spares=[{"pressure": 3.0}, {}])
    assert made == Bicycle(name="x", front=Wheel(spokes=20), spares=(Wheel(pressure=3.0), Wheel()))


def test_whole_numbers_are_fractions_but_not_the_other_way_round() -> None:
    assert _bicycle(front={"pressure": 3}).front.pressure == 3.0
    assert _message(front={"spokes": 3.0}).startswith("b.yaml: front.spokes: ")


def test_the_place_is_the_whole_path() -> None:
    assert _message(front={"pressure": -1.0}) == (
        "b.yaml: front.pressure: should be greater than 0, found -1.0. Correct this value."
    )
    assert _message(spares=[{}, {"spokes": "many"}]).startswith("b.yaml: spares.1.spokes: should be a valid integer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"nam": 1}, "b.yaml: nam: unknown key. Did you mean 'name'?"),
        ({"zzzz": 1}, "b.yaml: zzzz: unknown key. Known keys: name, front, spares."),
        ({"front": {"spoke": 1}}, "b.yaml: front.spoke: unknown key. Did you mean 'spokes'?"),
        ({"spares": [{"presure": 1.0}]}, "b.yaml: spares.0.presure: unknown key. Did you mean 'pressure'?"),
        ({"front": {"pressure": float("nan")}}, "b.yaml: front.pressure: must be a finite number, found nan."),
        ({"front": {"pressure": float("-inf")}}, "b.yaml: front.pressure: must be a finite number, found -inf."),
    ],
)
def test_messages(content: dict[str, Any], message: str) -> None:
    assert _message(**content).startswith(message)


def test_several_mistakes_are_several_lines() -> None:
    assert len(_message(front={"spokes": "a", "pressure": "b"}, bell=1).splitlines()) == 3


def test_nothing_is_an_empty_file() -> None:
    with pytest.raises(InputError, match=r"^b\.yaml: name: missing\. Add this key\.$"):
        validated(Bicycle, None, source="b.yaml")


@pytest.mark.parametrize(("content", "kind"), [([1], "list"), ("text", "str"), (3, "int")])
def test_other_things_than_keys_are_named(content: object, kind: str) -> None:
    with pytest.raises(InputError, match=rf"^b\.yaml: expected keys and values, found {kind}\. Write"):
        validated(Bicycle, content, source="b.yaml")


def test_one_thing_that_is_wrong_takes_300_characters_at_most_and_many_are_counted() -> None:
    wrong = {f"{'k' * 400}{n}": {"a": [["b" * 900] * 50] * 50} for n in range(9)}
    lines = _message(**wrong, name={"deep": [{"x": "y" * 900}] * 99}).splitlines()
    assert lines[0].startswith("b.yaml: name: should be a valid string, found {'deep': ")
    assert lines[-1] == "b.yaml: 7 more like these."
    assert max(map(len, lines)) <= 300


def test_a_list_says_how_many_are_left_out() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert listed(["a", "b", "c"], 2, separator="; ") == "a; b; and 1 more"
