"""Orthogonal directions: the nearest matrix whose singular values are all about 1."""

from typing import Any

from cruxy_control.roles import matching
from cruxy_control.signals import root

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is iterated, from Jordan et al., Muon, 2024: steep at 0, so that five steps
are enough, for which singular values end between 0.7 and 1.2 and not at 1."""

STEPS = 5

ROLES = (
    *("attention", "mlp", "moe.expert", "conv", "matrix"),
    *("ssm.in", "ssm.x", "ssm.dt", "ssm.out"),
)
"""Whose matrices Muon makes orthogonal (`cruxy_control.roles`): those inside a model, and not
embeddings, positions, output layers and adapters."""

SIZE = 0.1
"""Root mean square of a direction, in units of a matrix whose singular values are all 1."""


def orthogonalize(x: Any, *, xp: Any, steps: int = STEPS) -> Any:
    """`U V^T` of `x = U S V^T`, nearly: Newton-Schulz steps without a decomposition.

    `x <- x / |x|`, then `steps` times `x <- a x + (b x x^T + c (x x^T)^2) x`, which maps every
    singular value by the same odd polynomial. A zero matrix stays zero.

    Args:
        x: shape `(..., rows, columns)`; several matrices at once where there are more axes.
            Cheapest with no more rows than columns.
        xp: the array namespace.
        steps: of the iteration, at least 1.

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024; Bernstein and
        Newhouse, [Old Optimizer, New Norm](https://arxiv.org/abs/2409.20325), 2024.
    """
    a, b, c = COEFFICIENTS
    length = root(xp.sum(x * x, axis=(-2, -1), keepdims=True), xp=xp)
    x = x / xp.where(length > 0.0, length, 1.0)
    for _ in range(steps):
        gram = xp.matmul(x, xp.swapaxes(x, -1, -2))
        x = a * x + xp.matmul(b * gram + c * xp.matmul(gram, gram), x)
    return x


def is_orthogonal(role: str, axes: int) -> bool:
    """Whether Muon makes a parameter of this role, with so many axes, orthogonal."""
    return axes > 1 and matching(dict.fromkeys(ROLES, True), role, False)


def orthogonal_scale(rows: int, columns: int) -> float:
    """What makes an orthogonal direction one of root mean square `SIZE`.

    A matrix with orthonormal rows or columns has the root mean square `1 / sqrt(max(rows,
    columns))` (Liu et al., [Muon is Scalable](https://arxiv.org/abs/2502.16982), 2025, with 0.2).
    """
    return SIZE * max(rows, columns) ** 0.5
