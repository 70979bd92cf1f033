"""Reverse-mode differentiation of the layers over any array namespace, and what each op returned.

The reference model trains with it in NumPy, PyTorch and JAX alike, so that one written definition
is compared, and every operation's result can be named.
"""

from collections.abc import Callable
from typing import Any

from cruxy_exact._namespace import zeros

Record = Callable[[str, Any], None]


class Node:
    """An array on a tape, and its gradient after `Tape.backward`."""

    def __init__(self, value: Any, parents: tuple["Node", ...] = (), name: str = "") -> None:
        self.value, self.parents, self.name = value, parents, name
        self.grad: Any = None
        self.backward: Callable[[Any], tuple[Any, ...]] | None = None


class Tape:
    """A list of operations, each of which can be undone.

    Args:
        xp: the array namespace.
        record: is told the name and the value of every result, forward and backward.
    """

    def __init__(self, xp: Any, record: Record | None = None) -> None:
        self.xp = xp
        self.record = record or (lambda name, value: None)
        self.nodes: list[Node] = []

    def apply(
        self,
        name: str,
        forward: Any,
        backward: Any,
        nodes: tuple[Node, ...],
        *rest: Any,
        **options: Any,
    ) -> Node:
        """A pair of `layers` or `attention` on nodes.

        Args:
            name: of this use of it.
            forward: `NAME_forward`.
            backward: `NAME_backward`.
            nodes: the arrays that get gradients; they come first.
            rest: its other arguments.
            options: its options by name.
        """
        values = [node.value for node in nodes]
        value, kept = forward(*values, *rest, xp=self.xp, **options)
        self.record(f"{name} forward", value)
        node = Node(value, nodes, name)
        node.backward = lambda g: backward(kept, g, xp=self.xp)
        self.nodes.append(node)
        return node

    def backward(self, node: Node) -> None:
        """Gives every node before this one, a scalar, its gradient."""
        node.grad = zeros((), self.xp.float32, node.value, xp=self.xp) + 1.0
        for at in reversed(self.nodes):
            if at.grad is None or at.backward is None:
                continue
            for i, (parent, g) in enumerate(zip(at.parents, at.backward(at.grad), strict=True)):
                self.record(f"{at.name} backward {i}", g)
                parent.grad = g if parent.grad is None else parent.grad + g
