"""The controller's dictionary and its log."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3, SelfDriving
from cruxy_control.controls import DRIVEN
from cruxy_optax import (
    TelemetryLog,
    axiom,
    clip_by_predicted_norm,
    cosmic,
    explain,
    meta3,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    self_driving,
    stability_v1,
    stability_v2,
    stabilize,
    telemetry,
    throttle_by_phase,
    track_curvature,
    track_gamma_norm,
)
from optimizers import gradients, train, tree

ALWAYS = "grad_norm gamma_norm loss ok step skipped_total skipped_in_a_row".split()
SENSED = "meta_scale phase_scale clip_threshold clip_scale phase curvature warning".split()
RATE, BETAS = ["learning_rate"], ["beta1", "beta2"]


def some_state(steps=3):
    grads, losses = gradients(steps)
    return train(meta3(0.01), tree(), grads, losses)[1]


def test_flat_dictionary_of_device_scalars():
    shown = telemetry(some_state())
    assert set(shown) == {*ALWAYS, *SENSED, *RATE, *BETAS}
    assert all(isinstance(v, jax.Array) and v.shape == () for v in shown.values())


class LawOfItsOwn:
    """Meta3 with a state that does not say what there is to show."""

    gamma = 1.5

    def init(self, like, *, xp):
        return tuple(Meta3().init(like, xp=xp))

    def step(self, state, signals, *, xp):
        state, controls = Meta3().step(
            type(Meta3().init(xp.zeros(()), xp=xp))(*state), signals, xp=xp
        )
        return tuple(state), controls


@pytest.mark.parametrize(
    ("tx", "keys"),
    [
        (stability_v1(0.1), [*RATE, *BETAS, "meta_scale", "phase_scale", "phase"]),
        (stability_v2(0.1), [*RATE, *BETAS, *SENSED]),
        (self_driving(), [*RATE, *BETAS, *SENSED, "alignment", *DRIVEN]),
        (axiom(0.1), [*RATE, *SENSED]),
        (axiom(0.1, b1=0.9), [*RATE, *SENSED]),
        (axiom(0.1, b1=0.9, law=SelfDriving()), [*RATE, *SENSED, "alignment", *DRIVEN]),
        (cosmic(0.1, "10KB"), [*RATE, *BETAS, *SENSED]),
        (cosmic(0.1, "1KB", tiers=dict.fromkeys(["['b']", "['w']"], 0)), [*RATE, *SENSED]),
        (stabilize(optax.adam(0.1)), SENSED),
        (stabilize(optax.adam(0.1), LawOfItsOwn()), [*SENSED, "alignment"]),
    ],
)
def test_telemetry_shows_what_law_and_actuators_have_and_nothing_else(tx, keys):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    _, state = tx.update(params, tx.init(params), params)
    assert sorted(telemetry(state)) == sorted([*ALWAYS, *keys])


def test_betas_are_those_that_the_tensors_under_a_budget_have():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    shown = []
    for tx in (cosmic(0.1, "10KB"), meta3(0.1)):
        _, state = tx.update(params, tx.init(params), params)
        shown.append(telemetry(state))
    assert [shown[0][name] for name in BETAS] == [shown[1][name] for name in BETAS]


def test_learning_rate_is_what_the_update_was_multiplied_by():
    params = {"w": jnp.ones(4)}
    tx = stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_controlled_lion(),
            throttle_by_phase(),
            scale_by_meta_learning_rate(0.01),
        )
    )
    updates, state = tx.update(params, tx.init(params), params)
    assert float(telemetry(state)["learning_rate"]) == pytest.approx(-float(updates["w"][0]))


def test_signals_are_those_of_the_raw_gradient():
    params = {"w": jnp.array([3.0, -4.0])}
    tx = meta3(0.01, weight_decay=0.5)
    _, state = tx.update(params, tx.init(params), params, value=2.5)
    shown = telemetry(state)
    assert float(shown["grad_norm"]) == pytest.approx(5.0)
    assert float(shown["gamma_norm"]) == pytest.approx((3**1.5 + 4**1.5) ** (1 / 1.5), rel=1e-6)
    assert float(shown["loss"]) == 2.5


@pytest.mark.parametrize("gamma", [1.0, 1.25, 2.0, 3.0])
def test_law_sets_the_exponent_of_the_norm(gamma):
    params = {"w": jnp.array([3.0, -4.0])}
    tx = meta3(0.01, law=Meta3(gamma=gamma))
    _, state = tx.update(params, tx.init(params), params)
    want = (3.0**gamma + 4.0**gamma) ** (1 / gamma)
    assert float(telemetry(state)["gamma_norm"]) == pytest.approx(want, rel=1e-6)


def test_two_actuators_of_a_kind_are_told_apart_by_path():
    tx = stabilize(
        optax.partition(
            {
                "a": optax.chain(scale_by_controlled_adam(), scale_by_meta_learning_rate(0.1)),
                "l": optax.chain(scale_by_controlled_lion(), scale_by_meta_learning_rate(0.2)),
            },
            {"w": "a", "b": "l"},
        )
    )
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    shown = telemetry(state)
    rates = sorted(float(v) for k, v in shown.items() if k.startswith("learning_rate"))
    assert rates == [pytest.approx(0.1), pytest.approx(0.2)]


def group(scale, *, throttled):
    throttle = [throttle_by_phase()] if throttled else []
    return optax.chain(scale_by_controlled_lion(), *throttle, scale_by_meta_learning_rate(scale))


@pytest.mark.parametrize("both", [False, True])
def test_each_group_shows_the_rate_it_really_has(both):
    parts = {"a": group(0.1, throttled=True), "b": group(0.2, throttled=both)}
    tx = stabilize(optax.partition(parts, {"w": "a", "v": "b"}))
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    updates, state = tx.update(params, tx.init(params), params)
    shown = telemetry(state)
    rates = {k: float(v) for k, v in shown.items() if k.startswith("learning_rate")}
    for label, leaf in (("'a'", "w"), ("'b'", "v")):
        [rate] = [v for k, v in rates.items() if label in k]
        assert rate == pytest.approx(-float(updates[leaf][0]))


def test_throttle_around_the_groups_counts_for_each():
    parts = {"a": group(0.1, throttled=False), "b": group(0.2, throttled=False)}
    tx = stabilize(optax.chain(optax.partition(parts, {"w": "a", "v": "b"}), throttle_by_phase()))
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    updates, state = tx.update(params, tx.init(params), params)
    rates = sorted(float(v) for k, v in telemetry(state).items() if k.startswith("learning_rate"))
    assert rates == [pytest.approx(-float(updates[k][0])) for k in ("w", "v")]


def test_log_takes_several_controllers_and_a_device_step(tmp_path):
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    tx = optax.partition({"a": meta3(0.1), "b": meta3(0.2)}, {"w": "a", "v": "b"})
    _, state = tx.update(params, tx.init(params), params)
    with TelemetryLog(tmp_path / "t.jsonl") as log:
        log.log(jnp.int32(7), telemetry(state))
    [row] = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert row["step"] == 7
    assert sum(name.endswith("/phase") for name in row) == 2


def logged(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_line_of_the_log_starts_with_the_step_and_the_time_it_was_logged(tmp_path):
    before = time.time()
    with TelemetryLog(tmp_path / "t.jsonl") as log:
        log.log(3, telemetry(some_state()))
        after = time.time()
        time.sleep(0.01)
    [row] = logged(tmp_path / "t.jsonl")
    assert list(row)[:2] == ["step", "timestamp"]
    assert before <= row["timestamp"] <= after
    assert set(row) == {*ALWAYS, *SENSED, *RATE, *BETAS, "timestamp"}


def donated():
    x = jnp.float32(1.0)
    x.delete()
    return x


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (donated(), RuntimeError, "'phase' of step 1 cannot be read"),
        (jnp.ones(3), TypeError, r"'phase' of step 1 must be a real scalar, .* of shape \(3,\)"),
        (jnp.complex64(1j), TypeError, "'phase' of step 1 must be a real scalar"),
        ("high", TypeError, "'phase' of step 1 must be a real scalar, got str"),
    ],
)
def test_value_that_cannot_be_read_is_named_and_costs_no_other(tmp_path, bad, error, message):
    log = TelemetryLog(tmp_path / "t.jsonl")
    for step in range(3):
        log.log(step, {"phase": bad if step == 1 else 0.5, "loss": jnp.float32(step)})
    with pytest.raises(error, match=message):
        log.close()
    rows = logged(tmp_path / "t.jsonl")
    assert [row["loss"] for row in rows] == [0.0, 1.0, 2.0]
    assert [row.get("phase") for row in rows] == [0.5, None, 0.5]


def test_row_whose_step_cannot_be_read_costs_no_other(tmp_path):
    log = TelemetryLog(tmp_path / "t.jsonl")
    for step in (0, donated(), 2):
        log.log(step, {"phase": 0.5})
    with pytest.raises(RuntimeError, match="'step' of row 1 cannot be read"):
        log.close()
    assert [row["step"] for row in logged(tmp_path / "t.jsonl")] == [0, 2]


def test_log_keeps_what_a_dictionary_held_when_it_was_logged(tmp_path):
    values = {}
    with TelemetryLog(tmp_path / "t.jsonl") as log:
        for step in range(3):
            values["loss"] = float(step)
            log.log(step, values)
    assert [row["loss"] for row in logged(tmp_path / "t.jsonl")] == [0.0, 1.0, 2.0]


def test_log_closes_its_file_when_a_value_cannot_be_written(tmp_path):
    log = TelemetryLog(tmp_path / "t.jsonl")
    log.log(0, {"phase": object()})
    with pytest.raises(TypeError):
        log.close()
    log.close()


def test_usable_inside_the_jitted_step():
    tx, params = meta3(0.01), tree()

    @jax.jit
    def step(state):
        _, state = tx.update(params, state, params, value=1.0)
        return state, telemetry(state)

    state, shown = step(tx.init(params))
    np.testing.assert_array_equal(shown["phase"], telemetry(state)["phase"])


class Recorder:
    """Stands in for a TensorBoard writer."""

    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.rows.append((tag, scalar_value, global_step))


def test_log_writes_one_json_line_a_step_with_null_for_what_is_not_finite(tmp_path):
    shown = telemetry(some_state())
    with TelemetryLog(tmp_path / "t.jsonl", every=2) as log:
        for step in range(5):
            log.log(step, {**shown, "loss": jnp.float32(jnp.nan)})
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["loss"] is None
    assert rows[0]["ok"] is True
    assert rows[0]["phase"] == pytest.approx(float(shown["phase"]))


def test_log_reads_the_device_once_every_so_many_steps(monkeypatch):
    reads = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(1) or get(tree))
    shown, recorder = telemetry(some_state()), Recorder()
    with TelemetryLog(writer=recorder, every=10) as log:
        for step in range(25):
            log.log(step, shown)
        assert len(reads) == 2
        assert len({row[2] for row in recorder.rows}) == 20
    assert len({row[2] for row in recorder.rows}) == 25
    assert ("cruxy/skipped_total", 0.0, 24) in recorder.rows


def test_tensorboard_takes_the_scalars(tmp_path):
    tensorboardX = pytest.importorskip("tensorboardX")  # noqa: N806
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer, TelemetryLog(writer=writer) as log:
        log.log(0, telemetry(some_state()))
    assert any(path.stat().st_size > 100 for path in tmp_path.iterdir())


def test_observers_leave_updates_alone_and_hold_on_a_bad_step():
    tx = optax.chain(track_gamma_norm(), track_curvature(), optax.identity())
    (grads, losses), params = gradients(5), tree()
    state = tx.init(params)
    for t in range(5):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = tx.update(now, state, params, value=losses[t])
        np.testing.assert_array_equal(updates["w"], now["w"])
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = tx.update(bad, state, params, value=1.0)
    assert float(after[0].phase) == float(state[0].phase)
    assert float(after[1].curvature) == float(state[1].curvature)


def test_observers_measure_what_the_controller_measures():
    grads, losses = gradients(20)
    observed = train(optax.chain(track_gamma_norm(), track_curvature()), tree(), grads, losses)[1]
    controlled = train(
        stabilize(optax.identity(), law=Meta3(history_correction=0.0, outlier_cap=None)),
        tree(),
        grads,
        losses,
    )[1]
    shown = telemetry(controlled)
    for name in ("gamma_norm", "phase", "curvature"):
        want = float(optax.tree.get(observed, name))
        assert float(shown[name]) == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_every_optimizer_with_a_controller_is_named_where_there_is_none():
    names = ["self_driving", "self_driving_lion", "self_driving_muon", "meta3", "meta_lion"]
    names += ["stability_v1", "stability_v2", "axiom", "cosmic", "tiger", "stabilize"]
    with pytest.raises(ValueError, match="in it, got tuple") as refused:
        telemetry(optax.adam(1e-3).init(jnp.ones(3)))
    assert [name for name in names if f"{name}()" not in str(refused.value)] == []


def test_debugging_of_nans_is_stopped_by_nothing_that_is_shown():
    """Where nothing came a NaN stands, but for that mode, which stops at every one from `jit`."""
    tx, params = self_driving(), jnp.ones(3)
    state = tx.init(params)
    assert np.isnan(telemetry(state)["loss"])
    assert np.isnan(telemetry(state)["momentum_ratio"])

    @jax.jit
    def step(state, grads):
        _, state = tx.update(grads, state, params)
        return state, telemetry(state)

    with jax.debug_nans(True):
        for grads in (params, params, jnp.zeros(3)):
            state, shown = step(state, grads)
            assert "times as long" not in explain(state) or np.isfinite(shown["momentum_ratio"])
        assert np.isinf(shown["loss"])
        assert np.isinf(shown["momentum_ratio"])
        assert np.isinf(telemetry(state)["loss"])


def test_several_controllers_in_one_state_are_not_explained():
    tx, params = self_driving(), jnp.ones((2, 3))
    state = jax.vmap(tx.init)(params)
    _, state = jax.vmap(tx.update)(params, state, params)
    with pytest.raises(ValueError, match=r"of one controller, .* shape \(2,\).*lambda x: x\[0\]"):
        explain(state)
    assert "(step 1," in explain(jax.tree.map(lambda x: x[0], state))
