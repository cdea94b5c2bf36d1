"""An architecture to export to is one file and its registration: one that is defined here goes the whole way."""

import ast
from pathlib import Path
from typing import ClassVar

import pytest
from support.exported import KINDS, deviation, loaded, trained

import mup_megatron
from mup_megatron.export.architectures import registry
from mup_megatron.export.architectures.llama import LlamaLike
from mup_megatron.export.export import export

PACKAGE = Path(mup_megatron.__file__).parent


class Mistral(LlamaLike):
    """A Llama by another name."""

    name: ClassVar[str] = "mistral"
    model_class: ClassVar[str] = "MistralForCausalLM"


def test_an_added_architecture_is_exported_as_the_trained_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(registry.targets(), "mistral", Mistral())  # type: ignore[arg-type] # what `register` fills
    model = trained(KINDS["llama"])
    export(model.source(), tmp_path / "exported", architecture="mistral")
    assert deviation(model, loaded(tmp_path / "exported")) < 1e-5


def test_nothing_of_an_export_names_an_architecture_but_its_own_file() -> None:
    names = set(registry.targets())
    elsewhere = {
        (path.relative_to(PACKAGE).as_posix(), node.value)
        for path in [*(PACKAGE / "export").glob("*.py"), PACKAGE / "cli/export.py", PACKAGE / "check/run_exported.py"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert elsewhere == set()
