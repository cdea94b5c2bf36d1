"""Which programs of Megatron-LM build a GPT, and what the others are: known by the script's name.

Lists every program at the tags core_v0.16.1 to core_v0.19.0 that takes Megatron's flags. Without this, a BERT's line
reads like a GPT's.
"""

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path, PurePosixPath

from mup_megatron.errors import InputError


class Family(Enum):
    """What a program is to the plug-in."""

    GPT = "GPT"
    OTHER = "other"
    """Builds another model, or changes a GPT in a way that a plan does not know."""
    DATA = "data"
    """Builds no model that is trained."""
    OWN = "own"
    """None of Megatron-LM's: somebody's own."""


_GPT = """
pretrain_gpt.py finetune_gpt.py generate_samples_gpt.py gpt_dynamic_inference.py
gpt_dynamic_inference_with_coordinator.py gpt_static_inference.py offline_inference.py launch_inference_server.py
run_text_generation_server.py run_dynamic_text_generation_server.py run_inference_performance_test.py
report_theoretical_memory.py
""".split()

_HYBRID = "models with Mamba or other hybrid layers are not supported yet"
_BERT = "BERT models are not supported yet"
_T5 = "T5 models, of an encoder and a decoder, are not supported yet"
_MULTIMODAL = "multimodal models are not supported yet"
_VISION = "vision models are not supported yet"
_RETRIEVAL = "retrieval models, of several encoders, are not supported yet"
_RL = "reinforcement learning is not supported yet"
_MODELOPT = "ModelOpt changes the model (quantised, pruned, distilled), which is not supported yet"
_TASKS = "programs that evaluate or finetune on single tasks are not supported"
_NO_MODEL = "it trains no model"

OTHERS: dict[str, str] = {
    **dict.fromkeys(("pretrain_mamba.py", "pretrain_hybrid.py", "pretrain_hybrid_flex.py"), _HYBRID),
    "pretrain_bert.py": _BERT,
    **dict.fromkeys(("pretrain_t5.py", "simple_t5_batch_inference.py"), _T5),
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
    **dict.fromkeys(("tasks/main.py", "msdp/main.py"), _TASKS),
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
checkpoint/convert.py
""".split()

LAUNCHERS = frozenset({"mup_megatron.launch", "torch.distributed.run", "torch.distributed.launch"})
"""Modules that are started with -m and run a script."""


def script_of(words: Sequence[str]) -> tuple[str, int] | None:
    """The program that a line starts, as a script's path, and where its own words begin; None where there is none."""
    for index, word in enumerate(words):
        if word.endswith(".py") and not word.startswith("-"):
            return word, index + 1
        if word in ("-m", "--module") and index + 1 < len(words) and words[index + 1] not in LAUNCHERS:
            return f"{words[index + 1].replace('.', '/')}.py", index + 2
    return None


def family_of(script: str) -> Family:
    """What a script is, by its name."""
    if _find(script, OTHERS) is not None:
        return Family.OTHER
    if _find(script, _DATA) is not None:
        return Family.DATA
    return Family.GPT if _find(script, _GPT) is not None else Family.OWN


def require_gpt(script: str, *, source: str) -> None:
    """Raises InputError for a program of Megatron-LM's that builds no GPT; says what it is."""
    name = _find(script, OTHERS)
    if name is not None:
        raise InputError(
            f"{source}: {name}: {OTHERS[name]}, until a later release. Choose a GPT, as of pretrain_gpt.py."
        )
    name = _find(script, _DATA)
    if name is not None:
        raise InputError(f"{source}: {name}: {_NO_MODEL}. Give the line that trains.")


def scripts_in(path: Path) -> list[str]:
    """The Python scripts that a launch script names outside its comments, in order. It is not run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    bare = "\n".join(re.sub(r"(?:^|(?<=\s))#.*", "", line) for line in text.splitlines())
    return list(dict.fromkeys(re.findall(r"[\w./${}-]*\w\.py\b", bare)))


def _find(script: str, known: dict[str, str] | list[str]) -> str | None:
    """The entry for a script: one with its folder, or its bare name."""
    parts = PurePosixPath(script.replace("\\", "/")).parts
    for count in (2, 1):
        name = "/".join(parts[-count:])
        if name in known:
            return name
    return None
