"""Trains the reference model here and compares every bit with what is published.

Where a bit differs, the first step, tensor and operation that does is named.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cruxy_exact.checksum import DEFINITION, checksum, to_bytes
from cruxy_exact.driven import Driven
from cruxy_exact.engines import choose
from cruxy_exact.reference import Reference, State

PUBLISHED = Path(__file__).with_name("published.json")
"""The checksums, what each was seen on, and a short one of each operation's result."""
STEPS = 50
SIDES = {"torch": "cruxy_torch.exact", "jax": "cruxy_optax.exact"}
"""Where a framework's own exact layers are."""
LAWS = ("driving", "usual")
"""Modules of `cruxy_control` that say what a law's orders mean, and what is usual."""

_MISSING = "device must be one that {} has here, got 'cuda' where it sees none; use 'cpu'."

Records = list[tuple[str, str]]


@dataclasses.dataclass
class Framework:
    """An array namespace, and what has to be around a step in it.

    Attributes:
        name: `"numpy"`, `"torch"` or `"jax"`.
        xp: the namespace.
        like: an array on the device.
        around: a context that every call needs.
        compiled: makes a function a compiled one.
        wait: until an array is there.
    """

    name: str
    xp: Any
    like: Any
    around: Callable[[], Any]
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    wait: Callable[[Any], Any] = lambda x: x


def framework(name: str, device: str = "cpu", *, native: bool = True) -> Framework:
    """The framework of a name, which has to be installed.

    Args:
        name: `"numpy"`, `"torch"` or `"jax"`.
        device: `"cpu"` or `"cuda"`.
        native: whether PyTorch on CPU takes the C kernels, where they are built.

    Raises:
        ValueError: where there is no such framework or device.
        ImportError: where the framework is not installed.
    """
    if name == "numpy" and device == "cpu":
        numpy = importlib.import_module("numpy")
        quiet = lambda: numpy.errstate(all="ignore")  # noqa: E731
        return Framework(name, numpy, numpy.zeros(1, numpy.float32), quiet)
    if name == "torch":
        torch = importlib.import_module("torch")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(_MISSING.format(name))
        xp = importlib.import_module(SIDES[name]).namespace(device) if native else torch
        like = torch.zeros(1, dtype=torch.float32, device=device)
        return Framework(name, xp, like, torch.no_grad)
    if name == "jax":
        jax = importlib.import_module("jax")
        try:
            place = jax.devices("gpu" if device == "cuda" else device)[0]
        except RuntimeError as error:
            raise ValueError(_MISSING.format(name)) from error
        xp = importlib.import_module("jax.numpy")

        @contextlib.contextmanager
        def around():
            with jax.enable_x64(True), jax.default_device(place):
                yield

        with around():
            like = xp.zeros(1, xp.float32)
        return Framework(name, xp, like, around, jax.jit, jax.block_until_ready)
    raise ValueError(
        f"framework must be numpy (on the cpu), torch or jax, got {name!r} on {device!r}; use "
        "--framework torch."
    )


def train(
    where: Framework, reference: Reference, steps: int, *, recorded: bool = False, data: Any = None
) -> tuple[State, list[Records], list[float]]:
    """Trains the reference model.

    Args:
        where: the framework.
        reference: the model.
        steps: how many.
        recorded: keeps a short checksum of every operation's result.
        data: in place of the reference's own.

    Returns:
        The last state, the records of each step, and the seconds that each took.
    """
    names: list[str] = []

    def step(state: State, count: Any) -> tuple[State, list[Any]]:
        found: list[tuple[str, Any]] = []
        record = (lambda name, value: found.append((name, value))) if recorded else None
        new, _ = reference.step(state, count, xp=where.xp, record=record, data=data)
        names[:] = [name for name, _ in found]
        return new, [value for _, value in found]

    records, seconds = [], []
    with where.around():
        state = reference.start(where.like, xp=where.xp)
        call = where.compiled(step) if data is None else step
        for count in range(steps):
            begun = time.perf_counter()
            state, values = call(state, count)
            where.wait(state)
            seconds.append(time.perf_counter() - begun)
            pairs = zip(names, values, strict=True)
            records.append([(name, short(name, value, where.xp)) for name, value in pairs])
    return state, records, seconds


def short(name: str, value: Any, xp: Any) -> str:
    """Four hexadecimal digits of one result."""
    return hashlib.sha256(to_bytes(name, value, xp=xp)).hexdigest()[:4]


def self_driving() -> Driven:
    """What `Reference.driver` is for a self-driving run.

    The laws are not this package's: like a framework they are found by their name.
    """
    rules, usual = (importlib.import_module(f"cruxy_control.{name}") for name in LAWS)
    law = usual.usual_law("adam", ends=False)
    return Driven(law, rules, True, usual.USUAL["adam"].relative_limit, 16.0)


def key(reference: Reference) -> str:
    """The name under which a reference is published."""
    name = f"{DEFINITION} bits={reference.precision.bits} grain={reference.grain}"
    return name if reference.driver is None else f"{name} optimizer=self-driving"


def published() -> dict[str, Any]:
    """What is published, by `key`."""
    return json.loads(PUBLISHED.read_text("utf-8"))


def published_of(reference: Reference) -> dict[str, Any]:
    """What is published of a reference.

    Raises:
        ValueError: where nothing is.
    """
    rows = published()
    if key(reference) not in rows:
        raise ValueError(
            f"a published reference must be verified, got {key(reference)!r}; there are "
            f"{', '.join(map(repr, rows))}."
        )
    return rows[key(reference)]


def of(where: Framework, reference: Reference, state: State) -> str:
    """The checksum of the parameters, and of their averages where they are kept."""
    bits, grain = reference.precision.bits, reference.grain
    averages = {f"average.{name}": x for name, x in dict(state.averages).items()}
    with where.around():
        return checksum({**state.params, **averages}, bits=bits, grain=grain, xp=where.xp)


def verify(
    where: Framework, reference: Reference, *, steps: int = STEPS, expected: Any = None
) -> tuple[str, str]:
    """Trains the reference model and compares it.

    Args:
        where: the framework.
        reference: the model. Its engine is self-tested, and replaced with a warning if it fails.
        steps: 50 unless the table that is compared with has fewer.
        expected: a table as `table` makes it; what is published unless given.

    Returns:
        The checksum, and where the first difference lies: empty where there is none.
    """
    with where.around():
        precision = choose(reference.precision, where.like, xp=where.xp)
    reference = dataclasses.replace(reference, precision=precision)
    expected = expected or published().get(key(reference))
    state, _, _ = train(where, reference, steps)
    found = of(where, reference, state)
    if expected is None:
        return found, f"nothing is published for {key(reference)!r}"
    if found == expected["checksum"]:
        return found, ""
    return found, difference(where, reference, expected, steps)


def difference(where: Framework, reference: Reference, expected: Any, steps: int) -> str:
    """The first step, tensor and operation whose bits are not the expected ones, in one line."""
    if "operations" not in expected:
        return f"it is not {expected['checksum']}, and no table of its operations is published"
    _, records, _ = train(where, reference, steps, recorded=True)
    for count, (record, line) in enumerate(zip(records, expected["steps"], strict=True)):
        wanted = [line[4 * i : 4 * i + 4] for i in range(len(line) // 4)]
        for (name, got), want in zip(record, wanted, strict=True):
            if got != want:
                return f"the first difference is in step {count}: {name}"
    return (
        "every operation is right where its result is kept: the compiler changes bits when it "
        "joins them"
    )


def table(where: Framework, reference: Reference, steps: int = STEPS) -> dict[str, Any]:
    """What is published of a reference: its checksum, and its operations' short ones."""
    state, records, _ = train(where, reference, steps, recorded=True)
    return {
        "checksum": of(where, reference, state),
        "operations": [name for name, _ in records[0]],
        "steps": ["".join(digits for _, digits in record) for record in records],
    }


def describe(where: Framework, reference: Reference) -> dict[str, str]:
    """What a run was seen on, as published checksums name it.

    Args:
        where: the framework.
        reference: the model, whose engine is named.

    Returns:
        The framework with its version, the device, the processor, its instruction sets of those
        that compilers choose between, the system, the engine, and what limits the instruction sets.
    """
    version = importlib.import_module(where.name).__version__
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return {
        "framework": f"{where.name} {version}",
        "device": _device(where),
        "processor": _of_processor("model name") or platform.processor() or platform.machine(),
        "instruction sets": " ".join(x for x in SETS if x in _of_processor("flags").split()),
        "system": f"{platform.system()} {platform.machine()}",
        "engine": reference.precision.engine,
        "limited by": " ".join(limits),
    }


SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
"""Instruction sets that change how float or integer products are computed."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "XLA_FLAGS", "OPENBLAS_CORETYPE",
          "OMP_NUM_THREADS")  # fmt: skip
"""Variables of the environment that limit them, or the number of threads."""


def _device(where: Framework) -> str:
    """The name of a GPU, else what the framework calls the device."""
    device: Any = getattr(where.like, "device", "cpu")
    if where.name == "torch" and device.type == "cuda":
        return importlib.import_module("torch").cuda.get_device_name(device)
    is_gpu = getattr(device, "platform", "") == "gpu"
    return device.device_kind if is_gpu else str(device).lower()


def _of_processor(field: str) -> str:
    """A field of the first processor, where the system has such a list; else empty."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(values, "")


def slowdown(where: Framework, reference: Reference, steps: int = 10) -> tuple[float, float]:
    """Seconds of an exact step and of a plain one, the median of some; the first is left out.

    Raises:
        ValueError: where the framework brings no plain step.
    """
    if where.name not in SIDES:
        raise ValueError(f"there is no plain step in {where.name}; use --framework torch or jax.")
    side = importlib.import_module(SIDES[where.name])
    _, _, exact = train(where, reference, steps + 1)
    plain = side.plain_step(reference, where.like)
    seconds = []
    for count in range(steps + 1):
        begun = time.perf_counter()
        plain(count)
        seconds.append(time.perf_counter() - begun)
    return tuple(sorted(times[1:])[steps // 2] for times in (exact, seconds))  # pyright: ignore
