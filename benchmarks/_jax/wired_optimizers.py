"""Optimizers on several workers of one process, whose gradients go over a compressed wire."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks._jax.optimizers import matrices
from benchmarks._rates import RATES, WEIGHT_DECAY, scaled
from cruxy_control import Meta3
from cruxy_exact import BlockCode
from cruxy_optax import average_gradients, meta3, meta_lion
from cruxy_optax._distributed.compressed import OF_THE_MEAN, Wire, cut, exchanged, gathered, join

AXIS = "data"
"""Over which `jax.vmap` lays the workers."""

STILL = Meta3(
    phase_strength=0.0,
    beta1_gain=0.0,
    beta2_phase_strength=0.0,
    rate_gain=0.0,
    beta2_gain=0.0,
    clip_threshold=None,
)
"""A law that orders nothing: what is left of Meta-Lion is Lion, and a guard."""


class Wired(NamedTuple):
    """An optimizer to compare, as `Optimizer`, that sees each worker's own gradients.

    Attributes:
        label: for tables and plots.
        make: from the rate and the number of steps to a transformation under `jax.vmap` with
            `AXIS`, which gives the same updates on all workers.
        skipped: optimizer state to the number of steps a guard skipped.
        sources: patterns of the files that define it.
        scale: of its grid of rates to `RATES`.
        default: the rate that it comes with.
        workers: into how many a batch is split.
        engine: the module that trains it.
        grid: the rates to try, before `scale`.
    """

    label: str
    make: Callable[[Any, int], optax.GradientTransformation]
    skipped: Callable[[Any], Any]
    sources: tuple[str, ...]
    scale: float = 1.0
    default: float = 1e-3
    workers: int = 4
    engine: str = "wires"
    grid: tuple[float, ...] = RATES

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return scaled(self.grid, self.scale)


class FeedbackState(NamedTuple):
    """The counter of random bits and what both phases have left over."""

    count: jax.Array  # shape=(), dtype=int32
    own: jax.Array  # of what this worker sent; float32, (workers, blocks, 256)
    mean: jax.Array  # of the mean that it sent to all; float32, (1, blocks, 256)


def average_with_feedback(bits: int, workers: int) -> optax.GradientTransformation:
    """`average_gradients` that adds what coding has lost to the next gradient, in both phases.

    References:
        Tang et al., [1-bit Adam](https://arxiv.org/abs/2102.02888), 2021, algorithm 1.
    """

    def init_fn(params: Any) -> FeedbackState:
        own = jnp.zeros_like(cut(params, workers))
        return FeedbackState(jnp.zeros((), jnp.int32), own, own[:1])

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, FeedbackState]:
        del params
        wire = Wire(BlockCode(bits, signed=True), state.count, 0)
        rows, rank = cut(updates, workers) + state.own, lax.axis_index(AXIS)
        messages = wire.encode(rows, 0, rank)
        total = wire.decode(exchanged(messages, AXIS)).sum(0)
        mean = (total / workers)[None] + state.mean
        message = wire.encode(mean, rank * rows.shape[1], OF_THE_MEAN)
        state = FeedbackState(
            state.count + 1, rows - wire.decode(messages), mean - wire.decode(message)
        )
        return join(wire.decode(gathered(message[0], AXIS)), updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def _averaged(
    average: Callable[[], optax.GradientTransformation], make: Callable[..., Any]
) -> Callable[[Any, int], optax.GradientTransformation]:
    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        inner = make(rate, weight_decay=WEIGHT_DECAY, mask=matrices, axis_names=AXIS)
        return optax.chain(average(), inner)

    return build


def _voted(law: Meta3) -> Callable[[Any, int], optax.GradientTransformation]:
    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        return meta_lion(rate, weight_decay=WEIGHT_DECAY, mask=matrices, law=law, vote=AXIS)

    return build


def wired(sources: tuple[str, ...], skipped: Callable[[Any], Any]) -> dict[str, Wired]:
    """The entries by name.

    Args:
        sources: of our optimizers.
        skipped: see `Wired`.
    """
    sources = (*sources, "benchmarks/_jax/wired_optimizers.py", "benchmarks/_jax/wires.py")
    lion = {"skipped": skipped, "sources": sources, "scale": 0.1, "default": 1e-4}
    makes = {"meta3": (meta3, "Meta3", 1.0), "meta_lion": (meta_lion, "Meta-Lion", 0.1)}
    entries = {}
    for name, (make, label, scale) in makes.items():
        for bits in (8, 4):
            plain = functools.partial(average_gradients, AXIS, bits)
            fed = functools.partial(average_with_feedback, bits, 4)
            for suffix, words, average in (
                ("", "", plain),
                ("-feedback", " and error feedback", fed),
            ):
                entries[f"{name}-wire{bits}{suffix}"] = Wired(
                    f"{label}, wire of {bits} bits{words}",
                    _averaged(average, make),
                    skipped,
                    sources,
                    scale,
                    1e-3 * scale,
                )
    return entries | {
        "lion-vote": Wired("Lion by vote", _voted(STILL), **lion),
        "meta_lion-vote": Wired("Meta-Lion by vote", _voted(Meta3()), **lion),
    }
