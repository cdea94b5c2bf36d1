"""Damage that the fuzzer does to files: one function per kind of file, told what to do by a seeded generator.

Every mutator changes a file, or a folder of files, in place, and says in a few words what it did.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import re
import sqlite3
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

Mutator = Callable[[Random, Path], str]
"""Changes what lies at the path and describes the change."""

CANARY = "ran-code"
"""The folder that a malicious file makes where its code runs: relative, so within the case's own folder."""

ODD_CHARACTERS = (
    *("\u00a0", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\ufeff", "\u200b", "\u202e", "\x00", "\x1b", "\t", "\r"),
    *("é", "μ", "Ω", "😀", "\u0e43", "\u3000", "\x7f", "\x1c", "’", "−"),
)
EXTREME_NUMBERS = (
    *("0", "-1", "1", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("-9223372036854775809", "1e308", "1e999", "-1e999", "1e-320", "nan", "inf", "-inf", "0.5", "-0.0", "1_000"),
    *("99999999999999999999999999999999", "1e3", "0x10", "٣", "1,5", "9" * 400, "9" * 5000),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**25, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "auto", "1", "nan", "\u00a0", "é" * 40, "x" * 3000, "../../../etc/passwd", "!!python/name:os.system"),
    *([], {}, [0], [None], {"a": 1}, [[[]]], {"": {}}, [1, "x", None, {}]),
)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def damage_bytes(random: Random, path: Path) -> str:
    """Flips, cuts, doubles, inserts or removes bytes."""
    data = bytearray(path.read_bytes())
    what = random.choice(("flip", "cut", "empty", "remove", "double", "insert", "zeros", "not UTF-8", "delete"))
    at = random.randrange(len(data) + 1)
    length = random.choice((1, 2, 8, 64, 1000))
    match what:
        case "flip" if data:
            for _ in range(random.choice((1, 1, 4, 64))):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case "cut":
            del data[at:]
        case "empty":
            data.clear()
        case "remove":
            del data[at : at + length]
        case "double":
            data[at:at] = data[at : at + length]
        case "zeros":
            data[at : at + length] = bytes(length)
        case "not UTF-8":
            data[at:at] = random.choice((b"\xff\xfe", b"\x80", b"\xc3", b"\xed\xa0\x80"))
        case "delete":
            path.unlink()
            return f"{path.name}: deleted"
        case _:
            data[at:at] = random.randbytes(length)
    path.write_bytes(data)
    return f"{path.name}: {what} at byte {at}"


def damage_text(random: Random, path: Path) -> str:
    """Odd characters, extreme numbers, lines and words that are lost, doubled or moved; now and then bytes."""
    if random.random() < 0.2:
        return damage_bytes(random, path)
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = text.split("\n")
    at = random.randrange(len(lines))
    what = random.choice(("character", "character", "number", "number", "line", "words", "long", "swap", "spaces"))
    match what:
        case "character":
            where = random.randrange(len(text) + 1)
            text = text[:where] + random.choice(ODD_CHARACTERS) * random.choice((1, 1, 3)) + text[where:]
        case "number":
            numbers = list(re.finditer(r"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?(?![\w.])", text))
            if numbers:
                chosen = random.choice(numbers)
                text = text[: chosen.start()] + random.choice(EXTREME_NUMBERS) + text[chosen.end() :]
        case "line":
            lines[at : at + 1] = [] if random.random() < 0.5 else [lines[at]] * 2
            text = "\n".join(lines)
        case "swap":
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
            text = "\n".join(lines)
        case "words":
            words = re.split(r"(\s+)", text)
            where = random.randrange(len(words))
            words[where] = random.choice(("", words[random.randrange(len(words))], words[where] * 2))
            text = "".join(words)
        case "long":
            where = random.randrange(len(text) + 1)
            text = text[:where] + random.choice(("[", "{", "(", "x", "--a ", "\n", "'", "$(")) * 2000 + text[where:]
        case "spaces":
            text = text.replace(" ", random.choice(ODD_CHARACTERS), random.choice((1, 3, -1)))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return f"{path.name}: {what}"


# ---- values --------------------------------------------------------------------------------------------------------


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Every place within nested dictionaries and lists, as container and key."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += [(value, key), *places_of(value[key])]
    return found


def damaged_value(random: Random, value: Any) -> tuple[Any, str]:
    """A copy of nested plain values with one place changed, removed, renamed or nested."""
    value = copy.deepcopy(value)
    places = places_of(value)
    if not places or random.random() < 0.05:
        return random.choice(_VALUES), "replaced whole"
    container, key = random.choice(places)
    what = random.choice(("replace", "replace", "replace", "remove", "rename", "add", "nest", "type", "copy"))
    match what:
        case "remove":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[f"{key}{random.choice(('x', '_', ' ', ODD_CHARACTERS[0], ODD_CHARACTERS[6]))}"] = container.pop(
                key
            )
        case "add":
            if isinstance(container, dict):
                container[random.choice(("extra", "", "mup", "version", "name"))] = random.choice(_VALUES)
            else:
                container.append(random.choice(_VALUES))
        case "nest":
            container[key] = [container[key]] if random.random() < 0.5 else {"x": container[key]}
        case "type":
            container[key] = _of_another_type(container[key])
        case "copy":
            other, other_key = random.choice(places)
            with contextlib.suppress(LookupError):
                container[key] = copy.deepcopy(other[other_key])
        case _:
            container[key] = random.choice(_VALUES)
    return value, f"{what} {str(key)[:40]!r}"


def _of_another_type(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return float(value) if abs(value) < 2**53 else str(value)
    if isinstance(value, float):
        return str(value)
    if isinstance(value, str):
        return [value]
    return json.dumps(value, default=str)


def damage_json(random: Random, path: Path) -> str:
    """Changes one value of a JSON file; now and then its text: doubled keys, nesting without end, bytes."""
    drawn = random.random()
    if drawn < 0.2:
        return damage_text(random, path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return damage_bytes(random, path) if path.is_file() else f"{path.name}: is gone"
    if drawn < 0.24:
        deep = random.choice(("[", '{"a":')) * random.choice((500, 100_000))
        path.write_text(deep, encoding="utf-8")
        return f"{path.name}: nested deep"
    if drawn < 0.28 and isinstance(content, dict) and content:
        key = random.choice(list(content))
        doubled = json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(random.choice(_VALUES))}}}"
        path.write_text(doubled, encoding="utf-8")
        return f"{path.name}: {key!r} twice"
    value, what = damaged_value(random, content)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return f"{path.name}: {what}"


def damage_json_lines(random: Random, path: Path) -> str:
    """Changes one line of a .jsonl file as a JSON file of its own."""
    if random.random() < 0.3:
        return damage_text(random, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    at = random.randrange(len(lines))
    single = path.with_name(".line.json")
    single.write_text(lines[at], encoding="utf-8")
    what = damage_json(random, single)
    with contextlib.suppress(OSError):
        lines[at] = single.read_text(encoding="utf-8", errors="replace").replace("\n", " ")
        single.unlink()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path.name}: line {at + 1}, {what}"


def damage_yaml(random: Random, path: Path) -> str:
    """Changes one value of a YAML file, or its text."""
    if random.random() < 0.3:
        return damage_text(random, path)
    yaml = YAML(typ="safe", pure=True)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"))
    except Exception:  # an earlier mutation has made it something else
        return damage_bytes(random, path) if path.is_file() else f"{path.name}: is gone"
    value, what = damaged_value(random, content)
    stream = io.StringIO()
    yaml.dump(value, stream)
    path.write_text(stream.getvalue(), encoding="utf-8")
    return f"{path.name}: {what}"


def damage_words(random: Random, words: Sequence[str], numbers_of: Sequence[str]) -> tuple[list[str], str]:
    """A command line with one number replaced by an extreme one.

    Args:
        random: chooses.
        words: the command line.
        numbers_of: the flags whose value may be replaced; they are added where they are missing.
    """
    flag, number = random.choice(list(numbers_of)), random.choice(EXTREME_NUMBERS)
    changed = list(words)
    if flag in changed:
        changed[changed.index(flag) + 1] = number
    else:
        changed[1:1] = [flag, number] if "--" not in words[:1] else []
    return changed, f"{flag} {number[:40]}"


# ---- pickles and what holds them -----------------------------------------------------------------------------------


class RunsCode:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def damage_metadata(random: Random, path: Path) -> str:
    """Changes the pickle `.metadata` of a checkpoint: its bytes, its values, or for one that runs code."""
    what = random.choice(("bytes", "values", "values", "code", "code within", "another class"))
    if what == "bytes" or not path.is_file():
        return damage_bytes(random, path) if path.is_file() else f"{path.name}: is gone"
    try:
        metadata = pickle.loads(path.read_bytes())
        state: Any = metadata.state_dict_metadata
        storage: Any = metadata.storage_data
    except Exception:  # an earlier mutation has made it something else
        return damage_bytes(random, path)
    match what:
        case "code":
            path.write_bytes(pickle.dumps(RunsCode()))
            return f"{path.name}: runs code"
        case "another class":
            path.write_bytes(pickle.dumps(random.choice((io.BytesIO(b"x"), Random(1), {"a": 1}, [metadata], None))))
            return f"{path.name}: {what}"
        case "code within":
            place = random.choice(("planner_data", "storage_meta", "extra", "state", "storage"))
            if place == "state":
                state[random.choice(list(state))] = RunsCode()
            elif place == "storage":
                storage[random.choice(list(storage))] = RunsCode()
            else:
                setattr(metadata, place, RunsCode())
            path.write_bytes(pickle.dumps(metadata))
            return f"{path.name}: runs code in {place}"
    holder = random.choice((metadata, random.choice(list(state.values())), random.choice(list(storage.values()))))
    if isinstance(holder, type(metadata)) and random.random() < 0.5:
        entries = random.choice((state, storage))
        key = random.choice(list(entries))
        replaced = random.choice(("remove", "value"))
        if replaced == "remove":
            del entries[key]
        else:
            entries[key] = random.choice((*entries.values(), None, 1, "x"))
        what = f"entry {replaced}"
    else:
        names = list(vars(holder)) or ["extra"]
        name = random.choice(names)
        vars(holder)[name] = random.choice((*_VALUES, (1, 2), (-1,), "../r.yaml", "__0_1.distcp"))
        what = f"{type(holder).__name__}.{name}"
    with contextlib.suppress(Exception):  # some values cannot be pickled in their place
        path.write_bytes(pickle.dumps(metadata))
    return f"{path.name}: {what}"


def damage_stored_object(random: Random, folder: Path) -> str:
    """Replaces an object in a checkpoint's data by another one, one that runs code among them."""
    import torch

    path = folder / ".metadata"
    try:
        metadata = pickle.loads(path.read_bytes())
        objects = [key for key in metadata.storage_data if "BytesStorage" in type(
            metadata.state_dict_metadata.get(key.fqn)).__name__]  # fmt: skip
        chosen = metadata.storage_data[random.choice(objects)]
        file = folder / chosen.relative_path
        data = file.read_bytes()
        old = torch.load(io.BytesIO(data[chosen.offset : chosen.offset + chosen.length]), weights_only=False)
    except Exception:  # an earlier mutation has made it something else
        return damage_bytes(random, path) if path.is_file() else f"{path.name}: is gone"
    new: Any
    if random.random() < 0.4:
        new, what = [RunsCode()], "runs code"
    else:
        new, what = damaged_value(random, old)
    stream = io.BytesIO()
    torch.save(new, stream)
    chosen.offset, chosen.length = len(data), len(stream.getvalue())
    file.write_bytes(data + stream.getvalue())
    path.write_bytes(pickle.dumps(metadata))
    return f"{file.name}: an object {what}"


def damage_npy(random: Random, path: Path) -> str:
    """Changes a numpy file: its bytes, its numbers, its shape, or for a pickle that runs code."""
    import numpy as np

    what = random.choice(("bytes", "code", "numbers", "shape", "type"))
    if what == "bytes":
        return damage_bytes(random, path)
    if what == "code":
        objects = np.empty(1, dtype=object)
        objects[0] = RunsCode()
        np.save(path, objects, allow_pickle=True)
        return f"{path.name}: runs code"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return f"{path.name}: not an array any more"
    if what == "numbers" and array.size:
        array.flat[random.randrange(array.size)] = random.choice((0, -1, 1, 2**30))
    elif what == "shape":
        array = random.choice((array[:0], array[:-1], array.reshape(-1), array[None]))
    else:
        array = array.astype(random.choice((np.float64, np.int8, np.int64)))
    np.save(path, array)
    return f"{path.name}: {what}"


# ---- several files that belong together ------------------------------------------------------------------------------


def damage_checkpoint(random: Random, root: Path) -> str:
    """Changes one part of a checkpoint of `train --save`, mostly with a manifest that agrees afterwards."""
    tracker = root / "latest_checkpointed_iteration.txt"
    if random.random() < 0.08:
        return damage_text(random, tracker)
    folder = sorted(root.glob("iter_*"))[-1]
    parts = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choice(parts)
    drawn = random.random()
    if drawn < 0.15:
        what = damage_stored_object(random, folder)
    elif drawn < 0.3 or path.name == ".metadata":
        what = damage_metadata(random, folder / ".metadata")
    elif path.suffix == ".json":
        what = damage_json(random, path)
    elif path.suffix == ".yaml":
        what = damage_yaml(random, path)
    elif path.suffix == ".csv":
        what = damage_text(random, path)
    else:
        what = damage_bytes(random, path)
    if path.name != "files.json" and random.random() < 0.9:
        agree_with_files(folder)
        what += ", manifest agrees"
    return what


def agree_with_files(folder: Path) -> None:
    """Writes a checkpoint's manifest anew, so that sizes and hashes are those of its files."""
    manifest = folder / "mup" / "files.json"
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != manifest:
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text(json.dumps(files), encoding="utf-8")


_INDEX = struct.Struct("<9sQBQQ")


def damage_data(random: Random, prefix: Path) -> str:
    """Changes one of the files at a PREFIX of `mup-megatron data`: so that they contradict each other, or agree."""
    import numpy as np

    names = [prefix.parent / (prefix.name + suffix) for suffix in (".bin", ".idx", ".json")]
    what = random.choice(("file", "file", "tokens", "lengths", "type", "documents", "header"))
    if what == "file":
        path = random.choice(names)
        return damage_json(random, path) if path.suffix == ".json" else damage_bytes(random, path)
    if what == "tokens":
        tokens = np.fromfile(names[0], dtype=np.uint16)
        tokens[random.randrange(len(tokens))] = random.choice((257, 300, 301, 65535))
        tokens.tofile(names[0])
        return f"{names[0].name}: a token beyond the vocabulary"
    data = names[1].read_bytes()
    magic, version, code, sequences, entries = _INDEX.unpack_from(data)
    lengths = np.frombuffer(data, np.int32, sequences, _INDEX.size).copy()
    documents = np.frombuffer(data, np.int64, entries, _INDEX.size + 12 * sequences).copy()
    agree = random.random() < 0.7
    match what:
        case "lengths":
            lengths[random.randrange(sequences)] = random.choice((0, -1, -5, 2**31 - 1, 1))
        case "documents":
            documents[random.randrange(entries)] = random.choice((0, -1, 10**6, 1))
        case "type":
            code = random.choice((1, 2, 3, 4, 5, 6, 7, 9, 0, 255))
        case "header":
            sequences, entries = random.choice(((0, 1), (2**60, entries), (sequences, 2**62), (sequences - 1, entries)))
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
    width = sizes.get(code, 2)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * (width if agree else 2)
    if agree and what in ("type", "lengths"):
        size = max(0, min(int(lengths.sum(dtype=np.int64)) * width, 1 << 20))
        held = names[0].read_bytes()
        names[0].write_bytes((held * (1 + size // max(1, len(held))))[:size])
    header = _INDEX.pack(magic, version, code, sequences, entries)
    names[1].write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    return f"{names[1].name}: {what}, {'agrees' if agree else 'contradicts'}"


def damage_study(random: Random, path: Path) -> str:
    """Changes a row, a value or a table of an Optuna study's SQLite file; now and then its bytes."""
    if random.random() < 0.1:
        return damage_bytes(random, path)
    texts = ("null", "[]", "{}", "1", '"x"', "", "{", "NaN", '{"a": 1}', "COMPLETE", "RUNNING", "WAITING", "FAIL", "x")
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            table = random.choice(tables)
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            rows = database.execute(f"SELECT rowid FROM {table}").fetchall()
            while not rows and random.random() < 0.9:
                table = random.choice(tables)
                columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
                rows = database.execute(f"SELECT rowid FROM {table}").fetchall()
            what = random.choice(("value", "value", "value", "json", "json", "row", "drop", "column", "double"))
            column = random.choice(columns)
            if what == "drop":
                database.execute(f"DROP TABLE {table}")
            elif what == "column":
                database.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO other")
            elif rows:
                row = random.choice(rows)[0]
                if what == "row":
                    database.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
                elif what == "double":
                    others = [name for name in columns if not name.endswith("_id") or name in ("study_id", "trial_id")]
                    listed = ", ".join(others[1:] or others)
                    database.execute(
                        f"INSERT INTO {table} ({listed}) SELECT {listed} FROM {table} WHERE rowid = ?", (row,)
                    )
                else:
                    value = random.choice((*texts, None, 0, -1, 1.5, 2**40, b"\xff\xfe", "9" * 30))
                    if what == "json" or column.endswith("json"):
                        held = database.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()[0]
                        with contextlib.suppress(TypeError, ValueError):
                            value = json.dumps(damaged_value(random, json.loads(held))[0])
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row))
            database.commit()
    except sqlite3.Error as error:
        return f"{path.name}: unchanged ({error})"
    return f"{path.name}: {what} in {table}.{column}"


KINDS: dict[str, Mutator] = {
    "bytes": damage_bytes,
    "checkpoint": damage_checkpoint,
    "data": damage_data,
    "json": damage_json,
    "jsonl": damage_json_lines,
    "npy": damage_npy,
    "study": damage_study,
    "text": damage_text,
    "yaml": damage_yaml,
}
"""By the name that the table of targets uses."""
