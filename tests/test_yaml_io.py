"""YAML in and out: 1.2 numbers, nothing but plain values, mistakes with file and line."""

import json
from pathlib import Path

import pytest
import yaml as yaml_1_1
from hypothesis import given
from hypothesis import strategies as st

from mup_megatron.errors import InputError
from mup_megatron.yaml_io import dump_yaml, parse_yaml, read_yaml


def _parse(text: str) -> object:
    return parse_yaml(text, source="a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8),
        ("6e-4", 6e-4),
        ("1e-08", 1e-8),
        ("1.0e-8", 1e-8),
        ("1E+3", 1000.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("0.006", 0.006),
        ("12", 12),
        ("-3", -3),
        ("0o17", 15),
        ("0x1F", 31),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    found = _parse(f"lr: {text}")
    assert found == {"lr": value}
    assert type(found["lr"]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(("text", "value"), [("no", "no"), ("on", "on"), ("true", True), ("null", None)])
def test_words_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert _parse(f"a: {text}") == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {proof}']",
        "a: !!python/object/new:os.system ['touch {proof}']",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "!!python/object/apply:subprocess.check_output [[touch, {proof}]]",
        "a: !thing {{x: 1}}",
    ],
)
def test_a_file_cannot_run_code(text: str, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    with pytest.raises(InputError, match=r"^a\.yaml: line 1: not valid YAML: could not determine a constructor"):
        _parse(text.format(proof=proof))
    assert not proof.exists()
    # The attack is a real one: a loader that trusts its file runs it.
    if "apply:os.system" in text:
        yaml_1_1.unsafe_load(text.format(proof=proof))
        assert proof.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"^a\.yaml: line 3: a: this key is given twice\. Remove one of the two\.$"),
        ("a: {b: 1, b: 2}\n", r"^a\.yaml: line 1: b: this key is given twice\."),
        ("a: [1, 2\n", r"^a\.yaml: line 2: not valid YAML: .* Correct the file\.$"),
        ("a: 1\n\tb: 2\n", r"^a\.yaml: line 2: not valid YAML: "),
        ("a: *nowhere\n", r"^a\.yaml: line 1: not valid YAML: found undefined alias"),
        ("a: 'open\n", r"^a\.yaml: line 2: not valid YAML: "),
        ("a: b: c\n", r"^a\.yaml: line 1: not valid YAML: "),
        ("\x00", r"^a\.yaml: .*not valid YAML: "),
        ("[" * 5000, r"^a\.yaml: .*not valid YAML: "),
    ],
)
def test_corrupt_yaml_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _parse(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such file\. Check the path\."):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r": cannot be read \(Is a directory\)"):
        read_yaml(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(InputError, match=r"binary\.yaml: not UTF-8 text \(byte 3\)\. Save it as UTF-8\."):
        read_yaml(binary)
    good = tmp_path / "good.yaml"
    good.write_text("a: é\n", encoding="utf-8")
    assert read_yaml(good) == {"a": "é"}


def test_an_empty_file_is_nothing() -> None:
    assert _parse("") is None
    assert _parse("# only a comment\n") is None


finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | finite
    | st.text(st.characters(codec="ascii", exclude_categories=["C"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(content=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4))
def test_what_is_written_is_read_back(content: dict[str, object]) -> None:
    text = dump_yaml(content)
    found = _parse(text)
    assert json.dumps(found) == json.dumps(content)


@given(number=finite)
def test_written_numbers_are_numbers_to_every_reader(number: float) -> None:
    # YAML 1.1 readers take 1e-08 for a word.
    text = dump_yaml({"lr": number})
    assert _parse(text) == yaml_1_1.safe_load(text) == {"lr": number}
    assert json.loads(text.removeprefix("lr: ")) == number


def test_keys_keep_their_order() -> None:
    assert dump_yaml({"b": 1, "a": {"d": 2, "c": 3}}) == "b: 1\na:\n  d: 2\n  c: 3\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "nested too deeply, or too large once its aliases are resolved"),
        ("a: &a {b: *a}", "nested too deeply"),
        ("[" * 80 + "]" * 80, "nested too deeply"),
        ("a: 2001-01-01", "a: a value of type date, neither text nor number"),
        ("a: [1, {b: 2001-01-01 10:00:00}]", "a.1.b: a value of type "),
        ("a: !!binary aGk=", "a: a value of type bytes"),
        ("a: !!set {b, c}", "a: a value of type set"),
        ("? [a, b]\n: 1", "a value of type "),
        ("a: !!timestamp x", "not valid YAML: "),
        ("a: !!int x", "not valid YAML: "),
        ("a: !!float x", "not valid YAML: "),
        ("a: 2001-99-99", "not valid YAML: "),
        (f"a: {'9' * 400}", "a: a whole number with hundreds of digits"),
        (f"a: {'9' * 5000}", "a: a whole number with hundreds of digits"),
        (f"a: 0x{'f' * 5000}", "a: a whole number with hundreds of digits"),
        (r'a: "\ud800"', "a: text with half a character in it"),
    ],
)
def test_what_is_not_plain_or_has_no_end_is_refused_by_its_key(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        _parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


def test_aliases_that_double_at_each_line_are_not_resolved() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    with pytest.raises(InputError, match="too large once its aliases are resolved"):
        _parse("\n".join(lines))
    assert _parse("a: &a {b: 1}\nc: [*a, *a]") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_merge_keys_are_refused_before_they_stand_for_anything() -> None:
    """Eight levels of nine would be 43 million keys."""
    levels = "".join(f"{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8))
    for text in ("a: &a {x: 1}\n" + levels, "a: {!!merge b: {x: 1}}"):
        with pytest.raises(InputError, match=r"a\.yaml: line [13]: not valid YAML: merge keys"):
            _parse(text)
    assert _parse('"<<": 1') == {"<<": 1}


@pytest.mark.parametrize("digits", ["9" * 6000, "0x" + "f" * 6000, "-" + "9" * 500])
def test_a_long_number_has_its_key(digits: str) -> None:
    with pytest.raises(InputError, match=r"a\.b: a whole number with hundreds of digits"):
        _parse(f"a: {{b: {digits}}}")


def test_a_key_that_is_given_twice_is_named() -> None:
    with pytest.raises(InputError, match=r"line 2: a b: this key is given twice"):
        _parse("a b: 1\na b: 2")
