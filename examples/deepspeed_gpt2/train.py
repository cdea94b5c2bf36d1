"""Trains a GPT-2 with DeepSpeed on bytes of Python's own source. It knows nothing of μP.

What it is told by its JSON configuration it does, so μP comes with one entry there: run.sh runs it with and without.
"""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel


def text() -> torch.Tensor:
    """Text that every machine has: the modules of Python's standard library, as bytes."""
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in library)), dtype=torch.uint8)


def batches(length: int, size: int, seed: int) -> "torch.utils.data.DataLoader[torch.Tensor]":
    """Pieces of the text, in a random order; each process has its own."""
    tokens = text()
    pieces = tokens[: len(tokens) // length * length].view(-1, length).long()
    sampler = torch.utils.data.DistributedSampler(pieces, seed=seed)
    return torch.utils.data.DataLoader(pieces, size, sampler=sampler, drop_last=True)


def main() -> None:
    """Trains, and prints the mean loss of the last ten steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--local_rank", type=int, default=int(os.environ["LOCAL_RANK"]))
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**json.loads(args.model.read_text())))
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())

    losses = []
    data = batches(model.config.n_positions, engine.train_micro_batch_size_per_gpu(), seed=0)
    for _, batch in zip(range(args.steps), data, strict=False):
        tokens = batch.to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        if dist.get_rank() == 0 and len(losses) % 20 == 0:
            print(f"step {len(losses):3d}  loss {losses[-1]:.4f}", flush=True)
    if dist.get_rank() == 0:
        last = losses[-10:]
        print(f"width {model.config.n_embd}: mean loss of the last {len(last)} steps {sum(last) / len(last):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
