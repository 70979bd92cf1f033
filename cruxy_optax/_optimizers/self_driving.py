"""Optimizers that find their learning rate: Adam, Lion and Muon under the self-driving law."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import chex
import optax

from cruxy_control.law import Law
from cruxy_control.roles import Rule
from cruxy_control.usual import WEIGHT_DECAY, Given, muon_momentum
from cruxy_optax._actuators.kernels import check_stacked
from cruxy_optax._actuators.moments import scale_by_controlled_adam, scale_by_controlled_lion
from cruxy_optax._actuators.orthogonal import scale_by_controlled_muon
from cruxy_optax._memory.quantize import in_bits
from cruxy_optax._optimizers.parts import Mask, averaged, by_role, kind_of
from cruxy_optax._optimizers.steered import Limit, law_of, limits_of, of_its_kind, steered


def self_driving(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    eps: chex.Numeric = 1e-8,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = WEIGHT_DECAY,
    mask: Mask = None,
    *,
    direction: optax.GradientTransformation | None = None,
    nesterov: bool = True,
    relative_limit: Limit = "usual",
    averaging: Given | None = "usual",
    interpolation: Given = "usual",
    average_bits: int | None = None,
    total_steps: int | None = None,
    rates: Mapping[str, Any] | None = None,
    law: Law | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW without a learning rate, a warm-up, a schedule or a horizon.

    Three parts, each a component of its own. `SelfDriving` steers the rate by how gradient and
    momentum agree. The relative limit keeps each tensor's rate below `relative_limit` times its own
    root mean square, or that of all parameters where that is smaller, which is what a start that is
    far too high leans on. The average of the iterates does what the end of a schedule does, at
    every step: **evaluate, save and deploy `averaged_params(opt_state, params)`**, not `params`.

    `python -m benchmarks rate-sensitivity --optimizer self_driving adamw-cosine` compares starts
    from 1e-6 to 10 with AdamW under a tuned cosine; "Self-driving" in the documentation has the
    figures, what the sensor measures, and where it is not good.

    Args:
        learning_rate: where the search starts; above 0. Leave it out. A schedule multiplies
            what is found and is obeyed where it falls, once the search of some 180 steps is over:
            below four fifths of its highest value the law then learns nothing. Where it is 0
            everything stands still.
        b1: decay rate of the first moment, in `[0, 1)`; the sensor needs one above 0.
        b2: decay rate of the second moment, in `[0, 1)`.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moment.
        weight_decay: decoupled weight decay, multiplied by the rate that is found.
        mask: where weight decay applies, see `meta3`; `None` for what has at least two axes.
        direction: any optax transformation that keeps a first moment, in the place of Adam's:
            `optax.scale_by_adam()`, `optax.scale_by_lion()`, a chain that ends in
            `orthogonalize_updates()`, an `optax.partition` of several, one of your own. What comes
            out has to be of about size 1 and point where the gradient does: no learning rate is in
            it. Its kind (`direction_kind` in "Write a direction of your own") says which limit, set
            point and average go with it. `b1`, `b2`, `eps`, `nesterov`, `mu_dtype` and `state_bits`
            are Adam's and are left out. What is frozen (`optax.set_to_zero`) stands outside, in an
            `optax.partition` around the optimizer: in here weight decay would still move it.
        nesterov: looks one step ahead.
        relative_limit: see `scale_by_meta_learning_rate`; 0.1, or what goes with `direction`. It is
            doubled where the end of the run is known, and in a cooldown, but not with Muon inside
            (`SelfDriving.cooldown_peak`). Of tensors wider than 64 it falls with the root of their
            width, but not with Muon inside. `None` for no limit, and then a start far above the
            best rate is not recovered from.
        averaging: the power of `average_iterates`; 16, or less where it pulls. `None` keeps no
            average and saves its buffer: then the parameters themselves are what there is to
            evaluate, as noisy as the rate.
        interpolation: how far the average pulls the parameters along, see `average_iterates`; 0, or
            what goes with `direction` where neither `law` nor `averaging` is given. For language
            models, 0.6.
        average_bits: bits an element of the average, 32 (`None`), 16 or 8; see `average_iterates`.
        total_steps: steps of the run, where they are known: the rate is found in the first fifth
            of them and then falls to 0 from twice of it (`SelfDriving.total_steps`), with Muon
            inside in the last fifth, from the rate itself. `None` for a run without an end.
        rates: factors on the rate by role, such as `{"embedding": 1 / 3}`; see `scale_by_role`.
        law: the controller with its constants; `None` for `SelfDriving` with those that go with the
            direction.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`; see `stabilize`.
        state_bits: bits an element of the moments, 32, 16, 8 or 4; see `meta3`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`. State: two moments and the average,
        12 bytes a float32 parameter, plus under 1 KB; 10 and 9 with `average_bits` 16 and 8, 8
        without the average.

    Raises:
        ValueError: where an argument is outside its range, both `state_bits` and `mu_dtype` are
            given, or either beside `direction`, or that has a learning rate; from `init` where it
            keeps no first moment; from `update` without `params`.
        TypeError: where a parameter is complex, `law` is none or `direction` no transformation.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def loss_fn(x): return jnp.sum((x - 5.0) ** 2)
        >>> tx = cruxy_optax.self_driving()
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> opt_state = tx.init(params)
        >>> for _ in range(200):
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        ...     params = optax.apply_updates(params, updates)
        >>> print(cruxy_optax.averaged_params(opt_state, params).round(1))
        [5. 5. 5.]

        Around another direction:

        >>> tx = cruxy_optax.self_driving(direction=optax.scale_by_lion())

    References:
        Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
        Optimization](https://arxiv.org/abs/1212.1824), 2013; Shazeer and Stern,
        [Adafactor](https://arxiv.org/abs/1804.04235), 2018; Loshchilov and Hutter, [Decoupled
        Weight Decay Regularization](https://arxiv.org/abs/1711.05101), 2019.
    """
    kind: str | None = "adam"
    if direction is None:
        moments = in_bits(
            state_bits,
            mu_dtype,
            lambda mu_dtype: scale_by_controlled_adam(b1, b2, eps, mu_dtype, nesterov=nesterov),
        )
    else:
        adams = {"state_bits": state_bits, "mu_dtype": mu_dtype}
        moments, kind = direction, kind_of(direction, adams)

    def make(kind: str) -> optax.GradientTransformationExtraArgs:
        own, power, pull = law_of(kind, law, averaging, interpolation, total_steps)
        limits, roles = limits_of(relative_limit, kind), by_role(rates)
        average = averaged(power, average_bits, pull)
        return steered(
            moments, learning_rate, weight_decay, mask, roles, limits, average, own, axis_names
        )

    return of_its_kind(moments, kind, make)


def self_driving_lion(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.95,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = WEIGHT_DECAY,
    mask: Mask = None,
    *,
    relative_limit: Limit = "usual",
    averaging: Given | None = "usual",
    average_bits: int | None = None,
    total_steps: int | None = None,
    rates: Mapping[str, Any] | None = None,
    law: Law | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion without a learning rate: `self_driving` with one moment instead of two.

    The momentum is shorter than Lion's own, 0.95 instead of 0.99: a sensor that looks back a
    hundred steps is too slow for the controller, which then overshoots.

    Args:
        learning_rate: where the search starts; see `self_driving`, as all that follow.
        b1: decay rate inside the sign, in `[0, 1)`.
        b2: decay rate of the momentum, in `(0, 1)`.
        mu_dtype: dtype of the momentum.
        weight_decay: decoupled weight decay.
        mask: where weight decay applies; `None` for what has at least two axes.
        relative_limit: 0.01: a sign has size 1 where Adam's direction has a quarter of it or less,
            and never shrinks: on a small convolutional net 0.02 ended in divergence. Of tensors
            wider than 384 it falls with the root of their width.
        averaging: the power of `average_iterates`, 16; `None` keeps no average.
        average_bits: bits an element of the average, 32 (`None`), 16 or 8.
        total_steps: steps of the run, where they are known.
        rates: factors on the rate by role.
        law: the controller with its constants; `None` for `SelfDriving` with those that go with
            Lion.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.
        state_bits: bits an element of the momentum, 32, 16, 8 or 4.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `self_driving`. State: 8 bytes a float32
        parameter, plus under 1 KB; 4 without the average.

    Raises:
        ValueError: where an argument is outside its range, or both `state_bits` and `mu_dtype` are
            given; from `update` without `params`.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.self_driving_lion(weight_decay=0.0)
        >>> params = jnp.array([1.0, 2.0])
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(updates)
        [-0.0001 -0.0001]

    References:
        Chen et al., [Symbolic Discovery of Optimization
        Algorithms](https://arxiv.org/abs/2302.06675), 2023; those of `self_driving`.
    """
    law, power, _ = law_of("lion", law, averaging, 0.0, total_steps)
    moments = in_bits(
        state_bits, mu_dtype, lambda mu_dtype: scale_by_controlled_lion(b1, b2, mu_dtype)
    )
    limits, roles = limits_of(relative_limit, "lion"), by_role(rates)
    average = averaged(power, average_bits)
    return steered(
        moments, learning_rate, weight_decay, mask, roles, limits, average, law, axis_names
    )


def self_driving_muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: chex.Numeric | Literal["usual"] = "usual",
    adam_b1: chex.Numeric = 0.9,
    adam_b2: chex.Numeric = 0.99,
    eps: chex.Numeric = 1e-8,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = WEIGHT_DECAY,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    relative_limit: Limit = "usual",
    averaging: Given | None = "usual",
    interpolation: Given = "usual",
    average_bits: int | None = None,
    total_steps: int | None = None,
    rates: Mapping[str, Any] | None = None,
    law: Law | None = None,
    rules: Iterable[Rule] = (),
    model: Any = None,
    stacked: Sequence[str] = (),
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon without a learning rate: `self_driving` with orthogonal matrices.

    Matrices inside the model take `orthogonalize_updates`, embeddings, positions, output layers and
    vectors Adam's direction; which is which `label_roles` tells, and nothing has to be listed. One
    rate moves them all.

    An orthogonal step bears a larger rate than the sensor takes Adam's for: it is steered to an
    alignment of -0.07 at first, which then follows the excess over the average
    (`SelfDriving.excess_share`) and so the noise of the gradients; hand the loss over as `value`.
    Where the end is known the rate falls in the last fifth from the one that was found. Where no
    average pulls it is steered to -0.15, to -0.2 where the end is known, and falls from twice of
    that after the first fifth.

    Args:
        learning_rate: where the search starts; see `self_driving`, as all that is not said here.
        b1: decay rate of the matrices' momentum, in `(0, 1)`; 0.9 where the average pulls, else
            0.95.
        adam_b1: decay rate of the first moment of everything else, in `[0, 1)`.
        adam_b2: decay rate of the second moment of everything else, in `[0, 1)`.
        eps: added to the root of that.
        mu_dtype: dtype of the first moments.
        weight_decay: decoupled weight decay, multiplied by the rate that is found.
        mask: where it applies; `None` for what has at least two axes, of scanned layers beside
            that which counts them.
        nesterov: looks one step ahead.
        relative_limit: no tensor gets a rate above this share of its own root mean square, nor of
            that of all parameters; 0.2, whatever its width.
        averaging: the power of `average_iterates`; 2, and 16 where nothing pulls. `None` keeps no
            average.
        interpolation: how far the average pulls the parameters along, see `average_iterates`; 0.7,
            and 0 where `averaging` or `law` is given. Where a schedule lowers the rate nothing is
            pulled.
        average_bits: bits an element of the average, 32 (`None`), 16 or 8.
        total_steps: steps of the run, where they are known.
        rates: factors on the rate by role.
        law: the controller with its constants; `None` for those above.
        rules: see `label_roles`.
        model: see `label_roles`.
        stacked: shell patterns for the paths of scanned layers, such as `("layers.*",)`; see
            `orthogonalize_updates`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`, over which no matrix may be
            split.
        state_bits: bits an element of the moments, 32, 16, 8 or 4.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `self_driving`. State: 8 bytes a float32
        element of a matrix, 4 without the average; 12 and 8 elsewhere.

    Raises:
        ValueError: where an argument is outside its range, or both `state_bits` and `mu_dtype` are
            given; from `update` without `params`; as in `orthogonalize_updates`.
        TypeError: where a parameter is complex, `law` is none or `stacked` a text alone.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def loss_fn(params): return jnp.sum((params["kernel"] - 2.0 * jnp.eye(4)) ** 2)
        >>> tx = cruxy_optax.self_driving_muon(weight_decay=0.0)
        >>> params = {"kernel": jnp.eye(4)}
        >>> opt_state = tx.init(params)
        >>> for _ in range(150):
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        ...     params = optax.apply_updates(params, updates)
        >>> averaged = cruxy_optax.averaged_params(opt_state, params)
        >>> print(jnp.diag(averaged["kernel"]).round(1))
        [2. 2. 2. 2.]

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024; those of
        `self_driving`.
    """
    rules, stacked = tuple(rules), check_stacked(stacked)
    law, power, pull = law_of("muon", law, averaging, interpolation, total_steps)
    moments = in_bits(
        state_bits,
        mu_dtype,
        lambda mu_dtype: scale_by_controlled_muon(
            muon_momentum(pull) if isinstance(b1, str) else b1,
            adam_b1,
            adam_b2,
            eps,
            mu_dtype,
            nesterov=nesterov,
            rules=rules,
            model=model,
            stacked=stacked,
        ),
    )
    limits = limits_of(relative_limit, "muon")
    roles, average = by_role(rates, rules, model), averaged(power, average_bits, pull)
    return steered(
        moments, learning_rate, weight_decay, mask, roles, limits, average, law, axis_names, stacked
    )
