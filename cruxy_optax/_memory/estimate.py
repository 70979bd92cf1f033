"""What a run will need: bytes of parameters, gradients, state and the compiled step, beforehand."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MemoryEstimate(NamedTuple):
    """Bytes a training run takes; `print` shows them as a table.

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


def estimate_memory(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    train_step: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled | None = None,
    args: Sequence[Any] = (),
) -> MemoryEstimate:
    """Says what training will take, before anything is allocated.

    Parameters, gradients and state are counted from shapes and are exact. Given a training step,
    it is compiled, not run, and XLA's own analysis gives the peak of that program: activations,
    gradients and whatever the compiler keeps at once. What else lives on the device, such as the
    next batch, is not in it.

    Args:
        tx: the optimizer; any optax transformation.
        params: the parameters, or `jax.ShapeDtypeStruct`s of them, as `jax.eval_shape` gives.
        train_step: called as `train_step(params, opt_state, *args)`. Where it is not under
            `jax.jit` it is compiled without donating anything; with
            `jax.jit(step, donate_argnums=(0, 1))` the new parameters and state take the place of
            the old ones, as they should. A step with other arguments is given lowered or compiled,
            `jax.jit(step).lower(...)`.
        args: further arguments of the step, such as a batch; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The bytes. Those of parameters, gradients and state are of all devices together; those of
        the compiled step are of one device.

    Raises:
        TypeError: where `train_step` cannot be called, or `args` come with a step that has its
            own already.
        ValueError: where the compiler's backend gives no analysis.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
        >>> tx = optax.adamw(1e-3)
        >>> print(cruxy_optax.estimate_memory(tx, params))
                                                         bytes   a parameter
        parameters                                   1,048,576         4.000
        gradients                                    1,048,576         4.000
        optimizer state                              2,097,156         8.000
        >>> def step(params, opt_state, x):
        ...     grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> step = jax.jit(step, donate_argnums=(0, 1))
        >>> batch = jax.ShapeDtypeStruct((8, 512), jnp.float32)
        >>> memory = cruxy_optax.estimate_memory(tx, params, train_step=step, args=(batch,))
        >>> memory.arguments - memory.reused == batch.size * 4
        True
    """
    params = jax.tree.map(_shape_of, params)
    state = jax.eval_shape(tx.init, params)
    counted = MemoryEstimate(
        parameter_count=sum(leaf.size for leaf in jax.tree.leaves(params)),
        parameters=tree_bytes(params),
        gradients=sum(_bytes(leaf) for leaf in jax.tree.leaves(params) if _is_inexact(leaf)),
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
    return counted._replace(
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


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
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
