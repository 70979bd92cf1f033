"""A namespace whose functions write a Triton kernel: formulas over `xp` become one launch.

What a law and the loop compute on scalars is written once, over an array namespace. Here it is run
on values that stand for what a kernel will have, and what it does with them is its source.
"""

import math
from collections.abc import Sequence
from typing import Any

from cruxy_torch._native.triton_written import NotRecordedError, lanes, literal

FLOAT, INT, BOOL = "tl.float32", "tl.int32", "tl.int1"
_ORDER = (BOOL, INT, FLOAT)
_POINTERS = {FLOAT: "*fp32", INT: "*i32", "tl.uint8": "*u8"}


class Value:
    """What an operation on other values gives, in a kernel that is being written.

    Attributes:
        tape: which it is written on.
        text: of the expression, with a place for each argument.
        args: what it is of.
        kind: `FLOAT`, `INT` or `BOOL`.
        block: lanes of a vector, a power of two; 0 for a scalar.
        length: of a vector: a number, or the name of the argument that says it.
        source: of a vector that is no expression: what it is, its name, and by how much it is
            rolled.
    """

    __array_ufunc__ = None  # so that a NumPy scalar on the left asks this class

    def __init__(
        self, tape: "Tape", text: str, args: Sequence["Value"], kind: str,
        block: int = 0, length: int | str = 0, source: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        self.tape, self.text, self.args, self.kind = tape, text, tuple(args), kind
        self.block, self.length, self.source = block, length, source
        self.number = tape.add(self)

    def __len__(self) -> int:
        if not isinstance(self.length, int) or not self.block:
            raise NotRecordedError("a length that is not known")
        return self.length

    def __bool__(self) -> bool:
        raise NotRecordedError("a branch on a value")

    __float__ = __int__ = __index__ = __bool__
    __hash__ = object.__hash__

    def to(self, kind: str) -> "Value":
        """The same as another kind."""
        return self if kind == self.kind else self.tape.of(f"({{}}).to({kind})", (self,), kind)

    def sqrt(self) -> "Value":
        """Its root, rounded as IEEE says."""
        return self.tape.sqrt(self)

    def max(self) -> "Value":
        """The largest of a vector; NaN where one is."""
        return self.tape.of(
            "largest({}, {})", (self, self.tape.inside(self)), self.kind, scalar=True
        )

    def __add__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} + {}", self, other)

    def __radd__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} + {}", other, self)

    def __sub__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} - {}", self, other)

    def __rsub__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} - {}", other, self)

    def __mul__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} * {}", self, other)

    def __rmul__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} * {}", other, self)

    def __truediv__(self, other: Any) -> "Value":
        return self.tape.divided(self, other)

    def __rtruediv__(self, other: Any) -> "Value":
        return self.tape.divided(other, self)

    def __mod__(self, other: int) -> "Value":
        return self.tape.arithmetic("{} % {}", self, other)

    def __pow__(self, exponent: float) -> "Value":
        wide = f"tl.full((), {float(exponent)!r}, tl.float64)"  # as torch has it
        return self.tape.of(f"power({{}}, {wide})", (self,), FLOAT)

    def __neg__(self) -> "Value":
        return self.tape.of("-{}", (self,), self.kind)

    def __abs__(self) -> "Value":
        return self.tape.of("tl.abs({})", (self,), self.kind)

    def __invert__(self) -> "Value":
        return self.tape.of("{} == 0" if self.kind == BOOL else "~{}", (self,), self.kind)

    def __and__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} & {}", self, other)

    def __or__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} | {}", self, other)

    def __xor__(self, other: Any) -> "Value":
        return self.tape.arithmetic("{} ^ {}", self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __rshift__(self, bits: int) -> "Value":
        return self.tape.arithmetic("{} >> {}", self, bits)

    def __lt__(self, other: Any) -> "Value":
        return self.tape.compared("{} < {}", self, other)

    def __le__(self, other: Any) -> "Value":
        return self.tape.compared("{} <= {}", self, other)

    def __gt__(self, other: Any) -> "Value":
        return self.tape.compared("{} > {}", self, other)

    def __ge__(self, other: Any) -> "Value":
        return self.tape.compared("{} >= {}", self, other)

    def __eq__(self, other: object) -> Any:
        return self.tape.compared("{} == {}", self, other)

    def __ne__(self, other: object) -> Any:
        return self.tape.compared("{} != {}", self, other)


class Tape:
    """The array namespace, and what was written with it.

    Numbers are float32, int32 or truth values, as scalars or as vectors of float32. Sums are taken
    in the order of the lanes; roots and quotients are rounded as IEEE says; `exp`, `tanh` and
    powers are computed in float64 and rounded once.
    """

    float32, int32 = FLOAT, INT

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._known: dict[tuple[Any, ...], Value] = {}
        self._types: dict[str, str] = {}
        self._stores: list[tuple[str, Value]] = []

    # What comes in and what goes out.

    def scalar(self, name: str, kind: str, at: int = 0) -> Value:
        """A number in memory, by the name of the argument that says where."""
        self._types[name] = _POINTERS[kind]
        return self.of(f"tl.load({name} + {at}).to({kind})", (), kind)

    def number(self, name: str) -> Value:
        """A float that is an argument itself."""
        self._types[name] = "fp32"
        return self.of(f"tl.full((), 1.0, tl.float32) * {name}", (), FLOAT)

    def vector(self, name: str, block: int, length: int | str) -> Value:
        """A vector of float32 in memory, in so many lanes.

        Args:
            name: of the argument that says where.
            block: a power of two, of at least its length.
            length: a number, or the name of an argument.
        """
        self._types[name] = _POINTERS[FLOAT]
        if isinstance(length, str):
            self._types[length] = "i32"
        return self._ring(name, block, length, 0)

    def _ring(self, name: str, block: int, length: int | str, shift: int) -> Value:
        lane = f"tl.arange(0, {block})"
        at = lane if not shift else f"({lane} + {int(length) - shift}) % {length}"
        text = f"tl.load({name} + {at}, mask={lane} < {length}, other=0.0)"
        return self._value(text, (), FLOAT, block, length, ("ring", name, shift))

    def keep(self, name: str, value: Any, kind: str, at: int = 0) -> None:
        """Writes a value to memory at the end, in place of what is there."""
        self._types[name] = _POINTERS[kind]
        value = self.as_kind(value, kind)
        if not value.block:
            self._stores.append((f"tl.store({name} + {at}, {{}})", value))
            return
        lane = f"tl.arange(0, {value.block})"
        mask = f"mask={lane} < {value.length}"
        self._stores.append((f"tl.store({name} + {lane}, {{}}, {mask})", value))

    def as_kind(self, value: Any, kind: str) -> Value:
        """A value or a number as a value of a kind."""
        return value.to(kind) if isinstance(value, Value) else self.constant(value, kind)

    # What laws call.

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """`torch.where`."""
        if not isinstance(condition, Value):
            return x if condition else y
        x, y = self._alike(x, y)
        return self.of("tl.where({}, {}, {})", (condition, x, y), x.kind)

    def maximum(self, x: Any, y: Any) -> Any:
        """`torch.maximum`, which gives NaN where either is."""
        x, y = self._alike(x, y)
        return self.where((x > y) | (x != x), x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        """`torch.minimum`, which gives NaN where either is."""
        x, y = self._alike(x, y)
        return self.where((x < y) | (x != x), x, y)

    def fmin(self, x: Any, y: Any) -> Any:
        """`torch.fmin`, which gives the other where one is NaN."""
        x, y = self._alike(x, y)
        return self.where((x < y) | (y != y), x, y)

    def clip(self, x: Any, lower: Any, upper: Any) -> Any:
        """`torch.clip`."""
        return self.minimum(self.maximum(x, lower), upper)

    def isfinite(self, x: Value) -> Value:
        """`torch.isfinite`."""
        return abs(x) < math.inf

    def sqrt(self, x: Value) -> Value:
        """`torch.sqrt`."""
        return self.of("tl.sqrt_rn({})", (x,), FLOAT)

    def exp(self, x: Value) -> Value:
        """`torch.exp`."""
        return self.of("exponential({})", (x.to(FLOAT),), FLOAT)

    def tanh(self, x: Value) -> Value:
        """`torch.tanh`."""
        return self.of("tangent({})", (x.to(FLOAT),), FLOAT)

    def sum(self, x: Value) -> Value:
        """`torch.sum` of a vector."""
        return self.of("total({}, {})", (x, self.inside(x)), FLOAT, scalar=True)

    def zeros_like(self, x: Value, dtype: str | None = None) -> Value:
        """`torch.zeros_like`."""
        return self._full_like(x, 0, dtype)

    def ones_like(self, x: Value, dtype: str | None = None) -> Value:
        """`torch.ones_like`."""
        return self._full_like(x, 1, dtype)

    def arange(self, length: int, dtype: str = INT) -> Value:
        """`torch.arange`."""
        block = lanes(length)
        value = self._value(f"tl.arange(0, {block})", (), INT, block, length, ("arange", length, 0))
        return value.to(dtype)

    def roll(self, x: Value, shift: int) -> Value:
        """`torch.roll` of a vector: what it is computed of is read from elsewhere."""
        if not x.block:
            return x
        if not x.source:  # a mask of lanes has no arguments, and stays as it is
            args = [self.roll(arg, shift) for arg in x.args]
            return self.of(x.text, args, x.kind) if args else x
        what, name, before = x.source
        if what == "ring":
            return self._ring(name, x.block, x.length, (before + shift) % len(x))
        shift = (before + shift) % len(x)
        text = f"(tl.arange(0, {x.block}) + {len(x) - shift}) % {x.length}"
        return self._value(text, (), INT, x.block, x.length, ("arange", name, shift))

    # How all of it is written.

    def of(self, text: str, args: Sequence[Value], kind: str, *, scalar: bool = False) -> Value:
        """The value of an expression."""
        vector = next((arg for arg in args if arg.block), None)
        if scalar or vector is None:
            return self._value(text, args, kind, 0, 0, ())
        if {(arg.block, arg.length) for arg in args if arg.block} != {
            (vector.block, vector.length)
        }:
            raise NotRecordedError("vectors of different lengths")
        return self._value(text, args, kind, vector.block, vector.length, ())

    def _value(
        self, text: str, args: Sequence[Value], kind: str, block: int, length: int | str,
        source: tuple[Any, ...],
    ) -> Value:  # fmt: skip
        key = (text, tuple(arg.number for arg in args), kind, source, block, length)
        if key not in self._known:
            self._known[key] = Value(self, text, args, kind, block, length, source)
        return self._known[key]

    def add(self, value: Value) -> int:
        """Takes a value in, in order; returns its number."""
        self._values.append(value)
        return len(self._values) - 1

    def constant(self, value: Any, kind: str) -> Value:
        """A number that is known now.

        Raises:
            NotRecordedError: where it is none, or float32 has it as a denormal one alone.
        """
        if kind == FLOAT:
            return self.of(f"tl.full((), {literal(float(value))}, tl.float32)", (), FLOAT)
        return self.of(f"tl.full((), {int(value)}, {kind})", (), kind)

    def arithmetic(self, text: str, x: Any, y: Any) -> Value:
        """An operation on two numbers of one kind, which they are made."""
        x, y = self._alike(x, y)
        if x.kind == BOOL and bool(x.block) != bool(y.block):  # the interpreter spreads numbers
            return self.of(text, (x.to(INT), y.to(INT)), INT) != 0
        return self.of(text, (x, y), x.kind)

    def compared(self, text: str, x: Any, y: Any) -> Value:
        """A comparison."""
        return self.of(text, self._alike(x, y), BOOL)

    def divided(self, x: Any, y: Any) -> Value:
        """A quotient, rounded as IEEE says."""
        x, y = (v.to(FLOAT) if isinstance(v, Value) else self.constant(v, FLOAT) for v in (x, y))
        return self.of("tl.div_rn({}, {})", (x, y), FLOAT)

    def inside(self, x: Value) -> Value:
        """Which lanes of a vector there are."""
        if not x.block:
            raise NotRecordedError("a scalar in the place of a vector")
        text = f"tl.arange(0, {x.block}) < {x.length}"
        return self._value(text, (), BOOL, x.block, x.length, ())

    def _full_like(self, x: Value, value: int, dtype: str | None) -> Value:
        full = self.constant(value, dtype or x.kind)
        if not x.block:
            return full
        return self.of("tl.where({}, {}, {})", (self.inside(x), full, full), full.kind)

    def _alike(self, x: Any, y: Any) -> tuple[Value, Value]:
        kinds = [v.kind if isinstance(v, Value) else _kind_of(v) for v in (x, y)]
        kind = max(kinds, key=_ORDER.index)
        one, other = (
            v.to(kind) if isinstance(v, Value) else self.constant(v, kind) for v in (x, y)
        )
        return one, other

    def source(self, name: str) -> str:
        """The kernel's source: all is read, then computed, then written."""
        needed: set[int] = set()
        waiting = [value for _, value in self._stores]
        while waiting:
            value = waiting.pop()
            if value.number not in needed:
                needed.add(value.number)
                waiting += value.args
        chosen = [value for value in self._values if value.number in needed]
        loads = [value for value in chosen if value.text.startswith("tl.load(")]
        rest = [value for value in chosen if not value.text.startswith("tl.load(")]
        lines = [*map(_line, loads), "tl.debug_barrier()  # before anything is replaced"]
        lines += [*map(_line, rest)]
        lines += [text.format(f"v{value.number}") for text, value in self._stores]
        head = f"def {name}({', '.join(self._types)}):"
        return "\n".join([head, *(f"    {line}" for line in lines), ""])

    @property
    def types(self) -> dict[str, str]:
        """The types of the kernel's arguments by their names, in order."""
        return dict(self._types)


def _line(value: Value) -> str:
    names = (f"v{arg.number}" for arg in value.args)
    return f"v{value.number} = {value.text.format(*names)}"


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT
    if isinstance(value, float):
        return FLOAT
    raise NotRecordedError(f"{type(value).__name__} in a formula")
