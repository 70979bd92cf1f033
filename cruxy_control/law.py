"""What a control law is: the two functions and the one constant that frameworks use."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from cruxy_control.controls import Controls
from cruxy_control.signals import Signals


@runtime_checkable
class Law(Protocol):
    """A frozen config whose `step` turns one step's signals into controls.

    `cruxy_control` has `StabilityV1`, `StabilityV2`, `Meta3`, `SelfDriving` and, around any of
    them, `PlateauGuard`; any object with these three members serves. One that also has a true
    `needs_alignment` is given `Signals.alignment` and `Signals.limit_scale`, and with a true
    `needs_excess` also `Signals.excess`; one that moves `Controls.sign_weight` or
    `Controls.decay_scale` has a true `steers_decay`, without which both are left alone.
    """

    @property
    def gamma(self) -> float:
        """Exponent of the norm that the law wants as `Signals.gamma_norm`, at least 1."""
        ...

    def init(self, like: Any, *, xp: Any) -> Any:
        """The state before the first step: a NamedTuple of arrays on the device of `like`.

        It may have a tuple `telemetry`: the fields of `Controls` that this law has something
        to say of, which is what telemetry shows. Without it telemetry shows all.

        Args:
            like: a 0-d array.
            xp: the array namespace, `numpy`, `jax.numpy` or `torch`.
        """
        ...

    def step(self, state: Any, signals: Signals, *, xp: Any) -> tuple[Any, Controls]:
        """One step: the new state and the controls.

        Where the signals are not finite the state comes back as it was and `Controls.ok` is
        false.
        """
        ...


def needs_alignment(law: Law) -> bool:
    """Whether the law reads `Signals.alignment` and `Signals.limit_scale`."""
    return bool(getattr(law, "needs_alignment", False))


def needs_excess(law: Law) -> bool:
    """Whether the law reads `Signals.excess` as well."""
    return needs_alignment(law) and bool(getattr(law, "needs_excess", False))


def steers_decay(law: Law) -> bool:
    """Whether the law moves `Controls.sign_weight` and `Controls.decay_scale`."""
    return bool(getattr(law, "steers_decay", False))


def check_law(law: Any) -> None:
    """Raises `TypeError` unless `law` is an instance that can be stepped.

    Raises:
        TypeError: with the rule, the value received and the remedy.
    """
    if isinstance(law, type) or not isinstance(law, Law):
        raise TypeError(
            "law must be an instance with `gamma`, `init` and `step`, such as "
            f"cruxy_control.Meta3(), got {law!r}; give Meta3(), StabilityV1() or StabilityV2()."
        )


def check_excess(law: Law, *, remedy: str) -> None:
    """Raises `ValueError` where a law reads the excess over an average, which is not measured.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    if needs_excess(law):
        raise ValueError(
            "law must have excess_share=None where the excess over an average is not measured, got "
            f"{short(law)}; {remedy}."
        )


def short(law: Any) -> str:
    """A law with those of its constants that are not the usual ones."""
    if not dataclasses.is_dataclass(law) or isinstance(law, type):
        return repr(law)
    own = [
        f"{field.name}={short(value)}"
        for field in dataclasses.fields(law)
        if (value := getattr(law, field.name)) != field.default
    ]
    return f"{type(law).__name__}({', '.join(own)})"
