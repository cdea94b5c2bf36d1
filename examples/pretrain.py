"""Pretrains with Megatron-LM's training loop: a script like its pretrain_gpt.py and pretrain_hybrid.py, shortest form.

It builds a GPT, or with --hybrid-layer-pattern a hybrid model. It knows nothing of μP; its flags are Megatron-LM's. μP
comes with the launcher:

    torchrun --nproc-per-node 8 -m mup_megatron.launch examples/pretrain.py … --mup-recipe gpt3.recipe.yaml

Needs `megatron.training` of Megatron-Core 0.19, as its wheel brings it. Left out: context parallelism, packed and
fine-tuning data, multi-token prediction. What a run without a GPU needs is in docs/cpu.md.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

FIELDS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


def datasets(samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test data. Every rank reads its own batches, so none has to be sent around."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


datasets.is_distributed = True  # asks Megatron to call it on every rank


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """The model's output for the next microbatch, and what makes a loss of it on the last pipeline stage."""
    sample = next(batches)
    batch = {name: sample[name].cuda(non_blocking=True) for name in FIELDS if name in sample}
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss, batch["loss_mask"])


def loss(mask: torch.Tensor, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The microbatch's summed loss, its number of tokens, and both for the log, which adds them up over all ranks."""
    total = torch.sum(per_token.view(-1).float() * mask.view(-1).float())
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


def main() -> None:
    if not Path(dataset_utils.__file__).with_name("Makefile").exists():
        # A wheel brings the compiled helpers, and leaves out the Makefile that Megatron-LM would run at start.
        dataset_utils.compile_helpers = lambda: None
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model = gpt_config_from_args(args) if args.hybrid_layer_pattern is None else hybrid_config_from_args(args)
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
