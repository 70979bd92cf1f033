"""The instruments measure what they say."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks._jax.hlo import copied_bytes, host_calls, reads_of_parameters
from benchmarks._shapes import SIZES
from benchmarks._timing import interleave, summary


def test_sizes_are_about_what_their_names_say():
    unit = {"m": 1e6, "b": 1e9}
    for name, shapes in SIZES.items():
        count = sum(jnp.prod(jnp.array(shape, float)).item() for shape in shapes.values())
        assert count == pytest.approx(float(name[:-1]) * unit[name[-1]], rel=0.35), name


def test_ratio_is_taken_round_by_round():
    rows = summary({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}, "a")
    assert rows["b"]["ratio"] == 2.0
    assert rows["b"]["ratio_quartiles"] == [2.0, 2.0]
    assert rows["a"]["milliseconds"] == 2000.0


def test_rounds_are_interleaved_and_warm_ups_left_out():
    seen = []

    def candidate(name):
        return lambda: seen.append(name) or 1.0

    times = interleave({"a": candidate("a"), "b": candidate("b")}, repeats=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert [set(seen[i : i + 2]) for i in range(0, len(seen), 2)] == [{"a", "b"}] * 7


def compiled(fn, *arguments):
    return jax.jit(fn, keep_unused=True).lower(*arguments).compile().as_text()


def test_reads_of_a_gradient_are_counted():
    x = jnp.ones((64, 64))
    once = compiled(lambda x, y: (y * 2.0 + x,), x, x)
    assert reads_of_parameters(once, {1}) == [1]
    twice = compiled(lambda x, y: (jnp.sort(y), jnp.sum(y), x), x, x)
    assert reads_of_parameters(twice, {1})[0] >= 2


def test_host_callback_is_seen():
    def noisy(x):
        jax.debug.callback(lambda v: None, x)
        return x * 2

    assert host_calls(compiled(noisy, jnp.ones(3))) > 0
    assert host_calls(compiled(lambda x: x * 2, jnp.ones(3))) == 0


def test_copies_are_counted_in_bytes():
    text = "ENTRY %main (p: f32[64,64]) -> f32[64,64] {\n  %c = f32[64,64]{1,0} copy(%p)\n}\n"
    assert copied_bytes(text) == 64 * 64 * 4
