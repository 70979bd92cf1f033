"""Orthogonal directions for matrices: Muon under the controller, Adam for everything else."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_count
from cruxy_control.formulas.orthogonal import (
    STEPS,
    is_orthogonal,
    orthogonal_scale,
    orthogonalize,
)
from cruxy_control.roles import Rule
from cruxy_optax._actuators.kernels import (
    Matrices,
    Scans,
    as_matrices,
    check_matched,
    check_stacked,
    stacked_axes,
)
from cruxy_optax._actuators.moments import scale_by_controlled_adam, scale_by_controlled_momentum
from cruxy_optax._distributed.axes import (
    explicit_spec,
    map_over_devices,
    shard_alike,
    whatever_the_axes,
)
from cruxy_optax._roles import labelled
from cruxy_optax._roles.parameters import Labelled
from cruxy_optax._tree import accumulator_dtype


class OrthogonalizeUpdatesState(NamedTuple):
    """Nothing but what kind of direction comes out."""

    direction_kind = "muon"


def orthogonalize_updates(
    steps: int = STEPS,
    *,
    rules: Iterable[Rule] = (),
    model: Any = None,
    stacked: Sequence[str] = (),
) -> optax.GradientTransformation:
    r"""Makes every matrix among the updates orthogonal: Muon's direction, behind a momentum.

    $$
    u = 0.1 \sqrt{\max(d_{in}, d_{out})} \; \mathrm{NS}_5(c)
    $$

    `NS` are `steps` Newton-Schulz steps, after which all singular values of the matrix are about
    1; the factor makes the root mean square of the direction about 0.1. Matrices of one shape are
    computed together. What has fewer than two axes passes through.

    Under `jax.jit` with sharded arrays each device gathers one matrix at a time, computes it, and
    hands its parts back: as many matrices go at once as there are devices, and nobody computes what
    another one does. "At scale" in the documentation counts what is sent.

    A kernel is `(inputs, outputs)`; a convolution's has several axes of inputs. Linen's queries,
    keys and values have two or three of outputs, heads and their width among them. Of experts the
    first axis counts them, and of scanned layers, which `stacked` has to name. A kernel with more
    axes is refused, and one of heads whose bias, or all that stands beside it, begins with an axis
    of layers.

    Args:
        steps: of the iteration, at least 1.
        rules: see `label_roles`, which tells queries, experts and convolutions.
        model: likewise.
        stacked: shell patterns for the dotted paths of parameters whose first axis counts layers,
            as `flax.linen.scan` and `nnx.vmap` make them, such as `("layers.*",)`. What is a vector
            without that axis passes through.

    Returns:
        A stateless `optax.GradientTransformation`.

    Raises:
        ValueError: where `steps` is below 1; from `init` and `update` where a kernel has more axes
            than its role explains; from `init` where a pattern of `stacked` matches nothing.
        TypeError: where `stacked` is a text alone.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.orthogonalize_updates()
        >>> updates, _ = tx.update({"kernel": 1000.0 * jnp.eye(4)}, tx.init({}))
        >>> print(abs(updates["kernel"]).max().round(1))
        0.2

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024.
    """
    check_count("steps", steps, 1, remedy="use 5")
    rules, stacked = tuple(rules), check_stacked(stacked)

    def shapes_of(tree: Labelled) -> list[Matrices | None]:
        scans = Scans(tree.present)
        return [as_matrices(leaf, stacked, scans) for leaf in tree.present]

    def init_fn(params: optax.Params) -> OrthogonalizeUpdatesState:
        tree = labelled(params, model, rules)
        check_matched(tree, stacked)
        shapes_of(tree)
        return OrthogonalizeUpdatesState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        shapes = shapes_of(labelled(updates, model, rules))
        specs = [explicit_spec(leaf) for leaf in leaves]
        directions = whatever_the_axes(lambda xs: orthogonal_all(xs, shapes, specs), leaves)
        return treedef.unflatten(directions), state

    def orthogonal_all(
        leaves: list[jax.Array], shapes: list[Matrices | None], specs: list[Any]
    ) -> list[jax.Array]:
        leaves = list(leaves)
        stacks: dict[tuple[Any, ...], list[tuple[int, bool, jax.Array]]] = {}
        for index, (leaf, matrices) in enumerate(zip(leaves, shapes, strict=True)):
            if matrices is None:
                continue
            whole = leaf.reshape(matrices).astype(accumulator_dtype(leaf))
            tall = whole.shape[1] > whole.shape[2]
            wide = whole.swapaxes(1, 2) if tall else whole
            stacks.setdefault((wide.shape[1:], wide.dtype), []).append((index, tall, wide))
        for (shape, _), same in stacks.items():
            together = jnp.concatenate([wide for *_, wide in same])
            found = map_over_devices(
                lambda each: orthogonalize(each, xp=jnp, steps=steps),
                together,
                leaves,
                specs[same[0][0]],
            )
            together = orthogonal_scale(*shape) * found
            begin = 0
            for index, tall, wide in same:
                own = together[begin : begin + len(wide)]
                begin += len(wide)
                own = own.swapaxes(1, 2) if tall else own
                own = own.reshape(leaves[index].shape)
                # On automatic axes XLA would else place it as it likes, and gather all there.
                leaves[index] = shard_alike(own, leaves[index])[0]
        return leaves

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_controlled_muon(
    b1: chex.Numeric = 0.95,
    adam_b1: chex.Numeric = 0.9,
    adam_b2: chex.Numeric = 0.99,
    eps: chex.Numeric = 1e-8,
    mu_dtype: Any | None = None,
    *,
    steps: int = STEPS,
    nesterov: bool = True,
    rules: Iterable[Rule] = (),
    model: Any = None,
    stacked: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with this step's decay rates from the controller: orthogonal matrices, Adam elsewhere.

    Matrices of attention, of feed-forward layers and experts, convolutions and what no name tells
    get `orthogonalize_updates` of a momentum; embeddings, positions, output layers, adapters,
    norms, biases and all vectors get `scale_by_controlled_adam`. Which is which `label_roles` says;
    what is a vector without the axis of layers that `stacked` names is one.

    With $m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t$ Nesterov's $\beta_1 m_t + (1 - \beta_1) g_t$
    is $\beta_1^2 m_{t-1} + (1 - \beta_1^2) g_t$, so that `scale_by_controlled_momentum(b1 ** 2,
    b1)` computes both.

    Args:
        b1: decay rate of the matrices' momentum, in `(0, 1)`.
        adam_b1: base of the first moment's decay elsewhere, in `[0, 1)`.
        adam_b2: base of the second moment's decay there, in `[0, 1)`.
        eps: added to the root of the second moment there.
        mu_dtype: dtype of the first moments; see `scale_by_controlled_adam`.
        steps: of the Newton-Schulz iteration.
        nesterov: looks one step ahead, everywhere.
        rules: see `label_roles`.
        model: see `label_roles`.
        stacked: see `orthogonalize_updates`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`. State: 4 bytes a
        float32 element of a matrix, 8 elsewhere.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`; as in
            `orthogonalize_updates`.
        TypeError: where `stacked` is a text alone.

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024; Liu et al., [Muon
        is Scalable for LLM Training](https://arxiv.org/abs/2502.16982), 2025.
    """
    momentum = scale_by_controlled_momentum(b1 * b1 if nesterov else b1, b1, mu_dtype)
    rules, stacked = tuple(rules), check_stacked(stacked)
    directions = orthogonalize_updates(steps, rules=rules, model=model, stacked=stacked)
    muon = optax.chain(momentum, directions)
    adam = scale_by_controlled_adam(adam_b1, adam_b2, eps, mu_dtype, nesterov=nesterov)
    return optax.with_extra_args_support(
        optax.partition(
            {True: muon, False: adam}, orthogonal(rules=rules, model=model, stacked=stacked)
        )
    )


def orthogonal(
    *, rules: Sequence[Rule] = (), model: Any = None, stacked: Sequence[str] = ()
) -> Callable[[optax.Params], Any]:
    """Tells of every leaf whether Muon makes it orthogonal: a tree of bools like the parameters.

    It sees the norms and biases beside kernels, which are masked out of what makes these orthogonal
    and may tell that layers are stacked.
    """

    def tell(params: optax.Params) -> Any:
        leaves, found = labelled(params, model, rules).present, []
        scans = Scans(leaves)
        for leaf in leaves:
            axes = len(leaf.parameter.shape) - stacked_axes(leaf, stacked)
            found.append(is_orthogonal(leaf.label.role, axes))
            if found[-1]:
                as_matrices(leaf, stacked, scans)
        # Inside the boxes of nnx, so that what is left out is no box less.
        return jax.tree.structure(params).unflatten(found)

    return tell
