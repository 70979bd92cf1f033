"""A control law on exact scalars: the same orders everywhere, with the law unchanged.

A law is written over an array namespace. `Exact` hands it one in which every number is a `Scalar`,
whose operators are those of `arithmetic`, so that the law's own lines compute the same bits in
NumPy, PyTorch and compiled by JAX.
"""

import dataclasses
from typing import Any

from cruxy_exact import arithmetic, sums
from cruxy_exact._namespace import cast, count_up


@dataclasses.dataclass(frozen=True)
class Exact:
    """A law whose arithmetic is exact; itself a law.

    State, signals and controls are arrays as ever: those of the law inside. In JAX `init` and
    `step` need 64-bit types: call them inside `jax.enable_x64(True)`.

    Attributes:
        law: the law, such as `cruxy_control.Meta3()`.

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import Meta3, Signals
        >>> law, one = Exact(Meta3()), np.float32(1.0)
        >>> state = law.init(np.float32(0.0), xp=np)
        >>> state, controls = law.step(state, Signals(one, one, one), xp=np)
        >>> float(controls.phase_scale)
        0.75
    """

    law: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "law":  # while it is copied it has no law yet
            raise AttributeError(name)
        return getattr(self.law, name)

    def init(self, like: Any, *, xp: Any) -> Any:
        """The state before the first step, on the device of the 0-d array `like`."""
        return unwrapped(self.law.init(Scalar(like, xp), xp=Namespace(xp, like)))

    def step(self, state: Any, signals: Any, *, xp: Any) -> tuple[Any, Any]:
        """One step of the law: the new state, and the controls."""
        space = Namespace(xp, signals.grad_norm)
        out = self.law.step(wrapped(state, xp), wrapped(signals, xp), xp=space)
        return unwrapped(out)


def wrapped(tree: Any, xp: Any) -> Any:
    """A nested NamedTuple with its float32 and int32 arrays as `Scalar`."""
    if isinstance(tree, tuple):
        parts = (wrapped(part, xp) for part in tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if getattr(tree, "dtype", None) in (xp.float32, xp.int32):
        return Scalar(tree, xp)
    return tree


def unwrapped(tree: Any) -> Any:
    """What `wrapped` was given."""
    if isinstance(tree, tuple):
        parts = (unwrapped(part) for part in tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree.value if isinstance(tree, Scalar) else tree


class Scalar:
    """A float32 or int32 array, `()` or `(n,)`, whose operators are exact.

    Whole numbers stay whole under `+`, `-`, `*` and `%`; a quotient is float32.
    """

    __array_priority__ = 1000  # NumPy's numbers leave the operators to this class

    def __init__(self, value: Any, xp: Any) -> None:
        self.value, self.xp = value, xp

    @property
    def is_whole(self) -> bool:
        """Whether it is int32."""
        return self.value.dtype == self.xp.int32

    def _pair(self, other: Any, whole: bool = True) -> tuple[Any, Any, bool]:
        """Both values in one type, and whether that is int32."""
        value = other.value if isinstance(other, Scalar) else other
        if whole and self.is_whole and _is_whole(value, self.xp):
            return self.value, value, True
        return _float(self.value, self.xp), _float(value, self.xp), False

    def _apply(self, other: Any, function: Any, whole: Any, swap: bool = False) -> "Scalar":
        a, b, exact = self._pair(other, whole is not None)
        if swap:
            a, b = b, a
        return Scalar(whole(a, b) if exact else function(a, b, xp=self.xp), self.xp)

    def __add__(self, other: Any) -> "Scalar":
        return self._apply(other, arithmetic.add, lambda a, b: a + b)

    def __sub__(self, other: Any) -> "Scalar":
        return self._apply(other, arithmetic.sub, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> "Scalar":
        return self._apply(other, arithmetic.sub, lambda a, b: a - b, swap=True)

    def __mul__(self, other: Any) -> "Scalar":
        return self._apply(other, arithmetic.mul, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> "Scalar":
        return self._apply(other, _divide, None)

    def __rtruediv__(self, other: Any) -> "Scalar":
        return self._apply(other, _divide, None, swap=True)

    __radd__, __rmul__ = __add__, __mul__

    def __mod__(self, other: int) -> "Scalar":
        return Scalar(self.value % other, self.xp)

    def __neg__(self) -> "Scalar":
        return 0 - self

    def __abs__(self) -> "Scalar":
        return Scalar(self.xp.abs(self.value), self.xp)

    def __len__(self) -> int:
        return len(self.value)

    def _compare(self, other: Any, compare: Any) -> Any:
        a, b, _ = self._pair(other)
        return compare(a, b)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a >= b)

    def __eq__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a == b)

    def __ne__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b: a != b)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _is_whole(value: Any, xp: Any) -> bool:
    if hasattr(value, "dtype"):
        return value.dtype == xp.int32
    return isinstance(value, int)


def _float(value: Any, xp: Any) -> Any:
    """As float32: an array, or a Python number rounded."""
    return cast(value, xp.float32) if hasattr(value, "dtype") else arithmetic.f32(value)


def _divide(a: Any, b: Any, *, xp: Any) -> Any:
    like = a if hasattr(a, "dtype") else b
    a, b = (x if hasattr(x, "dtype") else xp.full_like(like, x) for x in (a, b))
    return arithmetic.div(a, b, xp=xp)


class Namespace:
    """What laws ask of an array namespace, on `Scalar`.

    Args:
        xp: the namespace underneath.
        like: an array on the device.
    """

    def __init__(self, xp: Any, like: Any) -> None:
        self.xp, self.like = xp, like
        self.__name__ = xp.__name__
        self.float32, self.int32 = xp.float32, xp.int32

    def _scalar(self, value: Any) -> Scalar:
        return Scalar(value, self.xp)

    def _like(self, fill: Any, x: Any, dtype: Any) -> Scalar:
        x = x.value if isinstance(x, Scalar) else x
        return self._scalar(fill(x, dtype=dtype or x.dtype))

    def zeros_like(self, x: Any, dtype: Any = None) -> Scalar:
        """Zeros of the shape of `x`."""
        return self._like(self.xp.zeros_like, x, dtype)

    def ones_like(self, x: Any, dtype: Any = None) -> Scalar:
        """Ones of the shape of `x`."""
        return self._like(self.xp.ones_like, x, dtype)

    def arange(self, n: int, dtype: Any = None) -> Scalar:
        """`0, 1, ... n - 1`; int32 unless told otherwise."""
        return self._scalar(cast(count_up(n, self.like, xp=self.xp), dtype or self.int32))

    def isfinite(self, x: Scalar) -> Any:
        """Whether each number is finite."""
        return self.xp.isfinite(x.value)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """`a` where the condition holds, else `b`."""
        if not isinstance(a, Scalar) and not isinstance(b, Scalar):
            if hasattr(a, "dtype") or hasattr(b, "dtype"):  # booleans
                return self.xp.where(condition, a, b)
            whole = isinstance(a, int) and isinstance(b, int)
            zero = self.xp.zeros_like(condition, dtype=self.int32 if whole else self.float32)
            return self._scalar(self.xp.where(condition, zero + a, zero + b))
        one = a if isinstance(a, Scalar) else b
        x, y, _ = one._pair(b if one is a else a)
        x, y = (x, y) if one is a else (y, x)
        x, y = (v if hasattr(v, "dtype") else self.xp.full_like(one.value, v, dtype=_type(x, y))
                for v in (x, y))  # fmt: skip
        return self._scalar(self.xp.where(condition, x, y))

    def minimum(self, a: Any, b: Any) -> Scalar:
        """The smaller; NaN where either is."""
        a, b = self._both(a, b)
        return self.where((a < b) | (a != a), a, b)

    def maximum(self, a: Any, b: Any) -> Scalar:
        """The larger; NaN where either is."""
        a, b = self._both(a, b)
        return self.where((a > b) | (a != a), a, b)

    def fmin(self, a: Any, b: Any) -> Scalar:
        """The smaller; the other where one is NaN."""
        a, b = self._both(a, b)
        return self.where((a < b) | (b != b), a, b)

    def _both(self, a: Any, b: Any) -> tuple[Scalar, Scalar]:
        one = a if isinstance(a, Scalar) else b

        def lifted(x: Any) -> Scalar:
            like, value, _ = one._pair(x)
            return self._scalar(
                value if hasattr(value, "dtype") else self.xp.full_like(like, value)
            )

        return tuple(x if isinstance(x, Scalar) else lifted(x) for x in (a, b))  # pyright: ignore

    def clip(self, x: Scalar, lower: Any, upper: Any) -> Scalar:
        """`x` between two bounds."""
        return self.minimum(self.maximum(x, lower), upper)

    def exp(self, x: Scalar) -> Scalar:
        """`arithmetic.exp`."""
        return self._scalar(arithmetic.exp(x.value, xp=self.xp))

    def log(self, x: Scalar) -> Scalar:
        """`arithmetic.log`."""
        return self._scalar(arithmetic.log(x.value, xp=self.xp))

    def sqrt(self, x: Scalar) -> Scalar:
        """`arithmetic.sqrt`."""
        return self._scalar(arithmetic.sqrt(x.value, xp=self.xp))

    def tanh(self, x: Scalar) -> Scalar:
        """`arithmetic.tanh`."""
        return self._scalar(arithmetic.tanh(x.value, xp=self.xp))

    def sum(self, x: Scalar) -> Scalar:
        """`sums.total`."""
        return self._scalar(sums.total(x.value, xp=self.xp))

    def mean(self, x: Scalar) -> Scalar:
        """`sums.mean`."""
        return self._scalar(sums.mean(x.value, xp=self.xp))

    def stack(self, parts: list[Scalar]) -> Scalar:
        """Scalars as a vector."""
        return self._scalar(self.xp.stack([part.value for part in parts]))

    def roll(self, x: Scalar, shift: int) -> Scalar:
        """A vector turned round."""
        return self._scalar(self.xp.roll(x.value, shift))


def _type(x: Any, y: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else y.dtype
