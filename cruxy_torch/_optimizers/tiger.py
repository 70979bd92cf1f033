"""`Tiger`: a sign blended with its momentum, and all that Tiger puts around it, by its names."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Law
from cruxy_control.checks import check_count, check_range
from cruxy_control.formulas.directions import BLEND
from cruxy_control.lora_pid import LoraPid
from cruxy_control.meta3 import Meta3
from cruxy_control.plateau import PlateauGuard
from cruxy_control.slices import Slices, check_slices
from cruxy_torch import _checks
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._distributed.shards import is_first_rank
from cruxy_torch._memory.state import warn_of_small
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch._optimizers.tiger_parts import (
    Parts,
    cap_of_trust,
    direction_of,
    second_moment,
)

Preset = Literal["auto", "modern", "legacy"]

_PRESETS: dict[str, dict[str, Any]] = {
    "modern": {"factored": True, "precond_alpha": 1.0, "trust_space": "precond"},
    "legacy": {"factored": False, "precond_alpha": 0.0, "use_trust_ratio": False, "agc_clip": 0.02},
}
_SPACES = {"update": "update", "precond": "momentum", "momentum": "momentum"}
_GRANULARITIES = {"param": "tensor", "tensor": "tensor", "row": "row", "block": "block"}
_FP32 = (None, "fp32", "float32", torch.float32)


class Tiger(DirectedOptimizer):
    r"""Tiger under the Meta3 controller: Lion with a blended sign, and what may be put around it.

    $$
    c_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    u_t = (1 - w) \frac{(1 + \tau)\, c_t}{|c_t| + \tau\, \mathrm{rms}(c_t)}
    + w \frac{c_t}{\mathrm{rms}(c_t)}, \qquad
    \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t)
    $$

    It takes what is written for the package `tiger_optim`: its argument names, and groups from
    `build_tagged_param_groups`. On by default are a hard sign and a fifth of the momentum; all else
    is off. `python -m benchmarks components` measures what each part is worth.

    Three things differ from Tiger on purpose. Its softsign has an absolute 0.001 where this one has
    the root mean square, which follows the scale of the gradients. Its AGC is on the direction,
    whose length says nothing of how good a step is; here it is on the gradient. Its preconditioner
    multiplies the direction, whose size then depends on that of the gradient; here it comes before
    the momentum, and the blend makes the size 1 again.

    Each part is a direction of its own too, for `CruxyOptimizer(direction=)`: `SignBlend`,
    `TrustRatio`, `AdaptiveGradientClip`, `ClipRms`, `ScaleSlices`, `BalanceSlices`,
    `BlendByLoraPid`.

    Args:
        params: parameters, or parameter groups. Groups may set `lr`, `betas`, `weight_decay`,
            `maximize`, `state_bits`, `relative_limit`, `averaging`, `average_bits`, `slices` and
            `slice_rates` of their own; their `role` says which are LoRA's.
        lr: learning rate, at least 0; as large as Lion's, or up to three times that.
        betas: bases of the two decay rates of the momentum, each in `[0, 1)`, which the law moves.
            With both the same $c$ is Tiger's plain average.
        weight_decay: decoupled weight decay, at least 0; multiplied by the rate. 0.01 by default,
            as in torch.optim; `cruxy_optax.tiger` has the 0.001 of optax.
        use_sign: `True` for the hard sign, `temperature=0`; `False` for the soft one, 1.
        blend: $w$, the share of the momentum, in `[0, 1]`, or a schedule of it; see `SignBlend`.
        temperature: $\tau$, at least 0; 0 where neither it nor `use_sign` is given.
        factored: divides the gradient by the root of a second moment that is factored (`True`) or
            whole (`False`); `None`, and `precond_alpha=None`, for no preconditioner.
        precond_alpha: of the root, in `[0, 1]`: 1 with `factored=True`, else 0. See
            `AXIOM(power=)`.
        use_trust_ratio: scales each tensor's step by a trust ratio; `None` where one of the next
            two is given.
        trust_space: where it is measured: `"update"`, or `"precond"` for the momentum before its
            sign.
        trust_clip: its cap, above 0; 10 where it is not given. Without effect, which a
            warning says, beside `use_trust_ratio=False`, with which the original's settings give
            it, and so beside `preset="legacy"`.
        trust_decay: of its average in log space, in `[0, 1)`; `None` for no average.
        trust_per: `"tensor"`, `"row"`, or `"slice"` for groups with slices.
        agc_clip: largest norm of a tensor's gradient as a share of the parameter's, above 0; `None`
            for no clip.
        rms_clip_threshold: largest root mean square of a direction, above 0; `None` for no limit.
        rms_clip_granularity: of a `"param"`, `"row"` or `"block"` of 256 elements.
        slices: where q, k and v lie in every tensor of the group, a `cruxy_control.slices.Slices`
            (or its plain tuple), for groups to set; `None` for none.
        slice_rates: factors on the rates of q, k and v, for groups with slices; Tiger has
            (0.9, 0.8, 1.1).
        balance_slices: finds rates of slices on the way; see `BalanceSlices`.
        lora_pid: `True`, or a `cruxy_control.LoraPid`, steers blend and clip of the groups whose
            `role` begins with `"lora"`; see `BlendByLoraPid`.
        plateau_patience: steps without a fall of the loss after which sign and decay are taken
            away; see `cruxy_control.PlateauGuard`, in which `law` is put. `None` for no guard.
        preset: fills in what is not given. `"modern"` is `factored=True, precond_alpha=1,
            trust_space="precond"`; `"legacy"` is `factored=False, precond_alpha=0,
            use_trust_ratio=False, agc_clip=0.02`; `"auto"` is `"legacy"` on CUDA devices of a
            capability below 8.0, else `"modern"`, and prints why. Tiger's; neither is known to be
            better than the default.
        use_foreach_update: taken and without effect, as the next two, which a warning says: how
            the original lays out its arithmetic.
        bucket_standardize: see there.
        bucket_scalarless: see there.
        update_buffer_dtype: `"fp32"`, in which every step is computed.
        maximize: climbs instead of descending.
        state_bits: bits an element of the momentum: 32, 16, 8 or 4; see `CruxyOptimizer`.
        stochastic_rounding: rounds updates of bfloat16 parameters up or down by chance.
        relative_limit: see `CruxyOptimizer`.
        averaging: see `CruxyOptimizer`.
        average_bits: see `CruxyOptimizer`.
        law: the control law with its constants.
        lr_bounds: absolute bounds on the rate times its slow factor; `None` for none.
        process_group: see `CruxyOptimizer`.

    Raises:
        ValueError: where an argument is outside its range, or comes without what it needs.
        TypeError: where `law` or `lora_pid` is none.

    Examples:
        >>> import torch
        >>> from cruxy_torch import Tiger
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> optimizer = Tiger([x], lr=0.01, weight_decay=0.0)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     _ = optimizer.step(loss=loss)
        ...     print(f"{loss.item():.3f}")
        14.000
        13.909
        13.818
    """

    _pickled = (*DirectedOptimizer._pickled, "_parts", "_preset")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        use_sign: bool | None = None,
        blend: float | Callable[[Tensor], Any] = BLEND,
        temperature: float | None = None,
        factored: bool | None = None,
        precond_alpha: float | None = None,
        use_trust_ratio: bool | None = None,
        trust_space: Literal["update", "precond", "momentum"] | None = None,
        trust_clip: float | None = None,
        trust_decay: float | None = None,
        trust_per: Literal["tensor", "row", "slice"] = "tensor",
        agc_clip: float | None = None,
        rms_clip_threshold: float | None = None,
        rms_clip_granularity: Literal["param", "tensor", "row", "block"] = "param",
        slices: Slices | None = None,
        slice_rates: tuple[float, float, float] | None = None,
        balance_slices: bool = False,
        lora_pid: bool | LoraPid = False,
        plateau_patience: int | None = None,
        preset: Preset | None = None,
        use_foreach_update: bool | None = None,
        bucket_standardize: bool | None = None,
        bucket_scalarless: bool | None = None,
        update_buffer_dtype: str | torch.dtype | None = None,
        maximize: bool = False,
        state_bits: int = 32,
        stochastic_rounding: bool = False,
        relative_limit: float | None = None,
        averaging: float | None = None,
        average_bits: int = 32,
        law: Law = Meta3(),
        lr_bounds: tuple[float, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if update_buffer_dtype not in _FP32:
            raise ValueError(
                f'update_buffer_dtype must be "fp32", got {update_buffer_dtype!r}: every step is '
                "computed in float32; state_bits=16 keeps the momentum in bfloat16."
            )
        params = [_checks.listed(p) if isinstance(p, dict) else p for p in params]
        self._preset = _chosen(preset, params)
        filled = _PRESETS[self._preset] if self._preset else {}
        given = {
            "factored": factored,
            "precond_alpha": precond_alpha,
            "use_trust_ratio": use_trust_ratio,
            "trust_space": trust_space,
            "agc_clip": agc_clip,
        }
        given |= {name: value for name, value in filled.items() if given[name] is None}
        _warn_of_layout(
            use_foreach_update=use_foreach_update,
            bucket_standardize=bucket_standardize,
            bucket_scalarless=bucket_scalarless,
        )
        if given["use_trust_ratio"] is False and (trust_clip, trust_space) != (None, None):
            warnings.warn(
                f"trust_clip={trust_clip!r} and trust_space={trust_space!r} are without effect "
                'beside use_trust_ratio=False, which preset="legacy" gives; give '
                "use_trust_ratio=True, or leave them out.",
                stacklevel=2,
            )
        trust = cap_of_trust(given["use_trust_ratio"], given["trust_space"], trust_clip)
        self._parts = Parts(
            blend=blend,
            temperature=_temperature(use_sign, temperature),
            factored=second_moment(given["factored"], given["precond_alpha"]),
            agc=given["agc_clip"],
            rms=rms_clip_threshold,
            rms_per=_one_of("rms_clip_granularity", rms_clip_granularity, _GRANULARITIES),
            trust=trust,
            trust_decay=trust_decay,
            trust_space=_one_of("trust_space", given["trust_space"] or "update", _SPACES),
            trust_per=_one_of("trust_per", trust_per, dict.fromkeys(("tensor", "row", "slice"))),
            balance=balance_slices,
            pid=LoraPid() if lora_pid is True else lora_pid or None,
        )
        self._stochastic = stochastic_rounding
        if plateau_patience is not None:
            check_count("plateau_patience", plateau_patience, 1, remedy="200 is a usual value")
            law = PlateauGuard(law, patience=plateau_patience)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_bits": state_bits,
            "relative_limit": relative_limit,
            "averaging": averaging,
            "average_bits": average_bits,
            "slices": slices,
            "slice_rates": slice_rates,
        }
        super().__init__(
            params, defaults, law=law, lr_bounds=lr_bounds, process_group=process_group
        )
        warn_of_small(self.param_groups, stacklevel=2)
        self._check_needs(trust_decay, trust_per)

    @property
    def preset(self) -> str | None:
        """Which preset was taken; `None` for none."""
        return self._preset

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own; see `CruxyOptimizer.add_param_group`."""
        slices = param_group.get("slices", self.defaults["slices"])
        if slices is not None:  # plain, for checkpoints that hold nothing else
            param_group = {**param_group, "slices": tuple(slices)}
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        _checks.check_group({"eps": 0.0, **group})
        direction_of(self._parts, None, None, lora=False)  # which checks what all groups have
        if group["slice_rates"] is not None:
            rates = group["slice_rates"]
            if not isinstance(rates, tuple | list) or len(rates) != 3:
                raise ValueError(
                    f"slice_rates must be three numbers, of q, k and v, got {rates!r}; Tiger has "
                    "(0.9, 0.8, 1.1)."
                )
            if group["slices"] is None:
                raise ValueError(
                    "slice_rates need slices, which say where q, k and v lie, got none; take "
                    "groups from build_tagged_param_groups(enable_qkv_slicing=True)."
                )
            for name, rate in zip("qkv", rates, strict=True):
                check_range(f"slice_rates of {name}", rate, 0.0, remedy="1 changes nothing")
        if group["slices"] is not None:
            slices = Slices(*group["slices"])
            for entry in group["params"]:
                param = entry[1] if isinstance(entry, tuple) else entry
                check_slices("a parameter", slices, tuple(param.shape))

    def _check_needs(self, trust_decay: float | None, trust_per: str) -> None:
        """Raises where a part is asked for that no group has, or an option of no part."""
        parts, groups = self._parts, self.param_groups
        sliced = any(group["slices"] is not None for group in groups)
        lora = any(_is_lora(group) for group in groups)
        for name, wanted, there, remedy in (
            ("trust_decay", trust_decay is not None, parts.trust is not None, "trust_clip=10"),
            ("trust_per", trust_per != "tensor", parts.trust is not None, "trust_clip=10"),
            ('trust_per="slice"', trust_per == "slice", sliced, "groups with slices"),
            ("balance_slices", parts.balance, sliced, "groups with slices"),
            ("lora_pid", parts.pid is not None, lora, 'groups of a role "lora", of param_groups'),
        ):
            if wanted and not there:
                raise ValueError(
                    f"{name} needs what it acts on, of which there is none; give {remedy}, or "
                    f"leave {name} out."
                )
        if parts.pid is not None and parts.trust is not None and parts.trust_space == "momentum":
            raise ValueError(
                'trust_space="precond" has no place beside lora_pid, which makes the direction of '
                'a momentum itself; use trust_space="update", or leave lora_pid out.'
            )

    def _direction_of(self, group: dict[str, Any], moving: Sequence[Tensor] = ()) -> Direction:
        slices, rates = group["slices"], group["slice_rates"]
        rates = None if rates is None else tuple(rates)
        slices = None if slices is None else _plain(slices)
        return direction_of(self._parts, slices, rates, lora=_is_lora(group))


def _is_lora(group: dict[str, Any]) -> bool:
    return str(group.get("role") or "").partition(".")[0] == "lora"


def _plain(slices: Any) -> Slices:
    """Slices of tuples, whatever they were saved as."""
    axis, *ranges = slices
    return Slices(axis, *(tuple((start, stop) for start, stop in part) for part in ranges))


def _temperature(use_sign: bool | None, temperature: float | None) -> float:
    """Of the sign, which is hard where nothing is said."""
    if temperature is None:
        return 1.0 if use_sign is False else 0.0
    if use_sign is not None and use_sign != (temperature == 0.0):
        raise ValueError(
            f"use_sign=True is temperature=0, got use_sign={use_sign} with temperature="
            f"{temperature!r}; give one of them."
        )
    return temperature


def _one_of(name: str, value: Any, known: dict[str, Any]) -> Any:
    """What a word stands for; itself where that is not said."""
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}; give one of them."
        )
    return known[value] or value


def _chosen(preset: str | None, params: Sequence[Any]) -> str | None:
    """The preset that is meant; prints why where the device decides."""
    if preset is None or preset in _PRESETS:
        return preset
    if preset != "auto":
        raise ValueError(
            f'preset must be "auto", "modern", "legacy" or None, got {preset!r}; None leaves all '
            "as it is given."
        )
    first: Any = params[0] if params else None
    if isinstance(first, dict):
        first = next(iter(first["params"]), None)
    first = first[1] if isinstance(first, tuple) else first
    preset, reason = "modern", "the device is no CUDA device"
    if isinstance(first, Tensor) and first.is_cuda:
        capability = torch.cuda.get_device_capability(first.device)
        preset = "legacy" if capability < (8, 0) else "modern"
        reason = f"the device has CUDA capability {capability[0]}.{capability[1]}"
    if is_first_rank():
        print(f'Tiger takes preset="{preset}", since {reason}.')
    return preset


def _warn_of_layout(**switches: bool | None) -> None:
    """Says once that these do nothing here."""
    named = [name for name, value in switches.items() if value is not None]
    if named:
        warnings.warn(
            f"{', '.join(named)}: taken and without effect. They say how tiger_optim lays out its "
            "arithmetic; here every tensor is stepped by itself, with the same result.",
            stacklevel=3,
        )
