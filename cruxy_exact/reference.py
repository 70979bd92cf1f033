"""The reference model: a small GPT, its data, and its training, in any array namespace.

`python -m cruxy_exact verify` trains it and compares every bit with what is published.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cruxy_exact import accumulate, attention, initial, layers, optimizers
from cruxy_exact._namespace import count_up, join, zeros
from cruxy_exact.arithmetic import f32, mul, settle, sub
from cruxy_exact.driven import Driven, Group, Leaf
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_exact.random_bits import random_bits, stream_key
from cruxy_exact.tape import Node, Record, Tape

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A GPT and how it is trained.

    Attributes:
        vocabulary: tokens that there are.
        width: of the model.
        heads: of attention.
        blocks: of attention and a hidden layer four times as wide.
        length: of a sequence.
        batch: sequences in a batch.
        keep: 256ths of what dropout keeps.
        lr: the learning rate of AdamW.
        clip: of the global norm.
        seed: of all random bits.
        grain: sequences in a grain; `None` takes the batch as one, without grains.
        precision: of the matrix products.
        driver: Adam under a law in the place of AdamW and its clip; `None` for those.
    """

    vocabulary: int = 64
    width: int = 64
    heads: int = 4
    blocks: int = 2
    length: int = 32
    batch: int = 8
    keep: int = 230
    lr: float = 3e-3
    clip: float = 1.0
    seed: int = 7
    grain: int | None = None
    precision: Precision = DEFAULT
    driver: Driven | None = None

    def shapes(self) -> dict[str, tuple[tuple[int, ...], float | None]]:
        """The parameters: their shapes, and the scale of their uniform values; `None` for ones."""
        width, out = self.width, {}

        def linear(name: str, rows: int, columns: int) -> None:
            out[f"{name}.w"] = ((rows, columns), 1 / math.sqrt(rows))
            out[f"{name}.b"] = ((columns,), 0.0)

        def norm(name: str) -> None:
            out[f"{name}.w"] = ((width,), None)
            out[f"{name}.b"] = ((width,), 0.0)

        out["tok"] = ((self.vocabulary, width), 0.03)
        out["pos"] = ((self.length, width), 0.03)
        for i in range(self.blocks):
            norm(f"{i}.ln1")
            norm(f"{i}.ln2")
            linear(f"{i}.qkv", width, 3 * width)
            linear(f"{i}.o", width, width)
            linear(f"{i}.up", width, 4 * width)
            linear(f"{i}.dn", 4 * width, width)
        norm("ln")
        linear("head", width, self.vocabulary)
        return out

    def init(self, like: Any, *, xp: Any) -> Arrays:
        """The parameters before the first step, where `like` lies."""
        params, leaf = {}, 0
        for name, (shape, scale) in self.shapes().items():
            if "ln" in name:
                params[name] = zeros(shape, xp.float32, like, xp=xp) + (scale is None)
                continue
            leaf += 1
            key = self.key(0, leaf, like, xp=xp)
            params[name] = initial.uniform(shape, scale or 0.0, key, xp=xp)
        return params

    def key(self, step: Any, leaf: int, like: Any, *, xp: Any) -> Any:
        """The key of a stream of random bits; int32, `()`."""
        return stream_key(zeros((), xp.int32, like, xp=xp) + step, self.seed, leaf, xp=xp)

    def data(self, step: Any, like: Any, *, xp: Any) -> tuple[Any, Any]:
        """The tokens of a step and the ones that follow; half of these can be learned.

        Args:
            step: its number from 0; an int or an int32 array `()`.
            like: an array on the device.
            xp: the array namespace.

        Returns:
            Two int32 arrays, `[batch, length]`.
        """
        row = self.length + 1
        index = count_up(self.batch * row, like, xp=xp)
        key = self.key(step, 500, like, xp=xp)
        ids = (((random_bits(key, index) >> 8) & 0xFFFF) % self.vocabulary).reshape(self.batch, row)
        before = join([ids[:, :1], ids[:, :-1]], 1, xp=xp)
        odd = count_up(row, like, xp=xp) % 2 == 1
        ids = xp.where(odd, (before * 5 + 3) % self.vocabulary, ids)
        return ids[:, :-1], ids[:, 1:]

    def loss(self, params: Mapping[str, Node], x: Any, y: Any, keys: list[Any], tape: Tape) -> Node:
        """The sum of the cross entropy over all tokens, on a tape."""
        apply, precision = tape.apply, self.precision

        def linear(name: str, h: Node) -> Node:
            nodes = (h, params[f"{name}.w"], params[f"{name}.b"])
            forward, backward = layers.linear_forward, layers.linear_backward
            return apply(name, forward, backward, nodes, precision=precision)

        def norm(name: str, h: Node) -> Node:
            nodes = (h, params[f"{name}.w"], params[f"{name}.b"])
            return apply(name, layers.layer_norm_forward, layers.layer_norm_backward, nodes)

        def residual(name: str, h: Node, branch: Node, key: Any) -> Node:
            forward, backward = layers.dropout_forward, layers.dropout_backward
            branch = apply(f"{name} dropout", forward, backward, (branch,), key, self.keep)
            pair = layers.add_forward, layers.add_backward
            return apply(f"{name} residual", *pair, (h, branch))

        embed = layers.embed_forward, layers.embed_backward
        places = count_up(self.length, x, xp=tape.xp)
        places = tape.xp.broadcast_to(places, tuple(x.shape))
        tokens = apply("tok", *embed, (params["tok"],), x)
        h = apply("pos", *embed, (params["pos"],), places)
        h = apply("embedded", layers.add_forward, layers.add_backward, (tokens, h))
        heads = attention.fused_attention_forward, attention.fused_attention_backward
        for i in range(self.blocks):
            a = linear(f"{i}.qkv", norm(f"{i}.ln1", h))
            a = apply(f"{i}.attention", *heads, (a,), self.heads, precision=precision)
            h = residual(f"{i}.o", h, linear(f"{i}.o", a), keys[2 * i])
            a = linear(f"{i}.up", norm(f"{i}.ln2", h))
            a = apply(f"{i}.gelu", layers.gelu_forward, layers.gelu_backward, (a,))
            h = residual(f"{i}.dn", h, linear(f"{i}.dn", a), keys[2 * i + 1])
        logits = linear("head", norm("ln", h))
        entropy = layers.cross_entropy_forward, layers.cross_entropy_backward
        losses = apply("cross entropy", *entropy, (logits,), y)
        return apply("loss", layers.sum_forward, layers.sum_backward, (losses,))

    def gradients(
        self,
        params: Arrays,
        x: Any,
        y: Any,
        keys: list[Any],
        *,
        xp: Any,
        record: Record | None = None,
    ) -> tuple[Any, Arrays]:
        """The summed loss, and the gradient of every parameter."""
        tape, nodes = Tape(xp, record), {name: Node(p) for name, p in params.items()}
        loss = self.loss(nodes, x, y, keys, tape)
        tape.backward(loss)
        return loss.value, {name: settle(node.grad, xp=xp) for name, node in nodes.items()}

    def dropout_keys(self, step: Any, sample: int, like: Any, *, xp: Any) -> list[Any]:
        """The keys of one step's dropouts; of one grain's where there are grains."""
        first = 1000 + 64 * sample
        return [self.key(step, first + i, like, xp=xp) for i in range(2 * self.blocks)]

    def start(self, like: Any, *, xp: Any) -> "State":
        """Parameters, moments and products of decay rates before the first step."""
        params = self.init(like, xp=xp)
        one = zeros((), xp.float32, like, xp=xp) + 1.0
        empty = {name: xp.zeros_like(p) for name, p in params.items()}
        state = State(params, empty, dict(empty), one, one)
        if self.driver is None:
            return state
        averages = dict(params) if self.driver.averaging is not None else {}
        return state._replace(driven=self.driver.init(one * 0, xp=xp), averages=averages)

    def step(
        self,
        state: "State",
        step: Any,
        *,
        xp: Any,
        record: Record | None = None,
        data: Callable[..., tuple[Any, Any]] | None = None,
    ) -> tuple["State", Any]:
        """One step of training.

        Args:
            state: the last step's.
            step: the number of this one, from 0; an int or an int32 array `()`.
            xp: the array namespace.
            record: is told every operation's result.
            data: in place of `self.data`.

        Returns:
            The new state, and the loss a token.
        """
        params, like = state.params, state.product1
        x, y = (data or self.data)(step, like, xp=xp)
        if self.grain is None:
            keys = self.dropout_keys(step, 0, like, xp=xp)
            loss, grads = self.gradients(params, x, y, keys, xp=xp, record=record)
        else:
            loss, grads = self._by_grains(params, x, y, step, xp, record)
        share = f32(1 / (self.batch * self.length))
        grads = {name: mul(g, share, xp=xp) for name, g in grads.items()}
        loss = mul(loss, share, xp=xp)
        if self.driver is not None:
            return self.drive(self.driver, state, grads, loss, xp=xp, record=record), loss
        return self.update(state, grads, xp=xp, record=record), loss

    def _by_grains(
        self, params: Arrays, x: Any, y: Any, step: Any, xp: Any, record: Record | None
    ) -> tuple[Any, Arrays]:
        n = self.grain or self.batch
        sums = {name: accumulate.empty(p, xp=xp) for name, p in params.items()}
        whole = None
        for i in range(self.batch // n):
            rows, keys = slice(i * n, (i + 1) * n), self.dropout_keys(step, i, x, xp=xp)
            loss, grads = self.gradients(params, x[rows], y[rows], keys, xp=xp, record=record)
            whole = accumulate.empty(loss, xp=xp) if whole is None else whole
            whole = accumulate.push(whole, loss, xp=xp)
            sums = {name: accumulate.push(sums[name], g, xp=xp) for name, g in grads.items()}
        values = {name: accumulate.value(grains, xp=xp) for name, grains in sums.items()}
        return accumulate.value(whole, xp=xp), values  # pyright: ignore[reportArgumentType]

    def update(
        self, state: "State", grads: Arrays, *, xp: Any, record: Record | None = None
    ) -> "State":
        """AdamW on gradients clipped by their global norm."""
        record = record or (lambda name, value: None)
        norm = optimizers.global_norm(list(grads.values()), xp=xp)
        record("global norm", norm)
        factor = optimizers.clip_factor(norm, self.clip, xp=xp)
        products = (state.product1, state.product2)
        product1, product2 = optimizers.next_products(products, (0.9, 0.999), xp=xp)
        factors = optimizers.adam_factors(product1, product2, xp=xp)
        new = State({}, {}, {}, product1, product2)
        for name, p in state.params.items():
            g = mul(grads[name], factor, xp=xp)
            out = optimizers.adamw(p, g, state.m[name], state.v[name], factors, lr=self.lr, xp=xp)
            record(f"{name} update", out[0])
            new.params[name], new.m[name], new.v[name] = out
        return new

    def drive(
        self,
        driver: Driven,
        state: "State",
        grads: Arrays,
        loss: Any,
        *,
        xp: Any,
        record: Record | None = None,
    ) -> "State":
        """Adam under the law of `driver`, with the usual options of a self-driving run."""
        record = record or (lambda name, value: None)
        group = Group(1e-3, 0.9, 0.99, 1e-8, (state.product1, state.product2))
        leaves = [
            Leaf(p, grads[name], state.m[name], state.v[name], state.averages.get(name), 1e-4)
            for name, p in state.params.items()
        ]
        driven, [products], moved = driver.step(state.driven, [group], leaves, loss, xp=xp)
        new = State({}, {}, {}, *products, driven, {})
        for (name, p), leaf in zip(state.params.items(), moved, strict=True):
            new.params[name], new.m[name], new.v[name] = sub(p, leaf.change, xp=xp), leaf.m, leaf.v
            record(f"{name} update", new.params[name])
            if leaf.average is not None:
                new.averages[name] = leaf.average
                record(f"{name} average", leaf.average)
        return new


class State(NamedTuple):
    """What training the reference model keeps.

    Attributes:
        params: the parameters by name; float32.
        m: their first moments.
        v: their second moments.
        product1: of the decay rates of the first moment so far; float32, `()`.
        product2: of those of the second.
        driven: of `Driven`, where there is one.
        averages: of the parameters, where they are kept; likewise.
    """

    params: Arrays
    m: Arrays
    v: Arrays
    product1: Any
    product2: Any
    driven: Any = ()
    averages: Any = ()
