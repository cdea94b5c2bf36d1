"""Opening a database without harm to what is there."""

import sqlite3
from pathlib import Path

import optuna
import pytest

from mup_megatron.errors import InputError
from mup_megatron.search.storage import default_storage, open_storage


def opened(url: str, create: bool = True) -> None:
    with open_storage(url, create=create):
        pass


def refused(url: str, create: bool = True) -> str:
    with pytest.raises(InputError) as refusal, open_storage(url, create=create):
        pass
    return str(refusal.value)


def test_file_and_folders_are_made_and_optuna_reads_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a/b/study.db"
    opened(url)
    assert optuna.get_all_study_names(url) == []


def test_nothing_is_made_when_only_reading(tmp_path: Path) -> None:
    assert "study.db: no such file" in refused(f"sqlite:///{tmp_path}/a/study.db", create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"not a database, but longer than a SQLite header is\n" * 20, b"SQLite format 3\0"]
)
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "study.db"
    file.write_bytes(content)
    message = refused(f"sqlite:///{file}")
    assert str(file) in message
    assert "--storage" in message
    assert file.read_bytes() == content


def test_a_damaged_database_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    opened(f"sqlite:///{file}")
    content = file.read_bytes()
    damaged = content[: len(content) // 2]
    file.write_bytes(damaged)
    assert str(file) in refused(f"sqlite:///{file}")
    assert file.read_bytes() == damaged


def test_another_programs_database_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE cookies (name TEXT)")
    db.close()
    content = file.read_bytes()
    assert "another program's database" in refused(f"sqlite:///{file}")
    assert file.read_bytes() == content


def test_an_empty_file_is_a_new_database(tmp_path: Path) -> None:
    """It is what a process leaves that is killed while it creates one."""
    (tmp_path / "study.db").touch()
    opened(f"sqlite:///{tmp_path}/study.db")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "its folder cannot be made" in refused(f"sqlite:///{tmp_path}/file/study.db")
    assert "not a file" in refused(f"sqlite:///{tmp_path}/folder")


@pytest.mark.parametrize("url", ["results/study.db", "", "sqlite:///a{b}.db", "nosuchdatabase://host/db"])
def test_what_is_no_url_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--storage" in refused(url)


def test_passwords_are_not_shown() -> None:
    message = refused("nosuchdatabase://user:secret@host/db")
    assert "secret" not in message
    assert "user" in message


def test_the_default_is_a_file_named_as_the_study() -> None:
    assert default_storage("first-try_2.0") == "sqlite:///results/first-try_2.0.db"


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "a?b"])
def test_a_name_that_is_no_file_name_has_no_default(name: str) -> None:
    with pytest.raises(InputError, match="--study"):
        default_storage(name)
