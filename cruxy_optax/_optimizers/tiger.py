"""`tiger`: a sign blended with its momentum, and all that Tiger puts around it, part by part."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import chex
import optax

from cruxy_control.checks import check_count
from cruxy_control.formulas.directions import BLEND
from cruxy_control.law import Law
from cruxy_control.lora_pid import LoraPid
from cruxy_control.meta3 import Meta3
from cruxy_control.roles import Rule
from cruxy_control.slices import Slices
from cruxy_optax._actuators.clip import clip_by_predicted_norm
from cruxy_optax._actuators.directions import blend_sign
from cruxy_optax._actuators.factored import scale_by_factored_rms
from cruxy_optax._actuators.lora_pid import blend_by_lora_pid
from cruxy_optax._actuators.moments import scale_by_controlled_momentum
from cruxy_optax._actuators.rate import scale_by_meta_learning_rate, throttle_by_phase
from cruxy_optax._actuators.slices import balance_slices as balanced_slices
from cruxy_optax._actuators.slices import scale_by_slices
from cruxy_optax._actuators.trust import (
    clip_by_parameter_norm,
    clip_by_rms,
    scale_by_trust_ratio_ema,
)
from cruxy_optax._memory.quantize import in_bits
from cruxy_optax._optimizers.parts import Mask, by_role, decayed
from cruxy_optax._roles import role_mask
from cruxy_optax._stabilize import stabilize


def tiger(
    learning_rate: optax.ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    blend: optax.ScalarOrSchedule = BLEND,
    temperature: chex.Numeric = 0.0,
    power: float = 0.0,
    decay_rate: float = 0.8,
    min_dim_size_to_factor: int = 32,
    trust_cap: float | None = None,
    trust_decay: float | None = None,
    trust_space: Literal["update", "momentum"] = "update",
    trust_per: Literal["tensor", "row", "slice"] = "tensor",
    agc: float | None = None,
    clip_rms: float | None = None,
    clip_rms_per: Literal["tensor", "row", "block"] = "tensor",
    slices: Mapping[str, Slices] | None = None,
    slice_rates: Mapping[str, float] | None = None,
    balance_slices: bool = False,
    lora_pid: LoraPid | None = None,
    role_rates: Mapping[str, float] | None = None,
    rules: Iterable[Rule] = (),
    model: Any = None,
    law: Law = Meta3(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Tiger under the Meta3 controller: Lion with a blended sign, and what may be put around it.

    $$
    c_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    u_t = (1 - w) \frac{(1 + \tau)\, c_t}{|c_t| + \tau\, \mathrm{rms}(c_t)}
    + w \frac{c_t}{\mathrm{rms}(c_t)}, \qquad
    \theta_{t+1} = \theta_t - \eta (1 - 0.5 \varphi_t) (u_t + \lambda \theta_t)
    $$

    On by default are a hard sign and a fifth of the momentum; all else is off. `python -m
    benchmarks components` measures what each part is worth. The parts stand in their own right too:
    `blend_sign`, `scale_by_trust_ratio_ema`, `clip_by_parameter_norm`, `clip_by_rms`,
    `scale_by_slices`, `balance_slices`, `blend_by_lora_pid`, `scale_by_role`.

    Which of Tiger's arguments an argument stands for:

    | Tiger | here |
    |---|---|
    | softsign; `use_sign=True` (hard sign) | `temperature=1`; `temperature=0` |
    | sign blend and its schedule | `blend`, a number or a schedule |
    | `factored=True, precond_alpha=` | `power=` |
    | `use_trust_ratio`, `trust_clip=` | `trust_cap=`, `None` for none |
    | `trust_space="precond"` | `trust_space="momentum"` |
    | `block_trust_chunks` | `trust_per=` |
    | `agc_clip=` | `agc=`, on the gradient |
    | `rms_clip_threshold=`, `rms_clip_granularity="param"` | `clip_rms=`, `clip_rms_per="tensor"` |
    | QKV slicing, its rates, its auto-rate | `slices=`, `slice_rates=`, `balance_slices=True` |
    | LoRA-PID | `lora_pid=LoraPid()` |
    | rates of tagged groups | `role_rates=` |
    | plateau guard | `law=PlateauGuard(Meta3())` |
    | `update_buffer_dtype="fp32"` | always |
    | `preset`, `use_foreach_update`, buckets | nothing: XLA compiles the whole step |

    Three of them differ on purpose. Tiger's softsign has an absolute 0.001 where this one has the
    root mean square, which follows the scale of the gradients. Its AGC is on the direction, whose
    length says nothing of how good a step is. Its preconditioner multiplies the direction, whose
    size then depends on that of the gradient; here it comes before the momentum, and the blend
    makes the size 1 again.

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps; as
            large as Lion's, and with a soft sign up to three times that.
        b1: base of the rate in `c`, in `[0, 1)`. With `b2` the same, `c` is Tiger's plain average.
        b2: base of the momentum's decay, in `(0, 1)`.
        mu_dtype: dtype of the momentum; `None` is the parameter's, but float32 for float16.
        weight_decay: decoupled weight decay, at least 0, or a schedule; multiplied by the rate.
            1e-3 by default, as in `optax.lion`; `cruxy_torch.Tiger` has the 0.01 of torch.optim.
        mask: where weight decay applies; see `meta3`. `role_mask` makes one.
        blend: share of the momentum in the direction, in `[0, 1]`, or a schedule of the number of
            good steps.
        temperature: $\tau$ of `soften_sign`, at least 0; 0 is the sign.
        power: of the root of a factored second moment that the gradient is divided by, in
            `[0, 1]`; 0 keeps none. See `axiom`, as the next two.
        decay_rate: the exponent in the decay of the second moment, in `(0, 1]`.
        min_dim_size_to_factor: from which length on axes are factored, at least 2. Under
            `optax.inject_hyperparams` it has to be named in `static_args`, and `power` with it
            unless it is to be set: one that may change keeps the second moment at 0 too.
        trust_cap: cap of a trust ratio (`scale_by_trust_ratio_ema`), above 0; `None` for none.
        trust_decay: of the average of the ratio, in `[0, 1)`; `None` for none.
        trust_space: `"update"`, or `"momentum"` for a ratio to the preconditioned momentum.
        trust_per: `"tensor"`, `"row"`, or `"slice"` for those of `slices`.
        agc: largest norm of a tensor's gradient as a share of the parameter's
            (`clip_by_parameter_norm`), above 0; `None` for no clip.
        clip_rms: largest root mean square of a direction, above 0; `None` for no limit.
        clip_rms_per: of a `"tensor"`, `"row"` or `"block"` of 256; see `clip_by_rms`.
        slices: where q, k and v lie in fused tensors, as `qkv_slices(params)` finds it.
        slice_rates: a factor on the rate of `"q"`, `"k"` and `"v"`; Tiger has 0.9, 0.8 and 1.1.
        balance_slices: whether rates of slices are found on the way.
        lora_pid: `cruxy_control.LoraPid()` steers blend and clip of every tensor of a role
            `"lora"`; `None` treats them as all others.
        role_rates: a factor on the step, decay included, by role; see `scale_by_role`.
        rules: that come before what names tell of roles; see `label_roles`.
        model: likewise.
        law: the controller with its constants.
        bounds: absolute bounds on the meta learning rate; see `scale_by_meta_learning_rate`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`; see `stabilize`. Parameters
            that are split belong under `jax.jit` with `power` above 0.
        state_bits: bits an element of the momentum, 32, 16, 8 or 4; see `meta3`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`. State: 4 bytes a float32 parameter,
        plus under 1 KB, and what the parts that are switched on say.

    Raises:
        ValueError: where an argument is outside its range, or one comes without what it needs;
            from `init` where slices or roles do not fit; from `update` where a part that measures
            the parameters finds no `params`.
        TypeError: where a parameter is complex, or `law` or `lora_pid` is none.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def loss_fn(x): return jnp.sum(x**2)
        >>> tx = cruxy_optax.tiger(learning_rate=0.01, weight_decay=0.0)
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> opt_state = tx.init(params)
        >>> for _ in range(3):
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss:.3f}")
        14.000
        13.909
        13.818
    """
    _check_needs("trust_cap", trust_cap, trust_decay=(trust_decay, None))
    _check_needs("trust_cap", trust_cap, trust_space=(trust_space, "update"))
    _check_needs("trust_cap", trust_cap, trust_per=(trust_per, "tensor"))
    _check_needs("clip_rms", clip_rms, clip_rms_per=(clip_rms_per, "tensor"))
    _check_needs("slices", slices, slice_rates=(slice_rates, None))
    _check_needs("slices", slices, balance_slices=(balance_slices, False))
    _check_needs("slices", slices, trust_per=(trust_per == "slice", False))
    if slices is not None and not (slice_rates or balance_slices or trust_per == "slice"):
        raise ValueError(
            "slices say where q, k and v lie, but nothing was asked for them; give slice_rates, "
            "balance_slices=True or trust_per='slice', or leave slices out."
        )
    if lora_pid is not None and trust_space == "momentum":
        raise ValueError(
            "trust_space='momentum' has no place beside lora_pid, which makes the direction of a "
            "momentum itself; use trust_space='update', or leave lora_pid out."
        )
    min_dim_size_to_factor = check_count(
        "min_dim_size_to_factor", min_dim_size_to_factor, 2, remedy="32 is usual"
    )
    axes: Any = {"axis_names": axis_names}

    def momentum(seed: int) -> optax.GradientTransformation:
        """Of the gradient, over a power of its second moment."""
        average = in_bits(
            state_bits,
            mu_dtype,
            lambda mu_dtype: scale_by_controlled_momentum(b1, b2, mu_dtype),
            seed=seed,
        )
        if isinstance(power, int | float) and power == 0.0:
            return average
        return optax.chain(
            scale_by_factored_rms(decay_rate, min_dim_size_to_factor, power), average
        )

    trust: Any = None
    if trust_cap is not None:
        own = slices if trust_per == "slice" else None
        trust = functools.partial(
            scale_by_trust_ratio_ema, trust_cap, trust_decay, per=trust_per, slices=own, **axes
        )
    direction: optax.GradientTransformation = blend_sign(blend, temperature, **axes)
    if trust and trust_space == "momentum":
        direction = trust(space="momentum", direction=direction)
    direction = optax.chain(
        *([] if agc is None else [clip_by_parameter_norm(agc, **axes)]), momentum(0), direction
    )
    if lora_pid is not None:
        steered = blend_by_lora_pid(momentum(1), lora_pid, temperature, **axes)
        rules = tuple(rules)
        direction = optax.partition(
            {True: steered, False: direction},
            lambda params: role_mask(params, "lora", rules=rules, model=model),
        )
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            direction,
            *([] if clip_rms is None else [clip_by_rms(clip_rms, per=clip_rms_per, **axes)]),
            *([trust()] if trust and trust_space == "update" else []),
            *([scale_by_slices(slices, slice_rates)] if slices and slice_rates else []),
            *([balanced_slices(slices, **axes)] if slices and balance_slices else []),
            *decayed(weight_decay, mask, law),
            *by_role(role_rates, rules, model),
            throttle_by_phase(),
            scale_by_meta_learning_rate(learning_rate, bounds=bounds),
        ),
        law=law,
        axis_names=axis_names,
    )


def _check_needs(other: str, given: Any, **option: tuple[Any, Any]) -> None:
    """Raises where an option, given with what it is when switched off, lacks what it is one of."""
    ((name, (value, off)),) = option.items()
    if given is None and value != off:
        raise ValueError(
            f"{name} is an option of {other}, got {name}={value!r} without one; give {other}, or "
            f"leave {name} out."
        )
