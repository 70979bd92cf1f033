"""What a run will need: bytes of parameters, gradients, state and the compiled step, beforehand."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_control.memory import NAMES, Model, Sizes, read


@dataclasses.dataclass(frozen=True)
class MemoryEstimate(Sizes):
    """Bytes a training run takes; `print` shows them as a table.

    Every attribute can also be read as `estimate["state"]`, and `dict(estimate)` has all of them.

    Attributes:
        parameter_count: number of parameters.
        parameters: bytes of the parameters.
        gradients: bytes of one gradient of each, in its parameter's dtype.
        state: bytes of the optimizer's state.
        arguments: bytes of what the compiled step takes, on one device; `None`, as all that follow,
            where no step was given.
        outputs: bytes of what it returns.
        temporaries: bytes it needs in between: activations and gradients.
        reused: bytes of outputs that take the place of donated arguments.
        peak: `arguments + outputs + temporaries - reused`.
        device_bytes: of the device that the recommendation is for; `None` for none.
        find_model: gives `model`.
        find_ways: gives `ways`.
    """

    parameter_count: int
    parameters: int
    gradients: int
    state: int
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    reused: int | None = None
    peak: int | None = None
    device_bytes: int | None = dataclasses.field(default=None, repr=False)
    find_model: Callable[[], Model] = dataclasses.field(
        default=functools.partial(Model, 0, ()), repr=False, compare=False
    )
    find_ways: Callable[[], Mapping[str, int]] = dataclasses.field(
        default=dict, repr=False, compare=False
    )

    @functools.cached_property
    def model(self) -> Model:
        """What decides how much the weights take in few bits."""
        return self.find_model()

    @functools.cached_property
    def ways(self) -> Mapping[str, int]:
        """Bytes of weights, gradients and state in each way to train, the best first."""
        return self.find_ways()

    def keys(self) -> tuple[str, ...]:
        """The names that can be read as `estimate[name]`."""
        return (*NAMES, *_COUNTED)

    def __getitem__(self, name: str) -> Any:
        return read(self, self.keys(), name)

    def __str__(self) -> str:
        rows = [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer state", self.state),
        ]
        if self.peak is not None:
            rows += [
                ("compiled step: arguments", self.arguments),
                ("  + outputs", self.outputs),
                ("  + temporaries", self.temporaries),
                ("  - outputs in place of arguments", self.reused),
                ("  = peak", self.peak),
            ]
        lines = [f"{'':34}{'bytes':>20}{'a parameter':>14}"]
        for name, size in rows:
            share = f"{size / self.parameter_count:.3f}" if self.parameter_count else "-"
            lines.append(f"{name:34}{size:>20,}{share:>14}")
        return "\n".join(lines)


_COUNTED = tuple(f.name for f in dataclasses.fields(MemoryEstimate) if f.repr)


def count_memory(
    tx: optax.GradientTransformation, params: Any, train_step: Any, args: Sequence[Any]
) -> MemoryEstimate:
    """Counts the bytes of a run, see `cruxy_optax.estimate_memory`."""
    state = jax.eval_shape(tx.init, params)
    sizes = [_bytes(leaf) for leaf in jax.tree.leaves(params) if _is_inexact(leaf)]
    counted = MemoryEstimate(
        parameter_count=sum(leaf.size for leaf in jax.tree.leaves(params)),
        parameters=tree_bytes(params),
        gradients=sum(sizes),
        state=tree_bytes(state),
    )
    if train_step is None:
        return counted
    compiled = _compiled(train_step, (params, state, *args), given=bool(args))
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            "train_step was compiled for a backend that gives no memory analysis, "
            f"{jax.default_backend()!r}; leave train_step out, or compile for cpu, gpu or tpu."
        )
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    temporaries, reused = analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
    return dataclasses.replace(
        counted,
        arguments=arguments,
        outputs=outputs,
        temporaries=temporaries,
        reused=reused,
        peak=arguments + outputs + temporaries - reused,
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, with its sharding where it has one, and none of its memory."""
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf), jnp.result_type(leaf), sharding=getattr(leaf, "sharding", None)
    )


def _compiled(train_step: Any, args: tuple[Any, ...], *, given: bool) -> jax.stages.Compiled:
    if isinstance(train_step, jax.stages.Lowered | jax.stages.Compiled):
        if given:
            raise TypeError(
                "args must be left out where train_step is lowered or compiled, which fixes its "
                f"arguments, got {type(train_step).__name__}; give the jitted function, or no args."
            )
        lowered = train_step
        return lowered.compile() if isinstance(lowered, jax.stages.Lowered) else lowered
    if not callable(train_step):
        raise TypeError(
            "train_step must be a function train_step(params, opt_state, *args), lowered or "
            f"compiled, got {train_step!r}; give jax.jit(step, donate_argnums=(0, 1))."
        )
    jitted: Any = train_step if hasattr(train_step, "lower") else jax.jit(train_step)
    return jitted.lower(*args).compile()
