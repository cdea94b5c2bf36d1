"""Whether llama.cpp computes an export as it was trained: log-probabilities of the next token, for each architecture.

    pip install xllamacpp
    python benchmarks/llama_cpp.py --llama-cpp PATH [--cases granite llama …]

PATH is a checkout of llama.cpp, of which the converter to GGUF and its gguf-py are used; what computes is the llama.cpp
in xllamacpp, which may be of another day. Models are those of the tests of exports, with every multiplier off 1 and a
made-up tokenizer. Weights and key-value cache are in single precision; the trained model in double.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from support.exported import KINDS, Kind, tokens, trained

from mup_megatron.export.export import export


def _with(name: str, *, grows: Mapping[str, int] | None = None, **keys: Any) -> Kind:
    kind = KINDS[name]
    return replace(kind, keys={**kind.keys, **keys}, wider={**kind.wider, **(grows or {})})


_WIDE: dict[str, Any] = {"ffn_hidden_size": 128, "grows": {"ffn_hidden_size": 128}}
CASES: dict[str, Kind] = {
    "granite": KINDS["granite"],
    "granite, tied": KINDS["granite tied"],
    "granite, biases": _with("granite", add_bias_linear=True),
    "granite, heads of their own size": _with("granite", kv_channels=12),
    "llama": KINDS["llama"],
    "llama, tied": KINDS["llama tied"],
    "llama, biases": KINDS["llama with biases"],
    "qwen3": _with("qwen3", add_qkv_bias=False),
    "qwen3, add_qkv_bias": KINDS["qwen3"],
    "gpt2": _with("gpt2", **_WIDE),
    "gpt2, untied": _with("gpt2 untied, without biases", **_WIDE),
    "gpt2, ffn of 2 × hidden": KINDS["gpt2"],
    "mixtral": KINDS["mixtral"],
    "mixtral, tied": _with("mixtral", untie_embeddings_and_output_weights=False),
    "deepseek_v3, eps 1e-6": _with("deepseek_v3", norm_epsilon=1e-6),
    "deepseek_v3, eps 1e-5": _with("deepseek_v3", norm_epsilon=1e-5),
    "deepseek_v3, eps 1e-2": KINDS["deepseek_v3"],
    "YaRN, mscale 1, mscale_all_dim 1": _with(
        "deepseek_v3 with YaRN", norm_epsilon=1e-6, mscale=1.0, mscale_all_dim=1.0
    ),
    "YaRN, mscale 0.8, mscale_all_dim 0.6": _with("deepseek_v3 with YaRN", norm_epsilon=1e-6),
    "YaRN, mscale 1, mscale_all_dim 0": _with(
        "deepseek_v3 with YaRN", norm_epsilon=1e-6, mscale=1.0, mscale_all_dim=0.0
    ),
}


def _made_up_tokenizer(conversion: Any) -> None:
    size = conversion.hparams["vocab_size"]
    writer = conversion.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(97 + number % 26) * (1 + number // 26) for number in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["a a"])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(size - 1)


def converted(folder: Path, to: Path) -> None:
    """Converts an export with llama.cpp's own converter."""
    conversion, gguf = (importlib.import_module(name) for name in ("conversion", "gguf"))
    (architecture,) = conversion.ModelBase.load_hparams(folder, False)["architectures"]
    own = conversion.get_model_class(architecture)
    whole = type(own.__name__, (own,), {"set_vocab": _made_up_tokenizer, "model_arch": own.model_arch})
    with torch.inference_mode():
        whole(folder, gguf.LlamaFileType.ALL_F32, to).write()


def largest(model: Path, given: Sequence[int], expected: torch.Tensor, *, flash: bool) -> float:
    """Returns the largest deviation of a log-probability behind several beginnings of the tokens that are given."""
    llama = importlib.import_module("xllamacpp")
    options = llama.CommonParams()
    options.model.path, options.n_ctx, options.warmup, options.n_gpu_layers = str(model), 256, False, 0
    options.cpuparams.n_threads, options.verbosity = 1, 0
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    kinds = llama.llama_flash_attn_type
    options.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(options)
    found = []
    for length in (1, len(given) // 2, len(given)):
        asked = {"prompt": given[:length], "n_predict": 1, "n_probs": expected.shape[-1], "temperature": 0.0}
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        (token,) = answer["choices"][0]["logprobs"]["content"]
        wanted = expected[length - 1]
        found += [abs(each["logprob"] - float(wanted[each["id"]])) for each in token["top_logprobs"]]
    return max(found)


def compared(name: str, folder: Path) -> str:
    """Returns a row of the table: deviations without flash attention and with it, or that it does not load."""
    model = trained(CASES[name])
    export(model.source(), folder / "export", architecture=CASES[name].architecture)
    converted(folder / "export", folder / "model.gguf")
    given = tokens(model.model)[:1]
    with torch.no_grad():
        logits = model.live.double()(given)[0, :, : model.model.vocab_size]
    cells = []
    for flash in (False, True):
        with suppress(RuntimeError):
            worst = largest(folder / "model.gguf", given[0].tolist(), logits.log_softmax(-1), flash=flash)
            cells.append(f"{worst:.1e}")
    return " | ".join(["", name, *(cells or ["does not load"] * 2), ""]).strip()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args()
    if not (chosen.llama_cpp / "conversion").is_dir():
        parser.error(f"--llama-cpp {chosen.llama_cpp}: no checkout of llama.cpp with a folder conversion/")
    if importlib.util.find_spec("xllamacpp") is None:
        parser.error("xllamacpp is not installed: pip install xllamacpp")
    sys.path[:0] = [str(chosen.llama_cpp / "gguf-py"), str(chosen.llama_cpp)]
    print("| model | largest deviation of a log-probability | with flash attention |\n|---|---|---|")
    for name in chosen.cases:
        with tempfile.TemporaryDirectory() as folder:
            print(compared(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
