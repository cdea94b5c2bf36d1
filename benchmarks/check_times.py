"""How long a check takes: of seven targets, from what is written in a model file or a Hugging Face configuration.

    python benchmarks/check_times.py [--levels quick standard] [--targets NAME …] [--processes N]

Prints a row for each target and level: the seconds that were predicted, those that it took, and those of all cores
together. References are measured anew. On an idle machine, or only the last column says something. Imports of torch,
Megatron-Core and transformers come before and are not counted.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.recipe import Recipe, load_recipe, recipe
from mup_megatron.training import ranks

CONFIGS = Path(__file__).parents[1] / "configs"
VALUES = {"lr": 0.004, "min_lr": 0.0004, "weight_decay": 0.1}
LLAMA = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
NARROW = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 1}
MEGATRON = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "ffn_hidden_size": 28672,
    "group_query_attention": True,
    "num_query_groups": 8,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
    "seq_length": 8192,
}

Check = Callable[..., Verdict]


def _gpt3(name: str) -> Check:
    from mup_megatron.check.run_megatron import check_megatron

    target = load_model_file(CONFIGS / "models" / f"{name}.yaml")
    own = load_recipe(CONFIGS / "recipes" / "gpt3_6.7b.recipe.yaml")
    return lambda **more: check_megatron(target, own, references=None, **more)


def _megatron_llama() -> Check:
    from mup_megatron.check.run_megatron import check_megatron

    narrow = {"hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 1, "ffn_hidden_size": 3584}
    own = recipe({"base": {**MEGATRON, **narrow}, "hyperparameters": VALUES}, source="check_times.py")
    return lambda **more: check_megatron(ModelFile(**MEGATRON), own, references=None, **more)


def _hugging_face(kind: str, target: dict[str, Any], base: dict[str, Any]) -> Check:
    import transformers

    from mup_megatron.check.run_huggingface import check_hugging_face
    from mup_megatron.huggingface import configs

    def made(keys: dict[str, Any]) -> Any:
        config = transformers.AutoConfig.for_model(kind, **keys)
        config.architectures = [{"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[kind]]
        return config

    own: Recipe = recipe(
        {"base": configs.base_content(made({**target, **base})), "hyperparameters": VALUES}, source="check_times.py"
    )
    return lambda **more: check_hugging_face(made(target), own, **more)


TARGETS: dict[str, Callable[[], Check]] = {
    "gpt3_125m": lambda: _gpt3("gpt3_125m"),
    "gpt3_6.7b": lambda: _gpt3("gpt3_6.7b"),
    "gpt3_175b": lambda: _gpt3("gpt3_175b"),
    "megatron_llama_70b": _megatron_llama,
    "hf_llama_70b": lambda: _hugging_face("llama", LLAMA, NARROW),
    "hf_llama3_8b": lambda: _hugging_face(
        "llama",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "hf_gpt2_xl": lambda: _hugging_face(
        "gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, {"n_embd": 256, "n_head": 4}
    ),
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=["quick", "standard"], default=["quick", "standard"])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    ranks.preload()
    print("| target | level | outcome | predicted | seconds | seconds of all cores |\n|---|---|---|---|---|---|")
    for name in arguments.targets:
        check = TARGETS[name]()
        for level in arguments.levels:
            said: list[str] = []
            begun, before = time.monotonic(), os.times()
            verdict = check(level=Level(level), processes=arguments.processes, tell=said.append)
            after, seconds = os.times(), time.monotonic() - begun
            cores = sum(after[:4]) - sum(before[:4])
            predicted = said[0].rpartition(": ")[2].removesuffix(" on this machine")
            print(f"| {name} | {level} | {verdict.outcome} | {predicted} | {seconds:.0f} | {cores:.0f} |", flush=True)


if __name__ == "__main__":
    main()
