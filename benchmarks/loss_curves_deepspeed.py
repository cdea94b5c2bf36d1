"""Trains a small GPT-2 for ten steps with DeepSpeed and writes its losses as hexadecimal floats; for loss_curves.py."""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

MODEL = Path(__file__).parents[1] / "examples" / "deepspeed_gpt2" / "gpt2_256.json"


def main() -> None:
    """Trains, and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=int(os.environ["LOCAL_RANK"]))
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**json.loads(MODEL.read_text(encoding="utf-8"))))
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(10):
        shape = (engine.train_micro_batch_size_per_gpu(), model.config.n_positions)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().item().hex())
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
