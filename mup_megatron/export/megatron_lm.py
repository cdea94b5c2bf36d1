"""Checkpoints of Megatron-LM that were saved with the plug-in on, in its formats `torch` and `torch_dist`.

Megatron's own arguments are in them, and among these the recipe. Reading one runs no code. Importing it imports
Megatron: the CPU runtime has to come before.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.checkpoint_recipe import SIDECAR
from mup_megatron.errors import InputError
from mup_megatron.export.distributed import StoredWeights
from mup_megatron.export.ranks import Layout, RankWeights, rank_files, rank_of, read_rank
from mup_megatron.export.weights import Source, Weights, require_fingerprint
from mup_megatron.files import read_text
from mup_megatron.megatron import stored
from mup_megatron.megatron.arguments.convert import model_from_values, not_in_model_file
from mup_megatron.megatron.pretrain import checkpoints
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, Tensor
from mup_megatron.training.checkpoint import EXTRAS, TRACKER
from mup_megatron.unpickling import read_torch

COMMON_FILE = "common.pt"
"""Where releases of Megatron-Core before 0.18 keep what is no tensor; the later ones keep it as an object."""
COMMON_OBJECT = "common_state/shard_0_1"
_FOLDER = re.compile(r"iter_\d{7,}|release")
_WITHOUT_EFFECT = frozenset({"--openai-gelu", "--qk-clip", "--mtp-detach-heads", "--logits-load-dir"})
"""Flags that Megatron-Core's models do not read, or that act in training alone."""


def checkpoint_at(path: Path) -> Path | None:
    """Returns the folder of one checkpoint: `path` itself, or the one that its tracker names; None without any."""
    if _FOLDER.fullmatch(path.resolve().name):
        return path
    try:
        said = read_text(path / TRACKER).strip()
    except InputError:
        return None
    named = said if said == "release" else f"iter_{int(said):07d}" if said.isdecimal() else None
    return None if named is None else path / named


def is_at(path: Path) -> bool:
    """Returns whether a checkpoint of Megatron-LM is at a path, by the names of its files."""
    folder = checkpoint_at(path)
    if folder is None or (folder / EXTRAS).exists():
        return False
    return bool(rank_files(folder)) or (folder / stored.METADATA).exists()


def open_megatron_lm(path: Path, recipe: Recipe, *, recipe_source: str) -> Source:
    """Returns the trained model of a checkpoint, for a model of other software.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.

    Raises:
        InputError: it is damaged, of another recipe or of none, or its model computes what a model file cannot say.
    """
    found = Opened(path, recipe, recipe_source=recipe_source)
    unsaid = [flag for flag in not_in_model_file(found.values) if flag not in _WITHOUT_EFFECT]
    if unsaid:
        raise InputError(
            f"{found.folder}: trained with {', '.join(unsaid)}, which the exported model would compute without. Fold "
            "it with `mup-megatron fold` and convert it with Megatron's own tools."
        )
    return found.source()


class Opened:
    """A checkpoint whose arguments, model and plan are known, and whose weights are not read yet."""

    folder: Path
    values: Mapping[str, Any]
    """Megatron's arguments."""
    model: ModelFile
    plan: Plan

    def __init__(self, path: Path, recipe: Recipe, *, recipe_source: str, folded: bool = False) -> None:
        """Looks at what the checkpoint says of itself.

        Raises:
            InputError: it is damaged, or of another recipe or of none; or it is folded and is not to be, or is not.
        """
        folder = checkpoint_at(path)
        assert folder is not None, path
        self.folder = folder
        self.remedy = f"Save it again, or write the number of another checkpoint into {folder.parent / TRACKER}."
        self.files = rank_files(folder)
        self.metadata = None if self.files else self._metadata()
        values = self._common().get("args")
        saved = checkpoints.recipe_within(values)
        if saved.recipe is None:
            raise InputError(
                f"{folder}: trained without a recipe, so that it has no multipliers: stock software computes it as it "
                "is. Convert it with Megatron's own tools."
            )
        require_fingerprint(
            recipe,
            str(saved.fingerprint),
            recipe_source=recipe_source,
            trained=folder,
            remedy=f"Give {SIDECAR} of that folder.",
        )
        if folded and not saved.folded:
            raise InputError(f"{path}: is not folded. Go on with it as it is.")
        if saved.folded and not folded:
            raise InputError(
                f"{folder}: its multipliers are folded into its weights, where they would act a second time. Give back "
                "the weights that were trained with `mup-megatron unfold`, and take those."
            )
        self.values = {**vars(values), "use_checkpoint_args": False}
        self.model = self._model(recipe)
        self.plan = recipe.plan(self.model)

    def source(self) -> Source:
        """Returns the model, whose weights are read one at a time."""
        return Source(
            model=self.model,
            plan=self.plan,
            weights=self.weights(),
            described=str(self.folder),
            folder=self.folder,
            tanh_gelu=tanh_gelu(self.values),
        )

    def _metadata(self) -> Metadata:
        if not (self.folder / "metadata.json").exists():
            raise InputError(
                f"{self.folder}: not in the format torch or torch_dist. Save it with --ckpt-format torch_dist "
                "(--ckpt-convert-format writes one in another format)."
            )
        names = [str(each.relative_to(self.folder)) for each in self.folder.rglob("*") if each.is_file()]
        metadata = stored.read_metadata(self.folder, files=names, remedy=self.remedy)
        stored.require_plain_objects(self.folder, metadata, remedy=self.remedy)
        return metadata

    def _common(self) -> Mapping[str, Any]:
        """Returns what is no tensor of the model, as the first rank has it."""
        if self.files:
            return read_rank(self.files[0], remedy=self.remedy)
        assert self.metadata is not None
        path = self.folder / COMMON_FILE
        if path.exists():
            found = read_torch(path, source=str(path), remedy=self.remedy)
        elif COMMON_OBJECT in self.metadata.state_dict_metadata:
            (found,) = stored.read_object(self.folder, self.metadata, COMMON_OBJECT, remedy=self.remedy)
        else:
            found = None
        if not isinstance(found, Mapping):
            raise InputError(f"{self.folder}: has no arguments of Megatron-LM in it. {self.remedy}")
        return found

    def _model(self, recipe: Recipe) -> ModelFile:
        """Returns the model file, with the vocabulary of the recipe's base where that is padded to the same size."""
        values = self.values
        model = model_from_values(
            values,
            vocab_size=values.get("padded_vocab_size"),
            source=f"the arguments in {self.folder}",
            release=core_version()[:2],
            custom=recipe.megatron_base.custom_tensors,
        )
        own = vocabulary(values, recipe.megatron_base.vocab_size, padded=model.vocab_size)
        return model.model_copy(update={"vocab_size": own, "make_vocab_size_divisible_by": 1})

    def weights(self) -> Weights:
        """Returns the model's tensors."""
        return (
            self.of_ranks() if self.metadata is None else StoredWeights(self.folder, self.metadata, remedy=self.remedy)
        )

    def of_ranks(self) -> RankWeights:
        """Returns the model's tensors where each rank has a file of its own."""
        layout = Layout.of(self.values)
        contents = {rank_of(path, layout): read_rank(path, remedy=self.remedy) for path in self.files}
        origins = [_origin(content) for content in contents.values()]
        for path, origin in zip(self.files, origins, strict=True):
            if origin != origins[0]:
                raise InputError(
                    f"{path}: of another iteration or run than {self.files[0].parent.name} beside it. Put the files of "
                    "one checkpoint into one folder."
                )
        experts = self.model.num_experts or 0
        return RankWeights(contents, self.plan, self.tensors, layout, experts=experts, source=str(self.folder))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The model's, with the parts of those that are fused."""
        _, shape = shapes_of(self.model, self.model)
        return tuple(shape.tensors)


def _origin(content: Mapping[str, Any]) -> tuple[object, str | None, bool]:
    """Returns what the files of all ranks of a checkpoint have in common."""
    saved = checkpoints.recipe_within(content.get("args"))
    return content.get("iteration"), saved.fingerprint, saved.folded


def vocabulary(values: Mapping[str, Any], own: int, *, padded: int) -> int:
    """Returns the tokens of a vocabulary: a recipe's own where these are padded to as many, else all with the padding.

    Args:
        values: Megatron's arguments, which say the tokens where the tokenizer had to be told.
        own: of the recipe's base.
        padded: rows of the table.
    """
    multiple = (values.get("make_vocab_size_divisible_by") or 1) * (values.get("tensor_model_parallel_size") or 1)
    fits = -(-own // multiple) * multiple == padded and (values.get("vocab_size") or 0) <= own
    return own if fits else padded


def tanh_gelu(values: Mapping[str, Any]) -> bool:
    """Returns whether Megatron computes GELU with tanh, as its fused kernel and Transformer Engine's do."""
    fused = values.get("bias_gelu_fusion", True) and values.get("add_bias_linear", True)
    return not values.get("swiglu") and bool(fused or values.get("use_te_activation_func"))
