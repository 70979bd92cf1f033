"""The reference model built of JAX's exact functions, and the runs that have to have its bits.

`python tests/exact_jax.py '{"data": "design"}'` trains it and prints its hash.
"""

import hashlib
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import usual

DESIGN = {None: "02ba27413edb67d1", 1: "63214237201023d8"}
"""The hashes of the design's data, by grain; of names, shapes and bytes alone."""
STEPS = 50


def design_data(reference, step):
    """Tokens from NumPy's generator, half of which can be learned."""
    shape = (reference.batch, reference.length + 1)
    ids = np.random.default_rng(step).integers(0, reference.vocabulary, shape).astype(np.int32)
    ids[:, 1::2] = (ids[:, 0::2][:, : ids[:, 1::2].shape[1]] * 5 + 3) % reference.vocabulary
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def own_data(reference, step):
    """The reference's own tokens."""
    with np.errstate(all="ignore"):
        return reference.data(step, np.zeros(1, np.float32), xp=np)


def init(reference):
    with np.errstate(all="ignore"):
        return reference.init(np.zeros(1, np.float32), xp=np)


def optimizer(exact, r):
    if r.driver is not None:
        return optax.chain(exact.scale_by_count(r.batch * r.length), exact.self_driving())
    return optax.chain(
        exact.scale_by_count(r.batch * r.length),
        exact.clip_by_global_norm(r.clip),
        exact.adamw(r.lr),
    )


def train(exact, r, steps, data=own_data, place=lambda p: p, put=jnp.asarray, begin=None):
    """Trains over the whole batch; `place` shards the parameters, `put` the data."""
    tx = optax.with_extra_args_support(optimizer(exact, r))
    params = place({name: jnp.asarray(p) for name, p in init(r).items()})
    first, params, state = begin or (0, params, tx.init(params))

    @usual.jit
    def step(params, state, x, y, count):
        loss = lambda p: exact.reference_loss(r, p, x, y, count)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        value = exact.scale(value, 1 / (r.batch * r.length))
        updates, state = tx.update(grads, state, params, value=value)
        return exact.apply_updates(params, updates), state

    for count in range(first, steps):
        x, y = map(put, data(r, count))
        params, state = step(params, state, x, y, jnp.int32(count))
    return params, state


def train_by_grains(exact, r, steps, devices=1, calls=1, data=own_data, **options):
    """Grains of `r.grain` sequences over devices (`shard_map`) and calls."""
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    inner = optax.chain(exact.clip_by_global_norm(r.clip), exact.adamw(r.lr))
    inner = inner if r.driver is None else exact.self_driving()
    tx = exact.accumulate_grains(inner, every=calls, count=r.batch * r.length)
    params = {name: jnp.asarray(p) for name, p in init(r).items()}
    state = tx.init(params)

    def local(params, x, y, numbers, count):
        def body(grains, batch):
            x, y, number = batch
            loss = lambda p: exact.reference_loss(r, p, x, y, count, grain=number)  # noqa: E731
            return exact.add_grain(grains, jax.value_and_grad(loss)(params)), None

        params = jax.lax.pcast(params, "d", to="varying")
        zero = jax.lax.pcast(jnp.zeros(()), "d", to="varying")
        grains, _ = jax.lax.scan(body, exact.no_grains((zero, params)), (x, y, numbers))
        return exact.all_reduce_grains(grains, "d")

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d"), P()), out_specs=P(), **options
    )

    @usual.jit
    def step(params, state, x, y, numbers, count):
        losses, grains = spread(params, x, y, numbers, count)
        value = exact.scale(exact.grain_sum(losses), 1 / (r.batch * r.length))
        updates, state = tx.update(grains, state, params, value=value)
        return exact.apply_updates(params, updates), state

    for count in range(steps):
        x, y = data(r, count)
        x, y = (a.reshape(-1, r.grain, r.length) for a in (x, y))
        for part in np.array_split(np.arange(len(x), dtype=np.int32), calls):
            params, state = step(params, state, x[part], y[part], part, jnp.int32(count))
    return params, state


def sharded(data, model):
    """How parameters and data lie on `data * model` devices."""
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def spec(name):
        if name.endswith(("qkv.w", "up.w", "head.w")):
            return P(None, "model")
        if name.endswith(("o.w", "dn.w")) or name == "tok":
            return P("model", None)
        return P("model") if name.endswith(("qkv.b", "up.b", "head.b")) else P()

    def place(params):
        return {k: jax.device_put(p, NamedSharding(mesh, spec(k))) for k, p in params.items()}

    return place, lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))


def design_hash(params):
    """The design's hash: no header."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def without_settle():
    """Takes `settle` out of every operation: a control that has to differ."""
    from cruxy_exact import arithmetic

    original = arithmetic.settle
    for module in [m for name, m in sys.modules.items() if name.startswith("cruxy_exact")]:
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, lambda x, *, xp: x)


def main(options):
    """Trains as told and prints the hash."""
    from cruxy_exact.reference import Reference

    if "control" in options:  # hides what would be refused, once XLA has read it
        jax.devices()
        os.environ["XLA_FLAGS"] = ""
    from cruxy_optax import exact
    from cruxy_optax.exact import _frame

    if "control" in options:
        _frame.check_machine = lambda platform: None
    if options.get("control") == "settle":
        without_settle()
    grain = options.get("grain")
    precision = exact.Precision(20, options.get("engine", "f64"))
    reference = Reference(grain=grain, precision=precision)
    data = {"design": design_data, "own": own_data}[options.get("data", "design")]
    steps = options.get("steps", STEPS)
    if grain is None:
        place, put = (
            sharded(*options["mesh"]) if "mesh" in options else ((lambda p: p), jnp.asarray)
        )
        params, _ = train(exact, reference, steps, data, place, put)
    else:
        split = options.get("devices", 1), options.get("calls", 1)
        params, _ = train_by_grains(exact, reference, steps, *split, data)
    print(design_hash(params))
    print(exact.checksum(params, grain=grain))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
