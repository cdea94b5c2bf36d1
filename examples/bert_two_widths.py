"""BERT: find a learning rate at a small width, use it at four times the width.

    python examples/bert_two_widths.py

Masked language modelling on bytes of Python's own source. The learning rate is searched at width 64; then a BERT of
width 256 is trained with the same one, once under μP and once in the standard parametrization, which is PyTorch's and
transformers' own. Neighbours of that learning rate are tried too, to see whether a better one was missed.
A minute and a half on two free cores. The table and the picture go into results/examples/.
"""

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several runs at a time, each on a core of its own

import torch
from transformers import BertConfig, BertForMaskedLM
from two_widths import Experiment, main

from mup_megatron.huggingface import apply_plan, base_content, check_optimizer, param_groups, plan_for
from mup_megatron.recipe import recipe

SMALL, WIDE = 64, 256
LENGTH, BATCH = 16, 64
VOCABULARY, MASK, MASKED_SHARE = 129, 128, 0.15  # ASCII, and a token for what is hidden
INIT_STD, WEIGHT_DECAY = 0.1, 0.01


def config(width: int) -> BertConfig:
    """Two layers. More width means more heads of the same size."""
    return BertConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 16,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        initializer_range=INIT_STD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        architectures=["BertForMaskedLM"],
    )


def adamw_with_mup(model: BertForMaskedLM, lr: float) -> torch.optim.AdamW:
    """What μP adds to a training script. `lr` is the one for the small width; every parameter gets its own from it."""
    tuned = recipe(
        {
            "base": base_content(config(SMALL)),
            "hyperparameters": {"lr": lr, "init_method_std": INIT_STD, "weight_decay": WEIGHT_DECAY},
        },
        source="example",
    )
    plan = plan_for(model, tuned)
    apply_plan(model, plan)  # initial weights, multipliers
    groups = param_groups(model.named_parameters(), plan)  # learning rates, eps, weight decay
    optimizer = torch.optim.AdamW(groups, betas=tuned.moved.betas)
    check_optimizer(optimizer, plan, model)
    return optimizer


def text() -> torch.Tensor:
    """Text that every machine has: the modules of Python's standard library, as bytes."""
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    tokens = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in library)), dtype=torch.uint8)
    return tokens[tokens < MASK].long()


def batch(tokens: torch.Tensor, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random pieces, some tokens of which are hidden and have to be guessed."""
    start = torch.randint(len(tokens) - LENGTH, (size, 1), generator=generator)
    piece = tokens[start + torch.arange(LENGTH)]
    hidden = torch.rand(piece.shape, generator=generator) < MASKED_SHARE
    return {"input_ids": piece.masked_fill(hidden, MASK), "labels": piece.masked_fill(~hidden, -100)}


def run(width: int, lr: float, mup: bool, steps: int) -> float:
    """The loss of a trained BERT on text that it has not seen; NaN if it diverged."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertForMaskedLM(config(width))
    if mup:
        optimizer = adamw_with_mup(model, lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    warmup = max(1, steps // 10)
    # Any schedule will do that multiplies the learning rate of every group by the same number.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    tokens = text()
    seen, unseen = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(**batch(seen, BATCH, generator)).loss
        if not math.isfinite(loss.item()):
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(model(**batch(unseen, 2048, torch.Generator().manual_seed(2))).loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main(
        parser,
        Experiment(
            name="bert",
            title="BERT, masked language modelling with AdamW",
            small=SMALL,
            wide=WIDE,
            learning_rates=[2.0**e for e in range(-10, -5)],
            factors=(0.25, 0.5, 1.0, 2.0),
            steps=200,
            run=run,
        ),
    )
