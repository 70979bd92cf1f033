"""Compressed means and the vote in `shard_map`: bytes in HLO, no bias, devices alike, the guard."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import cruxy_optax
from cruxy_exact.random_bits import random_bits, stream_key
from cruxy_optax import average_gradients, compressed_pmean, meta3, meta_lion, telemetry, wire_bytes
from jax_versions import varying

DEVICES = 4
every_width = pytest.mark.parametrize("bits", [8, 4])


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


def shard_map(**specs):
    return functools.partial(jax.shard_map, mesh=mesh(), **specs)


def gradients(seed=0):
    """Another for each device, along a first axis."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(DEVICES, 96, 50)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(DEVICES, 7)) * 1e-3, jnp.float32),
    }


def params():
    return jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), gradients())


def own(tree):
    return jax.tree.map(lambda x: x[0], tree)


@functools.cache
def mean_of(bits):
    """The compressed mean as every device has it, of gradients and the number of the step."""

    @jax.jit
    @shard_map(in_specs=(P("data"), P()), out_specs=P("data"))
    def mean(grads, step):
        return jax.tree.map(
            lambda x: varying(x[None], "data"),
            compressed_pmean(own(grads), "data", bits, step=step),
        )

    return mean


def sent_by(text):
    """Bytes that each device hands to others, from the shapes of collectives in HLO."""
    sizes = {"u8": 1, "s8": 1, "u16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
    sent = 0
    for line in text.splitlines():
        found = re.search(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter)\(", line)
        if not found:
            continue
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        whole = sum(
            sizes[kind] * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
            for kind, dims in shapes
        )
        share = {"all-to-all": 1, "all-gather": 1, "all-reduce": 2, "reduce-scatter": DEVICES}
        sent += share[found[2]] * whole * (DEVICES - 1) // DEVICES
    return sent


class TestMean:
    """`compressed_pmean` and what is built on it."""

    @every_width
    def test_the_wire_carries_the_bytes_that_are_reported_and_no_float32(self, bits):
        text = mean_of(bits).lower(gradients(), jnp.int32(0)).compile().as_text()
        reported = wire_bytes(params(), DEVICES, bits)
        assert sent_by(text) == reported.sent
        assert not re.search(r"f32\S* all-(reduce|gather|to-all)", text)
        assert reported.uncompressed / reported.sent > (3.6 if bits == 8 else 7.0)

    def test_what_is_uncompressed_is_what_pmean_sends(self):
        plain = jax.jit(
            shard_map(in_specs=P("data"), out_specs=P())(lambda g: jax.lax.pmean(own(g), "data"))
        )
        text = plain.lower(gradients()).compile().as_text()
        assert sent_by(text) == wire_bytes(params(), DEVICES).uncompressed

    @every_width
    def test_all_devices_have_the_same_bits_and_nearly_the_mean(self, bits):
        grads = gradients()
        got = mean_of(bits)(grads, jnp.int32(3))
        for name, leaf in got.items():
            want = grads[name].mean(0)
            assert all(bool((leaf[0] == leaf[d]).all()) for d in range(DEVICES))
            error = jnp.linalg.norm(leaf[0] - want) / jnp.linalg.norm(want)
            assert 0 < error < (0.03 if bits == 8 else 0.4)

    @every_width
    def test_the_mean_of_200_averages_is_the_exact_one(self, bits):
        grads = gradients(1)
        draws = [mean_of(bits)(grads, jnp.int32(step)) for step in range(200)]
        for name, leaf in grads.items():
            each = np.stack([np.asarray(d[name][0], np.float64) for d in draws])
            exact = np.asarray(leaf, np.float64).mean(0)
            deviation = each.std(0, ddof=1)
            some = deviation > 0
            z = np.abs(each.mean(0) - exact)[some] / (deviation[some] / 200**0.5)
            # Of 4,800 normal numbers 13 lie beyond 3 and none beyond 6.
            assert some.mean() > 0.9
            assert (z > 3.0).mean() < 0.01
            assert z.max() < 6.0

    def test_one_devices_nan_skips_the_step_on_all(self):
        rate = cruxy_optax.scale_by_meta_learning_rate(0.01)
        guarded = cruxy_optax.stabilize(rate, axis_names="data")
        tx = optax.chain(average_gradients("data"), guarded)
        state = tx.init(params())

        @jax.jit
        @shard_map(in_specs=(P("data"), P()), out_specs=(P(), P()))
        def step(grads, state):
            return tx.update(own(grads), state, params(), value=1.0)

        updates, state = step(gradients(), state)
        assert all(bool((u != 0).any()) for u in jax.tree.leaves(updates))
        bad = gradients()
        bad["w"] = bad["w"].at[2, 5, 5].set(jnp.nan)
        updates, state = step(bad, state)
        assert all(bool((u == 0).all()) for u in jax.tree.leaves(updates))
        assert telemetry(state)["skipped_total"] == 1

    def test_bits_of_none_is_the_exact_mean(self):
        tx = average_gradients("data", bits=None)

        @jax.jit
        @shard_map(in_specs=P("data"), out_specs=P())
        def mean(grads):
            return tx.update(own(grads), tx.init(None))[0]

        got, grads = mean(gradients()), gradients()
        for name, leaf in got.items():
            np.testing.assert_allclose(leaf, grads[name].mean(0), rtol=1e-5, atol=1e-6)

    def test_gradients_that_were_added_up_already_are_refused(self):
        @shard_map(in_specs=(P(), P("data")), out_specs=P())
        def step(params, x):
            grads = jax.grad(lambda p: jnp.sum(p * x))(params)
            return compressed_pmean(grads, "data", step=0)

        with pytest.raises(ValueError, match=r"must be each device's own along 'data'"):
            step(jnp.ones(8), jnp.ones((DEVICES, 8)))

    def test_integers_and_other_bits_are_refused(self):
        mean = shard_map(in_specs=P("data"), out_specs=P())(
            lambda g: compressed_pmean(g, "data", step=0)
        )
        with pytest.raises(ValueError, match="must be real and of 16 or 32 bits an element"):
            mean(jnp.ones((DEVICES, 8), jnp.int32))
        with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
            average_gradients("data", bits=2)

    def test_a_wider_mesh_of_one_device_sends_nothing(self):
        assert wire_bytes(params(), 1).sent == 0
        one = Mesh(np.array(jax.devices()[:1]), ("data",))
        mean = jax.jit(
            jax.shard_map(
                lambda g: compressed_pmean(g, "data", step=0),
                mesh=one,
                in_specs=P("data"),
                out_specs=P(),
            )
        )
        np.testing.assert_array_equal(mean(jnp.arange(8.0)), jnp.arange(8.0))


@functools.cache
def voting(seed=0):
    """One step of `meta_lion(vote=)`, and the state before it, on the mesh."""
    tx = meta_lion(0.01, vote="data", weight_decay=0.0)
    specs = cruxy_optax.vote_specs(tx, params(), "data")
    init = jax.jit(shard_map(in_specs=P(), out_specs=specs)(tx.init))

    @jax.jit
    @shard_map(in_specs=(P("data"), specs, P("data")), out_specs=(P(), specs))
    def step(grads, state, loss):
        return tx.update(own(grads), state, params(), value=loss[0])

    return step, init(params())


def vote_gradients(seed):
    grads = gradients(seed)
    sides = jnp.array([1.0, -1.0, 1.0, -1.0])[:, None, None]
    w = grads["w"].at[:, :30].set(jnp.abs(grads["w"][:, :30]) * sides)  # two against two
    return {**grads, "w": w.at[:, 30:40].set(0.0)}  # nobody says anything


class TestVote:
    """`meta_lion(vote=)`."""

    def test_it_is_numpys_majority_with_the_coin_in_ties(self):
        step, state = voting()
        losses = jnp.ones(DEVICES)
        for seed in (5, 6):
            grads, before = vote_gradients(seed), state
            updates, state = step(grads, state, losses)
        shown = telemetry(state)
        beta1, scale = np.float32(shown["beta1"]), np.float32(shown["clip_scale"])
        lion = before.inner_state[1]
        leaves = sorted(grads)
        for leaf, name in enumerate(leaves):
            g, m = np.asarray(grads[name]), np.asarray(lion.mu[name])
            c = beta1 * m + (1 - beta1) * g * scale
            index = np.arange(c[0].size, dtype=np.int32).reshape(c[0].shape)
            with np.errstate(over="ignore"):
                key = stream_key(np.int32(0), 0, leaf, xp=np)
                coin = (random_bits(key, index) < 0) ^ True  # the second step turns it over
            votes = np.where(c == 0.0, coin, c > 0.0)
            ayes = votes.sum(0)
            want = np.where(2 * ayes == DEVICES, coin, 2 * ayes > DEVICES)
            sure = (np.abs(c) > 1e-5 * np.abs(c).max()).all(0) | (c == 0.0).all(0)
            assert sure.mean() > 0.99
            got = np.asarray(updates[name])
            np.testing.assert_array_equal((got < 0)[sure], want[sure])
            assert np.ptp(np.abs(got)) == 0.0
        assert (ayes.shape, lion.mu["w"].shape) == ((96, 50), (DEVICES, 96, 50))
        assert (2 * ayes == DEVICES).sum() > 1400

    def test_a_bit_an_element_is_on_the_wire_and_three_scalars(self):
        step, state = voting()
        text = step.lower(vote_gradients(0), state, jnp.ones(DEVICES)).compile().as_text()
        count = sum(leaf.size for leaf in jax.tree.leaves(params()))
        votes = 2 * (DEVICES - 1) * -(-count // (8 * DEVICES))
        assert votes <= sent_by(text) <= votes + 3 * 8
        assert not re.search(r"f32\[\d\d+\S* all-", text)

    def test_the_law_sees_the_mean_over_devices(self):
        step, state = voting()
        grads = gradients(9)
        _, state = step(grads, state, jnp.arange(4.0))
        squares = sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()) / DEVICES
        shown = telemetry(state)
        np.testing.assert_allclose(shown["grad_norm"], squares**0.5, rtol=1e-5)
        assert shown["loss"] == 1.5

    def test_one_devices_nan_skips_the_step_on_all(self):
        step, state = voting()
        _, state = step(gradients(0), state, jnp.ones(DEVICES))
        bad = gradients(1)
        bad["b"] = bad["b"].at[3, 0].set(jnp.nan)
        updates, after = step(bad, state, jnp.ones(DEVICES))
        assert all(bool((u == 0).all()) for u in jax.tree.leaves(updates))
        for old, new in zip(
            jax.tree.leaves(state.inner_state[1].mu),
            jax.tree.leaves(after.inner_state[1].mu),
            strict=True,
        ):
            np.testing.assert_array_equal(old, new)
        assert int(after.inner_state[1].count) == int(state.inner_state[1].count)
        assert int(after.skipped_total) == 1

    def test_the_state_outside_of_the_mesh_has_a_place_for_one_device(self):
        state = meta_lion(0.01, vote="data").init(params())
        assert state.inner_state[1].mu["w"].shape == (1, 96, 50)

    def test_self_driving_steers_by_the_mean_alignment(self):
        from cruxy_optax import SelfDriving, scale_by_voted_lion, stabilize

        tx = stabilize(
            optax.chain(scale_by_voted_lion("data"), cruxy_optax.scale_by_meta_learning_rate(0.01)),
            law=SelfDriving(),
            replica_axes="data",
        )
        specs = cruxy_optax.vote_specs(tx, params(), "data")

        @jax.jit
        @shard_map(in_specs=P("data"), out_specs=specs)
        def run(grads):
            state = tx.init(params())
            for _ in range(2):
                _, state = tx.update(own(grads), state, params(), value=1.0)
            return state

        assert 0.9 < float(run(gradients(3)).signals.alignment) <= 1.001

    def test_codes_of_momenta_and_two_roles_of_an_axis_are_refused(self):
        with pytest.raises(ValueError, match="state_bits must be 32 or 16 where devices vote"):
            meta_lion(0.01, vote="data", state_bits=8)
        with pytest.raises(ValueError, match="in axis_names or in replica_axes, got \\['data'\\]"):
            meta_lion(0.01, vote="data", axis_names="data")


class TestAnotherNumberOfDevices:
    """`merge_votes`."""

    @staticmethod
    def step_on(devices):
        """A step on so many devices, and how the state lies there."""
        tx = meta_lion(0.01, vote="data", weight_decay=0.0)
        fewer = Mesh(np.array(jax.devices()[:devices]), ("data",))
        specs = cruxy_optax.vote_specs(tx, params(), "data")

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=fewer, in_specs=(P("data"), specs), out_specs=(P(), specs)
        )
        def step(grads, state):
            return tx.update(own(grads), state, params(), value=1.0)

        return step

    @staticmethod
    def four():
        """The state of four devices after two steps, off their mesh."""
        step, state = voting()
        for seed in (5, 6):
            _, state = step(gradients(seed), state, jnp.ones(DEVICES))
        return jax.device_get(state)

    @pytest.mark.parametrize("devices", [1, 2, 8])
    def test_every_device_begins_with_the_mean_and_trains(self, devices):
        state = self.four()
        merged = cruxy_optax.merge_votes(state, devices)
        for name, mu in state.inner_state[1].mu.items():
            got = merged.inner_state[1].mu[name]
            assert got.shape == (devices, *mu.shape[1:])
            want = np.broadcast_to(np.asarray(mu, np.float64).mean(0), got.shape)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
        grads = jax.tree.map(lambda g: jnp.resize(g, (devices, *g.shape[1:])), gradients(7))
        updates, after = self.step_on(devices)(grads, merged)
        assert all(bool((u != 0).all()) for u in jax.tree.leaves(updates))
        assert int(after.inner_state[1].count) == 3

    def test_as_many_as_before_keep_their_own(self):
        state = self.four()
        assert (
            cruxy_optax.merge_votes(state, DEVICES).inner_state[1].mu["w"]
            is (state.inner_state[1].mu["w"])
        )

    def test_a_state_of_more_devices_is_not_cut(self):
        grads = jax.tree.map(lambda g: g[:2], gradients(7))
        with pytest.raises(ValueError, match=r"along 'data', got 2 on each; .*merge_votes\(state"):
            self.step_on(2)(grads, self.four())

    def test_what_does_not_vote_is_refused(self):
        with pytest.raises(ValueError, match="state must be of an optimizer that votes"):
            cruxy_optax.merge_votes(meta_lion(0.01).init(params()), 2)
        with pytest.raises(ValueError, match="devices must be a whole number >= 1, got 0"):
            cruxy_optax.merge_votes(self.four(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean-8", "mean-4", "vote"])
def test_devices_agree_after_100_steps_and_a_resume_is_bit_equal(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(100, 8 * DEVICES, 32)), jnp.float32)
    start = {"w": jnp.zeros((32, 64)), "b": jnp.zeros(64)}
    if kind == "vote":
        tx = meta_lion(1e-2, vote="data", weight_decay=0.0)
        specs = cruxy_optax.vote_specs(tx, start, "data")
    else:
        bits = int(kind[-1])
        tx = optax.chain(average_gradients("data", bits), meta3(1e-2, axis_names="data"))
        specs = P()

    def loss_of(params, x):
        return jnp.mean((x @ params["w"] + params["b"] - jnp.sin(jnp.tile(x, 2))) ** 2)

    @jax.jit
    @shard_map(in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P("data")))
    def step(params, state, x):
        local = varying(params, "data")
        loss, grads = jax.value_and_grad(loss_of)(local, x)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        everywhere = jax.tree.map(lambda p: varying(p[None], "data"), params)
        return params, state, (loss[None], everywhere)

    current = start, jax.jit(shard_map(in_specs=P(), out_specs=specs)(tx.init))(start)
    kept, losses = None, []
    for t in range(100):
        if t == 50:
            kept = jax.device_get(current)
        *current, (loss, everywhere) = step(*current, x[t])
        losses.append(float(loss.mean()))
    for leaf in jax.tree.leaves(everywhere):
        assert all(bool((leaf[0] == leaf[d]).all()) for d in range(DEVICES))
    assert losses[-1] < 0.5 * losses[0]
    again = kept
    for t in range(50, 100):
        *again, _ = step(*again, x[t])
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(current), strict=True):
        np.testing.assert_array_equal(ours, theirs)
