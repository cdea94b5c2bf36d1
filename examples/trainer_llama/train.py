"""Trains a Llama with the Hugging Face Trainer and DeepSpeed ZeRO-3 on bytes of Python's own source.

Of μP it has one import. The rest comes with the entry "mup" of the JSON configuration: run.sh runs it with and without.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import mup_megatron.deepspeed  # noqa: F401  (without an entry "mup" in the configuration it changes nothing)

LENGTH = 64


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Text that every machine has: the modules of Python's standard library, as bytes."""

    def __init__(self) -> None:
        library = sorted(Path(os.__file__).parent.glob("*.py"))
        tokens = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in library)), dtype=torch.uint8)
        self.pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH).long()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def main() -> None:
    """Trains, and prints the mean loss of the last steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--config", required=True, help="DeepSpeed's JSON configuration")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--output", default="results/examples/trainer_llama")
    args = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=args.output,
        deepspeed=args.config,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=0.016,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=min(10, args.steps),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    set_seed(arguments.seed)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(args.model.read_text())))
    trainer = Trainer(model=model, args=arguments, train_dataset=Text())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"width {model.config.hidden_size}: mean loss of the last 10 steps {losses[-1]:.4f}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # so that no thread of gloo has a tensor in hand when Python ends
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
