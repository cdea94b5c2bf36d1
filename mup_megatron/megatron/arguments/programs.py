"""The programs of Megatron-LM: which builds what, and which are none of ours, known by the script's name.

With those that architectures name as theirs, every program at the tags core_v0.16.1 to core_v0.19.0 that takes
Megatron's flags, and those of older releases and forks that many lines name. Without this, a BERT's line reads like a
GPT's.
"""

import re
from collections.abc import Container, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.registry import architectures
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.table import every


class ProgramKind(Enum):
    """The kinds of programs that the plug-in tells apart."""

    SUPPORTED = "supported"
    """Builds a model of an architecture that is known."""
    OTHER = "other"
    """Builds another model, or changes one in a way that a plan does not know."""
    DATA = "data"
    """Builds no model that is trained."""
    OWN = "own"
    """None of Megatron-LM's: somebody's own."""


_FLEXTRON = "hybrid models whose layers have several sizes are not supported"
_MULTIMODAL = "multimodal models are not supported yet"
_VISION = "vision models are not supported yet"
_RETRIEVAL = "retrieval models, of several encoders, are not supported yet"
_RL = "reinforcement learning is not supported yet"
_MODELOPT = "ModelOpt changes the model (quantised, pruned, distilled), which is not supported yet"
_TASKS = "programs that evaluate or finetune on single tasks are not supported"
_PREFIX = "prefix language models and non-causal decoders are not supported yet"
_NO_MODEL = "it trains no model"

OTHERS: dict[str, str] = {
    "pretrain_hybrid_flex.py": _FLEXTRON,
    **dict.fromkeys(
        (
            "pretrain_vlm.py",
            "run_vlm_text_generation.py",
            "vision_model_tester.py",
            "pretrain_mimo.py",
            "avlm_inference.py",
            "multimodal/train.py",
            "multimodal/run_text_generation.py",
            "mimo/train.py",
        ),
        _MULTIMODAL,
    ),
    **dict.fromkeys(("pretrain_vision_classify.py", "pretrain_vision_dino.py", "pretrain_vision_inpaint.py"), _VISION),
    **dict.fromkeys(("pretrain_ict.py", "pretrain_realm.py", "pretrain_retro.py"), _RETRIEVAL),
    **dict.fromkeys(
        (
            "tasks/main.py",
            "msdp/main.py",
            "vision/main.py",
            "msdp/evaluate.py",
            "orqa/evaluate_orqa.py",
            "eval_harness/evaluate.py",
            "zeroshot_gpt/evaluate.py",
        ),
        _TASKS,
    ),
    **dict.fromkeys(("pretrain_prefix_lm.py", "finetune_t0_non_causal_decoder.py"), _PREFIX),
    "text_generation_ptq.py": _MODELOPT,
    **dict.fromkeys(("train_rl.py", "benchmark_refit.py"), _RL),
    **dict.fromkeys(
        [
            f"modelopt/{name}.py"
            for name in (
                "convert_model export finetune generate mmlu offline_feature_extract prune quantize validate".split()
            )
        ],
        _MODELOPT,
    ),
}
"""Script → why it is refused. A name that many programs have is known by its folder as well."""

_DATA = """
preprocess_data.py preprocess_data_nmt.py preprocess_mmdata.py build_sequences_per_dataset.py prepare_cache.py
checkpoint/convert.py merge_mp_partitions.py analyze_data.py create_doc_index.py build_retro_db.py merge_datasets.py
checkpoint_util.py hf2megads_weight_converter.py deepspeed_to_megatron.py deepspeed_to_transformers.py
inspect_checkpoint.py inspect_deepspeed_checkpoint.py cleanup_dataset.py
""".split()

LAUNCHERS = frozenset({"mup_megatron.launch", "torch.distributed.run", "torch.distributed.launch"})
"""Modules that are started with -m and run a script."""

_SCRIPT = re.compile(r"\.pyc?\Z", re.IGNORECASE)
_MODEL_ELSEWHERE = ("--use-checkpoint-args", "--yaml-cfg")
"""Flags after which a line need not say what its model is."""


def programs_of(words: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the scripts and modules that a line names before a model's flags, and where each one's own words begin.

    The last of them is the program: those before it start it, or belong to a launcher's option.
    """
    found: list[tuple[str, int]] = []
    read = {flag.name for flag in every()}
    for index, word in enumerate(words):
        option = word.startswith("-")
        if option and (word.partition("=")[0] in read or (found and kind_of(found[-1][0]) is ProgramKind.SUPPORTED)):
            break
        before = words[index - 1] if index else ""
        module = word[2:] if re.fullmatch(r"-m\w.*", word) else word if before in ("-m", "--module") else ""
        if module:
            found += [] if module in LAUNCHERS else [(_file_of(module), index + 1)]
        elif not option and (_SCRIPT.search(word) or (not before.startswith("-") and _is_known(f"{word}.py"))):
            found.append((_SCRIPT.sub(".py", word) if _SCRIPT.search(word) else f"{word}.py", index + 1))
    return found


def _file_of(module: str) -> str:
    return _SCRIPT.sub(".py", module) if _SCRIPT.search(module) else f"{module.replace('.', '/')}.py"


def script_of(words: Sequence[str]) -> tuple[str, int] | None:
    """The program that a line starts, as a script's path, and where its own words begin; None where there is none."""
    found = programs_of(words)
    if not found:
        return None
    script, begin = found[-1]
    # Of a program that nobody knows, what looks like a later one may be the value of a flag.
    return script, begin if _is_known(script) else found[0][1]


def _is_known(script: str) -> bool:
    return kind_of(script) is not ProgramKind.OWN


def kind_of(script: str) -> ProgramKind:
    """Returns the kind of a script, by its name."""
    if _find(script, OTHERS) is not None:
        return ProgramKind.OTHER
    if _find(script, _DATA) is not None:
        return ProgramKind.DATA
    return ProgramKind.SUPPORTED if builds(script) is not None else ProgramKind.OWN


def builds(script: str) -> Architecture | None:
    """Returns the architecture that a program of Megatron-LM's builds, if it is one that is known."""
    known = {program: each for each in architectures().values() for program in each.command_line.programs}
    name = _find(script, known)
    return None if name is None else known[name]


def require_supported(script: str, *, source: str) -> None:
    """Raises InputError for a program of Megatron-LM's that builds no model that is supported; says what it is."""
    name = _find(script, OTHERS)
    if name is not None:
        raise InputError(
            f"{source}: {name}: {OTHERS[name]}, until a later release. Choose a GPT, as of pretrain_gpt.py."
        )
    name = _find(script, _DATA)
    if name is not None:
        raise InputError(f"{source}: {name}: {_NO_MODEL}. Give the line that trains.")


def require_flags(script: str, flags: Sequence[str], *, source: str) -> None:
    """Raises InputError if a program of Megatron-LM's is given another model's flags, or lacks those of its own."""
    architecture = builds(script)
    if architecture is None:
        return
    names = [word.partition("=")[0] for word in flags]
    program = PurePosixPath(script.replace("\\", "/")).name
    for other in architectures().values():
        own = next((flag.name for flag in other.command_line.own_flags if flag.name in names), None)
        if other is not architecture and own is not None:
            raise InputError(
                f"{source}: {own}: a flag of {other.description}, and {program} builds {architecture.description}. Use "
                f"{other.command_line.programs[0]}, or drop the flag."
            )
    for key, asked in architecture.command_line.keys.items():
        if key in architecture.command_line.optional:
            continue
        if not any(flag.name in names for flag in asked) and not any(each in names for each in _MODEL_ELSEWHERE):
            raise InputError(
                f"{source}: {program} builds {architecture.description}, and {asked[0].name} is missing. Give it."
            )


def scripts_in(path: Path) -> list[str]:
    """Returns the Python scripts that a launch script names outside its comments, in order. It is not run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    bare = "\n".join(re.sub(r"(?:^|(?<=\s))#.*", "", line) for line in text.splitlines())
    return list(dict.fromkeys(re.findall(r"[\w./${}-]*\w\.py\b", bare)))


def _find(script: str, known: Container[str]) -> str | None:
    """Returns the entry for a script: one with its folder, or its bare name."""
    parts = PurePosixPath(script.replace("\\", "/").lower()).parts
    for count in (2, 1):
        name = "/".join(parts[-count:])
        if name in known:
            return name
    return None
