"""The Hugging Face `Trainer` with self-driving: a tiny Llama from a configuration, on byte sums.

`CruxyTrainer` hands the loss over, tells the optimizer how many steps the run has, and evaluates
and saves the average of the parameters. Nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from cruxy_torch.integrations.huggingface import CruxyTrainer

CONFIG = LlamaConfig(
    vocab_size=128,  # ASCII
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
    bos_token_id=None,
    eos_token_id=None,
)


def windows() -> list[dict[str, torch.Tensor]]:
    """Sums, written out, as windows of 32 characters."""
    text = " ".join(f"{a} plus {b} is {a + b}." for a in range(20) for b in range(20))
    tokens = torch.tensor(list(text.encode()))
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints the loss on held-out windows before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/hf-trainer"),
        help="directory for the model (default: demo-output/hf-trainer)",
    )
    output = parser.parse_args(argv).output
    torch.manual_seed(0)
    rows = windows()
    trainer = CruxyTrainer(
        model=LlamaForCausalLM(CONFIG),
        args=TrainingArguments(
            output_dir=str(output),
            optim_args="mode=self_driving",  # no rate, no warm-up, no schedule, no max_grad_norm
            max_steps=150,
            per_device_train_batch_size=16,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows[::2],
        eval_dataset=rows[1::8],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    trainer.save_model()
    print(f"The average of the parameters is in {output}/")


if __name__ == "__main__":
    main()
