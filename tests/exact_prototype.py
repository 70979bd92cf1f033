"""Trains the reference on the data the design was tried on, and prints the digest it had there.

python tests/exact_prototype.py numpy|torch|jax [engine] [grain]
"""

import hashlib
import sys

import numpy as np

from cruxy_exact import verify as check
from cruxy_exact.engines import Precision, choose
from cruxy_exact.reference import Reference

WHOLE, GRAINS = "02ba27413edb67d1", "63214237201023d8"
"""The digests after 50 steps, of the batch as one and of grains of one sequence."""


def batches(step, like, *, xp):
    ids = np.random.default_rng(int(step)).integers(0, 64, (8, 33)).astype(np.int32)
    ids[:, 1::2] = (ids[:, 0::2][:, :16] * 5 + 3) % 64
    convert = xp.from_numpy if xp.__name__ == "torch" else xp.asarray
    return convert(ids[:, :-1].copy()), convert(ids[:, 1:].copy())


def digest(params):
    h = hashlib.sha256()
    for name in sorted(params):
        x = np.ascontiguousarray(np.asarray(params[name]))
        h.update(f"{name}:{x.shape}".encode() + x.astype("<f4").tobytes())
    return h.hexdigest()[:16]


def main(name, engine="f64", grain=None):
    where = check.framework(name)
    with where.around():  # an engine that is not exact here is replaced
        precision = choose(Precision(engine=engine), where.like, xp=where.xp)
    reference = Reference(grain=grain, precision=precision)
    if name != "jax":
        state, _, _ = check.train(where, reference, 50, data=batches)
        return digest(state.params)
    import jax

    def step(state, count, x, y):
        data = lambda step, like, *, xp: (x, y)  # noqa: E731
        return reference.step(state, count, xp=where.xp, data=data)[0]

    with where.around():
        start = jax.jit(lambda: reference.start(where.like, xp=where.xp))
        state, call = start(), jax.jit(step)
        for count in range(50):
            state = call(state, count, *batches(count, where.like, xp=where.xp))
        return digest(state.params)


if __name__ == "__main__":
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
