"""Gradient release: the backward pass of a stack of layers updates each layer as it reaches it.

Reverse-mode differentiation returns all gradients at once, so an ordinary step holds one number a
parameter beside parameters and state. Here the pass itself is written out: it holds the gradient of
one layer at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.interpreters import partial_eval

from cruxy_control.controls import Controls, clip_scale, neutral
from cruxy_control.filters import select
from cruxy_control.law import needs_alignment
from cruxy_exact.affine import AffineCode
from cruxy_optax._controls import materialize_controls, storable
from cruxy_optax._memory.activations import decode_tree, encode_tree
from cruxy_optax._places import WHOLE, Place
from cruxy_optax._sensors.measure import RawSums, raw_sums, signals_of
from cruxy_optax._stabilize import (
    Loop,
    StabilizeState,
    controlled_update,
    count_step,
    loop_of,
)
from cruxy_optax._tree import find, unshared


class LayerStack(NamedTuple):
    """The parameters of a model that is a stack of equal layers; also the states of its parts.

    Attributes:
        embed: what makes the first layer's input.
        layers: the layers, all in one tree: every leaf has them as its first axis.
        head: what makes the loss of the last layer's output; `()` where nothing is trained there.
    """

    embed: Any
    layers: Any
    head: Any


class ReleasedStep(NamedTuple):
    """A training step without a gradient of the whole model.

    Attributes:
        init: `init(params)` gives the optimizer's state.
        step: `step(params, opt_state, batch)` gives new parameters, new state and the loss. Put it
            under `jax.jit(..., donate_argnums=(0, 1))`.
    """

    init: Callable[[LayerStack], optax.OptState]
    step: Callable[[LayerStack, Any, Any], tuple[LayerStack, Any, jax.Array]]


_Updated = tuple[Any, Any, RawSums]
"""A part's new parameters and state, and the sums over its gradient."""

_Update = Callable[[Any, Any, Any, jax.Array, Place], _Updated]
"""Of a part: its gradient, state and parameters, the loss, and where it lies in the whole."""


def release_gradients(
    tx: optax.GradientTransformation,
    embed_fn: Callable[[Any, Any], Any],
    layer_fn: Callable[[Any, Any, Any], Any],
    loss_fn: Callable[[Any, Any, Any, Any], jax.Array],
    *,
    residual_bits: int | None = None,
) -> ReleasedStep:
    """A training step whose backward pass updates layer by layer and keeps no gradient.

    Beside parameters and state it holds the input of every layer and the gradient of one: the
    layer is computed again when the backward pass reaches it (as under `jax.checkpoint`), updated,
    and its gradient is gone. The parts of a model are its embedding, each layer and its head;
    `tx` sees one part at a time, a layer without the layer axis, and keeps a state for each.

    With an optax transformation that treats every tensor for itself the result equals the ordinary
    step to rounding. The random bits of `round_updates` are those of the ordinary step; those of
    a coded state are each part's own.

    Under a controller (`meta3`, `meta_lion`, `stabilize`) four things differ, since a layer is
    gone before the norm of the whole gradient is known:

    - what the law ordered after one step holds for the next; for the first, nothing is ordered.
      `telemetry` shows what was measured in this step and ordered for the next
    - the predicted threshold clips each part by its own norm, not all by the global one
    - the guard is weaker: a part whose gradient is not finite is left as it was, with its moments
      and its place in the schedule; others may have moved. The law passes over such a step, which
      counts as skipped
    - a relative limit knows the size of a part's parameters, not of all

    A mask or a label of `tx` has to be a function of the parameters, which are a part's.

    Args:
        tx: the optimizer. Any controller has to be outermost, with everything else inside it.
        embed_fn: `embed_fn(embed, batch)` gives the input of the first layer, floating arrays.
        layer_fn: `layer_fn(layer, x, batch)` gives a layer's output, of the shape and dtype of
            its input `x`.
        loss_fn: `loss_fn(head, embed, x, batch)` gives the loss, a scalar. `embed` is there for
            tied weights; its gradient from here is kept until the embedding is reached.
        residual_bits: 8 or 4 bits an element in which the inputs of the layers are held, as
            `compressed_checkpoint` holds them; `None` as they are.

    Returns:
        A pair of functions, `init` and `step`.

    Raises:
        TypeError: where `tx` is no transformation; from `init` where `params` is no `LayerStack`.
        ValueError: where `residual_bits` is neither, `tx` belongs to a `shard_map` (`axis_names`),
            or its law steers by the alignment (`self_driving`). From `init`: where layers differ in
            number, `tx` accumulates (`optax.MultiSteps`), has a controller that is not outermost,
            or lets the update of one tensor depend on the gradient of another, as
            `optax.clip_by_global_norm` does.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def embed_fn(embed, batch): return batch @ embed
        >>> def layer_fn(layer, x, batch): return x + jnp.tanh(x @ layer)
        >>> def loss_fn(head, embed, x, batch): return jnp.mean((x @ head - 1.0) ** 2)
        >>> params = cruxy_optax.LayerStack(
        ...     embed=0.1 * jnp.ones((3, 4)), layers=jnp.zeros((6, 4, 4)), head=jnp.zeros((4, 1))
        ... )
        >>> released = cruxy_optax.release_gradients(
        ...     cruxy_optax.meta3(1e-2), embed_fn, layer_fn, loss_fn
        ... )
        >>> step = jax.jit(released.step, donate_argnums=(0, 1))
        >>> opt_state, batch = released.init(params), jnp.ones((8, 3))
        >>> for _ in range(3):
        ...     params, opt_state, loss = step(params, opt_state, batch)
        ...     print(f"{loss:.4f}")
        1.0000
        0.9761
        0.9498

    References:
        Lv et al., [Full Parameter Fine-tuning for Large Language Models with Limited
        Resources](https://arxiv.org/abs/2306.09782), 2023 (LOMO).
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be a gradient transformation, got {tx!r}; give meta3(1e-3) or optax's own "
            "(of optax.MultiSteps nothing can be released: it keeps a gradient by design)."
        )
    loop = loop_of(tx)
    if loop is not None and (axes := loop.axis_names + loop.replica_axes):
        raise ValueError(
            f"axis_names must be empty to release gradients, got {axes!r}; put "
            "the step under jax.jit with sharded arrays in place of shard_map."
        )
    if loop is not None and needs_alignment(loop.law):
        raise ValueError(
            f"the law of tx must not need the alignment to release gradients, but "
            f"{type(loop.law).__name__} steers by the alignment of all gradients with all "
            "moments before any of them moves; use meta3() or meta_lion()."
        )
    code = None if residual_bits is None else AffineCode(residual_bits)
    model = _Model(embed_fn, layer_fn, loss_fn, code)
    if loop is not None:
        released = _Controlled(model, loop)
    else:
        released = _Plain(model, optax.with_extra_args_support(tx))
    return ReleasedStep(released.init, released.step)


class _Plain(NamedTuple):
    """The step of a transformation that has no controller around it."""

    model: "_Model"
    inner: optax.GradientTransformationExtraArgs

    def init(self, params: LayerStack) -> LayerStack:
        return unshared(_init_parts(self.inner, params))

    def step(self, params: LayerStack, opt_state: Any, batch: Any) -> tuple[LayerStack, Any, Any]:
        return _backward_pass(self.model, params, opt_state, batch, self.update)[:3]

    def update(self, grads: Any, state: Any, params: Any, loss: Any, place: Place) -> _Updated:
        updates, state = self.inner.update(grads, state, params, value=loss, place=place)
        return optax.apply_updates(params, updates), state, RawSums(jnp.zeros(()), jnp.zeros(()))


class _Controlled(NamedTuple):
    """The step of what `stabilize` made: what one step orders holds for the next."""

    model: "_Model"
    loop: Loop

    def init(self, params: LayerStack) -> StabilizeState:
        states = _init_parts(self.loop.inner, params)
        fresh = self.loop.init(_one_layer(params))
        nothing = neutral(jnp.ones((), jnp.bool_), xp=jnp)
        return unshared(
            fresh._replace(controls=storable(nothing, self.loop.law), inner_state=states)
        )

    def step(self, params: LayerStack, opt_state: Any, batch: Any) -> tuple[LayerStack, Any, Any]:
        law = self.loop.law
        held = materialize_controls(opt_state.controls)
        update = functools.partial(self.update, held)
        params, states, loss, sums = _backward_pass(
            self.model, params, opt_state.inner_state, batch, update
        )
        signals = signals_of(sums, loss.astype(jnp.float32), law.gamma)
        law_state, ordered = law.step(opt_state.law_state, signals, xp=jnp)
        kept = select(ordered.ok, ordered, held, xp=jnp)
        opt_state = opt_state._replace(
            law_state=law_state,
            signals=signals,
            controls=storable(kept._replace(ok=ordered.ok), law),
            inner_state=states,
        )
        return params, count_step(opt_state, ordered.ok), loss

    def update(
        self, held: Controls, grads: Any, state: Any, params: Any, loss: Any, place: Place
    ) -> _Updated:
        sums = raw_sums(grads, self.loop.law.gamma)
        own = signals_of(sums, loss, self.loop.law.gamma)
        controls = held._replace(
            ok=jnp.isfinite(own.grad_norm) & jnp.isfinite(own.gamma_norm),
            clip_scale=clip_scale(held.clip_threshold, own.grad_norm, xp=jnp),
        )
        updates, state = controlled_update(
            self.loop.inner, controls, grads, state, params, value=loss, place=place
        )
        return optax.apply_updates(params, updates), state, sums


class _Model(NamedTuple):
    """The functions of a model that is a stack of equal layers."""

    embed: Callable[[Any, Any], Any]
    layer: Callable[[Any, Any, Any], Any]
    loss: Callable[[Any, Any, Any, Any], jax.Array]
    code: AffineCode | None  # of the inputs of the layers

    def kept(self, x: Any) -> Any:
        """The input of a layer as it is held for the backward pass."""
        return x if self.code is None else encode_tree(x, self.code)


def _backward_pass(
    model: _Model, params: LayerStack, states: LayerStack, batch: Any, update: _Update
) -> tuple[LayerStack, LayerStack, jax.Array, RawSums]:
    """One forward and backward pass, with `update` on each part as its gradient is there."""
    embed, layers, head = params
    layers_from = len(jax.tree.leaves(embed))
    head_from = layers_from + len(jax.tree.leaves(layers))
    x, embed_vjp = jax.vjp(lambda embed: model.embed(embed, batch), embed)
    x, inputs = lax.scan(lambda x, layer: (model.layer(layer, x, batch), model.kept(x)), x, layers)

    def top(head: Any, embed: Any, x: Any) -> jax.Array:
        return model.loss(head, embed, x, batch)

    loss, (head_grads, tied_grads, dx) = jax.value_and_grad(top, (0, 1, 2))(head, embed, x)
    zero = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    head, head_state, own = update(head_grads, states.head, head, loss, Place(head_from))
    sums = _plus(RawSums(zero, zero), own)

    def reach(carry: Any, at: Any) -> tuple[Any, None]:
        index, x = at[0], decode_tree(at[1])
        dx, stack, (layer, layer_state), sums = carry
        _, layer_vjp = jax.vjp(lambda layer, x: model.layer(layer, x, batch), layer, x)
        grads, dx = layer_vjp(dx)
        place = Place(layers_from, index)
        layer, layer_state, own = update(grads, layer_state, layer, loss, place)
        stack = _put(stack, (layer, layer_state), index)
        below = _take(stack, jnp.maximum(index - 1, 0))
        return (dx, stack, below, _plus(sums, own)), None

    # Layers and states are carried and written in place: as outputs of the scan the new ones would
    # stand beside the old ones. For the same reason each iteration takes the layer for the next one
    # out of what it has written: a layer read where it will be written makes XLA copy the stack.
    count = len(jax.tree.leaves(layers)[0])
    stack, order = (layers, states.layers), jnp.arange(count, dtype=jnp.int32)
    carry = (dx, stack, _take(stack, count - 1), sums)
    carry, _ = lax.scan(reach, carry, (order, inputs), reverse=True)
    dx, (layers, layer_states), _, sums = carry

    (embed_grads,) = embed_vjp(dx)
    embed_grads = jax.tree.map(jnp.add, embed_grads, tied_grads)
    embed, embed_state, own = update(embed_grads, states.embed, embed, loss, WHOLE)
    params = LayerStack(embed, layers, head)
    return params, LayerStack(embed_state, layer_states, head_state), loss, _plus(sums, own)


def _init_parts(inner: optax.GradientTransformationExtraArgs, params: LayerStack) -> LayerStack:
    """A state for each part; refuses what cannot be taken apart."""
    _check_stack(params)
    _check_separable(inner, _one_layer(params))
    return LayerStack(
        embed=inner.init(params.embed),
        layers=jax.vmap(inner.init)(params.layers),
        head=inner.init(params.head),
    )


def _one_layer(params: LayerStack) -> LayerStack:
    return params._replace(layers=jax.tree.map(lambda leaf: leaf[0], params.layers))


def _plus(a: RawSums, b: RawSums) -> RawSums:
    return RawSums(a.squares + b.squares, a.powers + b.powers)


def _take(trees: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), trees)


def _put(trees: Any, parts: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda a, part: lax.dynamic_update_index_in_dim(a, part.astype(a.dtype), index, 0),
        trees,
        parts,
    )


def _check_stack(params: Any) -> None:
    if not isinstance(params, LayerStack):
        raise TypeError(
            f"params must be a LayerStack(embed, layers, head), got {type(params).__name__}; "
            "stack the layers' trees with jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)."
        )
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params.layers)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "every leaf of layers must have the layers as its first axis, all equally many, got "
            f"{sorted(lengths)}; stack them with jax.tree.map(lambda *leaves: jnp.stack(leaves), "
            "*layers)."
        )


def _check_separable(inner: optax.GradientTransformationExtraArgs, params: LayerStack) -> None:
    """Refuses what cannot do its work on one part at a time."""
    state = jax.eval_shape(inner.init, params)
    if find(state, optax.MultiStepsState):
        raise ValueError(
            "tx must not accumulate gradients, got optax.MultiSteps: it keeps the gradient that "
            "releasing is there to save; give the step a larger batch."
        )
    if find(state, StabilizeState):
        raise ValueError(
            "a controller must be outermost to release gradients, got one inside another "
            "transformation; write stabilize(optax.chain(...)) with everything in it."
        )
    for name, others in _coupled(inner, params).items():
        raise ValueError(
            "tx must update each tensor from its own gradient to release gradients, but the update "
            f"of {name} depends on the gradient of {others[0]} as well, as with "
            "optax.clip_by_global_norm; leave that out (a controller clips each part by itself), "
            "or use optax.adaptive_grad_clip or optax.clip_by_block_rms."
        )


def _coupled(
    inner: optax.GradientTransformationExtraArgs, params: LayerStack
) -> dict[str, list[str]]:
    """Which tensors' gradients, by path, each tensor's update depends on beside its own."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in flat]

    def updates_of(grads: list[jax.Array], state: Any, params: Any) -> list[jax.Array]:
        controls = neutral(jnp.ones((), jnp.bool_), xp=jnp)
        updates, _ = inner.update(
            tree.unflatten(grads), state, params, value=jnp.zeros(()), controls=controls
        )
        return jax.tree.leaves(updates)

    grads = [leaf for _, leaf in flat]
    state = jax.eval_shape(inner.init, params)
    jaxpr = jax.make_jaxpr(updates_of)(grads, state, params).jaxpr
    found = {}
    for number, name in enumerate(names):
        wanted = [other == number for other in range(len(jaxpr.outvars))]
        used = partial_eval.dce_jaxpr(jaxpr, wanted)[1][: len(names)]
        others = [
            other for other, needed in zip(names, used, strict=True) if needed and other != name
        ]
        if others:
            found[name] = others
    return found
