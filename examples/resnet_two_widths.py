"""ResNet: find a learning rate at a small width, use it at four times the width.

    python examples/resnet_two_widths.py

Pictures of digits, drawn here in eleven fonts, turned, shifted and covered with noise. The learning rate is searched at
16 channels; then a ResNet of 64 is trained with the same one, once under μP and once in the standard parametrization,
which is PyTorch's and transformers' own. Neighbours of that learning rate are tried too, to see whether a better one
was missed. Half a minute on two free cores. The table and the picture go into results/examples/.
"""

import argparse
import math
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several runs at a time, each on a core of its own

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import ResNetConfig, ResNetForImageClassification
from two_widths import Experiment, main

from mup_megatron.huggingface import apply_plan, base_content, check_optimizer, param_groups, plan_for
from mup_megatron.recipe import recipe

SMALL, WIDE = 16, 64
SIZE, BATCH, NOISE = 24, 64, 0.3
# These come with matplotlib, so the pictures are the same on every machine.
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Italic "
    "STIXGeneral STIXGeneralBol cmr10 cmss10 cmtt10"
).split()


def config(width: int) -> ResNetConfig:
    """Two stages of one block. The width is the number of channels at the start; the second stage has twice as many."""
    return ResNetConfig(
        num_channels=1,
        embedding_size=width,
        hidden_sizes=[width, 2 * width],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
        architectures=["ResNetForImageClassification"],
    )


def adam_with_mup(model: ResNetForImageClassification, lr: float) -> torch.optim.Adam:
    """What μP adds to a training script. `lr` is the one for the small width; every parameter gets its own from it."""
    tuned = recipe(
        {"base": base_content(config(SMALL)), "hyperparameters": {"lr": lr, "weight_decay": 0.0}}, source="example"
    )
    plan = plan_for(model, tuned)
    apply_plan(model, plan)  # initial weights, multipliers
    groups = param_groups(model.named_parameters(), plan)  # learning rates, eps
    optimizer = torch.optim.Adam(groups, betas=tuned.moved.betas)
    check_optimizer(optimizer, plan, model)
    return optimizer


@cache
def digits(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and which digit is on each."""
    rng = np.random.default_rng(seed)
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", points) for name in FONTS for points in (14, 17, 20)]
    labels = rng.integers(10, size=number)
    pictures = np.empty((number, 1, SIZE, SIZE), dtype=np.float32)
    for picture, label in zip(pictures, labels, strict=True):
        canvas = Image.new("L", (SIZE, SIZE))
        center = tuple(SIZE / 2 + rng.uniform(-3, 3, size=2))
        font = fonts[rng.integers(len(fonts))]
        ImageDraw.Draw(canvas).text(center, str(label), fill=255, font=font, anchor="mm")
        picture[0] = np.asarray(canvas.rotate(rng.uniform(-25, 25), resample=Image.Resampling.BILINEAR)) / 255
    pictures += rng.normal(scale=NOISE, size=pictures.shape)
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def run(width: int, lr: float, mup: bool, steps: int) -> float:
    """The loss of a trained ResNet on pictures that it has not seen; NaN if it diverged."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config(width))
    optimizer = adam_with_mup(model, lr) if mup else torch.optim.Adam(model.parameters(), lr=lr)
    # Any schedule will do that multiplies the learning rate of every group by the same number.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    pictures, labels = digits(4096, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        loss = model(pixel_values=pictures[chosen], labels=labels[chosen]).loss
        if not math.isfinite(loss.item()):
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    pictures, labels = digits(1024, seed=1)
    with torch.no_grad():
        return float(model(pixel_values=pictures, labels=labels).loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main(
        parser,
        Experiment(
            name="resnet",
            title="ResNet, pictures of digits with Adam",
            small=SMALL,
            wide=WIDE,
            learning_rates=[2.0**e for e in range(-9, -2)],
            factors=(0.0625, 0.125, 0.25, 0.5, 1.0, 2.0),
            steps=80,
            run=run,
        ),
    )
