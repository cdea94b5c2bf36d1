"""Pretrains a BERT with Megatron-LM's training loop as Megatron-LM's program of this name does, on made-up text.

Its name is what tells the plug-in that it builds a BERT. It knows nothing of μP.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args


def model_provider(pre_process: bool = True, post_process: bool = True, **more: Any) -> Any:
    args = get_args()
    assert args.spec == ["local"]
    return BertModel(
        config=more.get("config") or core_transformer_config_from_args(args),
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        add_binary_head=args.bert_binary_head,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=more.get("vp_stage"),
    )


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up, three tokens of which are replaced."""

    def __init__(self, args: argparse.Namespace, samples: int) -> None:
        self.length, self.vocabulary, self.samples = args.seq_length, args.vocab_size, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        labels = (torch.randint(self.vocabulary, (), generator=generator) + torch.arange(self.length)) % self.vocabulary
        where = torch.randperm(self.length, generator=generator)[:3]
        text, mask = labels.clone(), torch.zeros(self.length)
        text[where], mask[where] = 0, 1.0
        return {"text": text, "labels": labels, "mask": mask, "order": torch.randint(2, (), generator=generator)}


def datasets(samples: tuple[int, int, int], vp_stage: int | None = None) -> list[Text]:
    return [Text(get_args(), max(1, count)) for count in samples]


datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    batch = {name: value.cuda() for name, value in next(batches).items()}
    types = torch.zeros_like(batch["text"]) if get_args().bert_binary_head else None
    output = model(batch["text"], torch.ones_like(batch["text"]), tokentype_ids=types, lm_labels=batch["labels"])
    return output, partial(loss, batch)


def loss(batch: dict[str, torch.Tensor], output: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    per_token, order = output
    found = (per_token.float() * batch["mask"]).sum() / batch["mask"].sum()
    if order is not None:
        found = found + torch.nn.functional.cross_entropy(order.float(), batch["order"])
    return found, {"lm loss": found.detach().clone()}


if __name__ == "__main__":
    dataset_utils.compile_helpers = lambda: None
    config = pretrain_cfg_container_from_args(parse_and_validate_args(args_defaults={}))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step, model_provider=model_provider)
