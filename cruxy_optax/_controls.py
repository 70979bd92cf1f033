"""How an actuator receives the controls: as an extra argument, from `stabilize` alone."""

from cruxy_control.controls import Controls


def require_controls(controls: Controls | None, name: str) -> Controls:
    """The controls, or an error that says where the actuator called `name` belongs.

    Raises:
        ValueError: where there are none.
    """
    if controls is None:
        raise ValueError(
            f"{name}() must run inside stabilize(), which measures the gradient and hands it its "
            f"controls, but got controls=None; write stabilize(optax.chain({name}(), ...), "
            "law=Meta3())."
        )
    return controls
