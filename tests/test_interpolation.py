"""An average that pulls the parameters along: schedule-free averaging without a third sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import cruxy_optax
from cruxy_control.controls import RUN_PHASES, Controls, falls, neutral
from cruxy_control.formulas.averaging import averaging_orders, averaging_weight
from cruxy_control.usual import pulls, usual_average, usual_law
from cruxy_torch import CruxyOptimizer

POWER, BETA, STEPS = 2.0, 0.7, 40


def gradients(steps=STEPS, shape=(12, 20)):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(steps)]


def test_it_is_schedule_free_averaging_of_a_sequence_that_is_not_kept():
    tx = optax.chain(optax.sgd(0.01), cruxy_optax.average_iterates(POWER, interpolation=BETA))
    params = jnp.asarray(gradients(1)[0])
    state, update = tx.init(params), jax.jit(tx.update)
    y = z = x = np.asarray(params, np.float64)
    for step, grads in enumerate(gradients()):
        updates, state = update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
        weight = min(averaging_weight(step, POWER, xp=np), 1.0 - BETA)
        z = x + (y - x) / (1.0 - BETA) - 0.01 / (1.0 - BETA) * grads
        x = x + weight * (z - x)
        y = (1.0 - BETA) * z + BETA * x
    np.testing.assert_allclose(params, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cruxy_optax.averaged_params(state, params), x, rtol=1e-4, atol=1e-6)


def test_nothing_is_pulled_where_it_is_0():
    assert averaging_orders(7, 4.0, 0.0, False, xp=np) == (averaging_weight(7, 4.0, xp=np), None)
    plain, pulled = (cruxy_optax.average_iterates(4.0, interpolation=beta) for beta in (0.0, 0.5))
    params = jnp.ones(3)
    for tx, moves in ((plain, False), (pulled, True)):
        updates, _ = tx.update(jnp.full(3, 0.25), tx.init(params), params)
        assert bool((updates != 0.25).all()) is moves


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float32, torch.tensor])
def test_a_rate_that_falls_is_known_by_every_kind_of_number(kind):
    def controls(phase):
        one = neutral(np.True_, xp=np)
        return one._replace(run_phase=kind(phase), schedule_scale=kind(1.0))

    phases = [float(RUN_PHASES.index(name)) for name in ("search", "trunk", "cooldown", "end")]
    assert [bool(falls(controls(phase))) for phase in phases] == [False, False, True, True]
    assert falls(Controls(*[None] * 17)) is False


def test_a_run_of_torch_on_a_cpu_is_pulled_no_more_once_its_rate_falls():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = CruxyOptimizer([x], mode="self_driving", interpolation=0.6, total_steps=10)
    for _ in range(6):
        x.grad = torch.ones(3)
        optimizer.step(loss=1.0)
    before, mean = x.detach().clone(), optimizer.state[x]["average"].clone()
    x.grad = torch.ones(3)
    optimizer.step(loss=1.0)
    weight = averaging_orders(6, 3.0, 0.6, True, xp=np)[0]
    torch.testing.assert_close(
        optimizer.state[x]["average"], mean + float(weight) * (x.detach() - mean)
    )
    assert (x.detach() < before).all()


def test_while_the_rate_falls_nothing_is_pulled_and_the_average_keeps_close():
    weight, pull = averaging_orders(99, 2.0, 0.7, np.True_, xp=np)
    assert pull == 0.0
    assert weight == averaging_weight(99, 16.0, xp=np)


def trained_jax(options, steps=STEPS):
    tx = cruxy_optax.self_driving(**options)
    params = {"kernel": jnp.asarray(gradients(1)[0]), "bias": jnp.ones(20)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients(steps):
        own = {"kernel": jnp.asarray(grads) + 0.3 * params["kernel"], "bias": jnp.asarray(grads[0])}
        updates, state = update(own, state, params)
        params = optax.apply_updates(params, updates)
    return params, cruxy_optax.averaged_params(state, params)


def trained_torch(options, steps=STEPS, dtype=torch.float32):
    kernel = torch.nn.Parameter(torch.tensor(gradients(1)[0]).to(dtype))
    bias = torch.nn.Parameter(torch.ones(20, dtype=dtype))
    optimizer = CruxyOptimizer([kernel, bias], mode="self_driving", **options)
    for grads in gradients(steps):
        kernel.grad = (torch.tensor(grads) + 0.3 * kernel.detach().float()).to(dtype)
        bias.grad = torch.tensor(grads[0]).to(dtype)
        optimizer.step()
    params = {"kernel": kernel.detach().clone(), "bias": bias.detach().clone()}
    with optimizer.averaged():
        return params, {"kernel": kernel.detach().clone(), "bias": bias.detach().clone()}


PATHS = [{"fused": False, "foreach": False}, {"foreach": True}, {}]


@pytest.mark.parametrize("path", PATHS, ids=["reference", "foreach", "native"])
def test_both_frameworks_and_all_paths_agree(path):
    options = {"interpolation": 0.6}
    of_jax, of_torch = trained_jax(options), trained_torch({**options, **path})
    for a, b in zip(of_jax, of_torch, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("bits", "bound"), [(16, 0.003), (8, 0.15)])
def test_an_average_in_fewer_bits_pulls_as_one_in_float32(bits, bound):
    rng = np.random.default_rng(1)
    start = rng.normal(size=(64, 80)).astype(np.float32)
    ends = []
    for own in (None, bits):
        tx = cruxy_optax.self_driving(interpolation=0.6, average_bits=own)
        params = jnp.asarray(start)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(30):
            noise = np.random.default_rng(step).normal(size=start.shape).astype(np.float32)
            updates, state = update(params + noise, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(np.asarray(params))
    assert 0.0 < np.abs(ends[0] - ends[1]).max() < bound


def test_bfloat16_that_is_rounded_by_chance_is_pulled():
    options = {"interpolation": 0.6, "stochastic_rounding": True}
    (wide, _), (half, _) = trained_torch(options), trained_torch(options, dtype=torch.bfloat16)
    apart = (half["kernel"].float() - wide["kernel"]).abs().mean()
    assert apart < 0.02 * wide["kernel"].abs().mean() + 0.02


def test_what_has_no_gradient_and_what_has_no_rate_stands_still():
    moving, frozen, idle = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    groups = [{"params": [moving, idle]}, {"params": [frozen]}]
    optimizer = CruxyOptimizer(groups, mode="self_driving", interpolation=0.6)
    for step in range(6):
        for p in (moving, frozen, idle):
            p.grad = torch.full((4,), 1.0 + step)
        if step > 2:
            idle.grad, optimizer.param_groups[1]["lr"] = None, 0.0
            before = [p.detach().clone() for p in (moving, frozen, idle)]
        optimizer.step()
        if step > 2:
            same = [torch.equal(p, q) for p, q in zip((moving, frozen, idle), before, strict=True)]
            assert same == [False, True, True]


def test_it_is_saved_with_a_group_and_a_state_of_before_has_none():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = CruxyOptimizer([p], mode="self_driving", interpolation=0.6)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["interpolation"] == 0.6
    del saved["param_groups"][0]["interpolation"]
    other = CruxyOptimizer([p], mode="self_driving", interpolation=0.6)
    other.load_state_dict(saved)
    p.grad = torch.ones(4, 4)
    other.step()


def test_numbers_of_inject_hyperparams_are_taken():
    tx = optax.inject_hyperparams(cruxy_optax.self_driving)(interpolation=0.6, averaging=3.0)
    params = jnp.ones((3, 2))
    plain = cruxy_optax.self_driving(interpolation=0.6, averaging=3.0)
    first, _ = tx.update(params, tx.init(params), params)
    second, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=r"interpolation must be .* got"):
        cruxy_optax.average_iterates(interpolation=value)
    with pytest.raises(ValueError, match=r"interpolation must be .* got"):
        CruxyOptimizer([torch.nn.Parameter(torch.ones(2))], interpolation=value)


class TestUsual:
    @pytest.mark.parametrize(
        ("kind", "averaging", "interpolation", "free", "expected"),
        [
            ("adam", "usual", "usual", True, (16.0, 0.0)),
            ("adam", "usual", 0.6, True, (3.0, 0.6)),
            ("adam", 5.0, 0.6, True, (5.0, 0.6)),
            ("muon", "usual", "usual", True, (2.0, 0.7)),
            ("muon", "usual", "usual", False, (16.0, 0.0)),
            ("muon", 16.0, "usual", True, (16.0, 0.0)),
            ("muon", None, "usual", True, (None, 0.0)),
            ("muon", None, 0.5, True, (None, 0.0)),
        ],
    )
    def test_power_and_pull(self, kind, averaging, interpolation, free, expected):
        assert usual_average(kind, averaging, interpolation, free=free) == expected

    def test_the_set_point_goes_with_the_pull(self):
        assert usual_law("muon", ends=False, interpolation=0.7).set_point == -0.07
        assert usual_law("muon", ends=False).set_point == -0.15
        assert usual_law("adam", ends=False, interpolation=0.6).set_point == -0.2
        for ends in (False, True):
            law = usual_law("muon", ends=ends, interpolation=0.7)
            assert (law.search_share, law.cooldown_peak) == (0.8, 1.0)
            law = usual_law("muon", ends=ends)
            assert (law.search_share, law.cooldown_peak) == (0.2, 2.0)
        assert pulls(jnp.float32(0.0))  # who is traced may

    def test_muon_of_torch_is_muon_of_jax(self):
        from cruxy_torch import param_groups

        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))
        own, ended, plain = (
            CruxyOptimizer(
                param_groups(net, lr=1e-3), mode="self_driving", direction="muon", **options
            )
            for options in ({}, {"total_steps": 100}, {"interpolation": 0.0})
        )
        matrices = [g for g in own.param_groups if g["betas"][1] in (0.9, 0.95)]
        assert {(g["betas"], g["averaging"], g["interpolation"]) for g in matrices} == {
            ((0.9 * 0.9, 0.9), 2.0, 0.7)
        }
        assert own._settings.law.set_point == -0.07
        assert {g["interpolation"] for g in ended.param_groups} == {0.7}
        assert ended._settings.law == dataclasses.replace(own._settings.law, total_steps=100)
        assert {g["averaging"] for g in plain.param_groups} == {16.0}
        assert any(g["betas"] == (0.95 * 0.95, 0.95) for g in plain.param_groups)

    @pytest.mark.parametrize("options", [{}, {"interpolation": 0.0}, {"averaging": 4.0}])
    def test_an_end_that_is_told_before_the_first_step_is_as_one_told_at_once(self, options):
        from cruxy_torch import param_groups

        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))
        at_once, later = (
            CruxyOptimizer(
                param_groups(net, lr=1e-3), mode="self_driving", direction="muon",
                total_steps=end, **options,
            )
            for end in (100, None)
        )  # fmt: skip
        later.set_total_steps(100)
        assert later._settings.law.total_steps == 100
        names = ("averaging", "interpolation", "betas")
        groups = [[{n: g[n] for n in names} for g in o.param_groups] for o in (at_once, later)]
        assert groups[0] == groups[1]
        assert later._settings.law == at_once._settings.law

    def test_an_end_that_is_told_on_the_way_changes_no_average(self):
        kernel = torch.nn.Parameter(torch.ones(4, 4))
        groups = [{"params": [kernel], "role": "mlp.up"}]
        optimizer = CruxyOptimizer(groups, mode="self_driving", direction="muon")
        kernel.grad = torch.ones(4, 4)
        optimizer.step()
        optimizer.set_total_steps(100)
        assert optimizer.param_groups[0]["interpolation"] == 0.7
        assert optimizer._settings.law.set_point == -0.07


class TestDecay:
    def test_vectors_are_spared_unless_a_group_says_its_own(self):
        def moved(options, group):
            kernel, bias = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
            groups = [{"params": [kernel, bias], **group}]
            optimizer = CruxyOptimizer(groups, mode="self_driving", lr=0.01, **options)
            kernel.grad, bias.grad = torch.full((3, 3), 1e-30), torch.full((3,), 1e-30)
            optimizer.step()
            return kernel.detach()[0, 0].item(), bias.detach()[0].item()

        plain = moved({"weight_decay": 0.0}, {})
        spared, own = moved({}, {}), moved({}, {"weight_decay": 0.1})
        assert spared[0] < plain[0]
        assert spared[1] == plain[1]
        assert own[0] == spared[0]
        assert own[1] < plain[1]

    def test_it_is_that_of_the_other_framework(self):
        tx = cruxy_optax.self_driving(0.01)
        params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        plain = cruxy_optax.self_driving(0.01, weight_decay=0.0)
        without, _ = plain.update(jax.tree.map(jnp.ones_like, params), plain.init(params), params)
        np.testing.assert_allclose(updates["bias"], without["bias"])
        np.testing.assert_allclose(updates["kernel"] - without["kernel"], -0.001, rtol=1e-3)
