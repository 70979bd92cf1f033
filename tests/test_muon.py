"""Orthogonal directions under the law: the formula, both frameworks, a known end."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import cruxy_optax
from cruxy_control import Meta3, PlateauGuard, SelfDriving, Signals
from cruxy_control.formulas.orthogonal import orthogonal_scale, orthogonalize
from cruxy_control.self_driving import begin_cooldown

STEPS = 60


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (3, 5, 17)])
def test_singular_values_are_about_one(shape):
    values = np.linalg.svd(np.asarray(orthogonalize(jnp.asarray(matrix(*shape)), xp=jnp)))[1]
    assert values.min() > 0.4
    assert values.max() < 1.25


def test_the_size_of_a_gradient_does_not_count():
    x = jnp.asarray(matrix(6, 9))
    once, thousand = (orthogonalize(scale * x, xp=jnp) for scale in (1.0, 1000.0))
    np.testing.assert_allclose(once, thousand, atol=1e-5)


def test_zero_stays_zero_and_has_a_finite_derivative():
    x = jnp.zeros((3, 4))
    derivative = jax.grad(lambda x: orthogonalize(x, xp=jnp).sum())(x)
    assert not np.any(orthogonalize(x, xp=jnp))
    assert np.isfinite(derivative).all()


def test_the_root_mean_square_of_a_direction_is_a_tenth():
    u = orthogonal_scale(16, 64) * orthogonalize(jnp.asarray(matrix(16, 64)), xp=jnp)
    assert float(jnp.sqrt(jnp.mean(u * u))) == pytest.approx(0.1, rel=0.15)


def tree():
    return {
        "tokens": {"embedding": jnp.asarray(matrix(12, 8, seed=1))},
        "mlp": {
            "up": {"kernel": jnp.asarray(matrix(8, 20, seed=2)), "bias": jnp.zeros(20)},
            "down": {"kernel": jnp.asarray(matrix(20, 8, seed=3))},
        },
        "norm": {"scale": jnp.ones(8)},
    }


def test_each_matrix_is_as_it_would_be_alone():
    """Those of one shape, or one that lies on its side, are computed together."""
    tx = cruxy_optax.orthogonalize_updates()
    whole, _ = tx.update(tree(), tx.init(tree()))
    alone, _ = tx.update({"kernel": tree()["mlp"]["down"]["kernel"]}, tx.init({}))
    np.testing.assert_allclose(whole["mlp"]["down"]["kernel"], alone["kernel"], atol=1e-6)
    assert np.all(whole["norm"]["scale"] == 1.0)


@pytest.mark.parametrize("stacked", [0, 1])
def test_torch_computes_matrices_of_one_shape_together(monkeypatch, stacked):
    torch = pytest.importorskip("torch")
    from cruxy_torch import CruxyOptimizer, Orthogonal
    from cruxy_torch._distributed import whole

    shapes = [(6, 9), (4, 4), (6, 9), (3, 6, 9), (6, 9), (9, 6), (2, 6, 9), (6, 9)]

    def stepped(together):
        seen, f = [], Orthogonal._orthogonal
        params = [
            torch.nn.Parameter(torch.tensor(matrix(*s, seed=i))) for i, s in enumerate(shapes)
        ]
        optimizer = CruxyOptimizer(
            params, lr=0.01, betas=(0.9025, 0.95), direction=Orthogonal(stacked=stacked)
        )
        with monkeypatch.context() as patch:
            patch.setattr(Orthogonal, "joins", together)
            patch.setattr(
                Orthogonal, "_orthogonal", lambda *args: seen.append(args[1].shape) or f(*args)
            )
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = torch.tensor(matrix(*p.shape, seed=100 * step + i))
                optimizer.step()
        return [p.detach().numpy() for p in params], seen

    monkeypatch.setattr(whole, "STACKED_ON_CPU", 3 * 54)
    alone, each = stepped(together=False)
    together, joined = stepped(together=True)
    assert len(each) == 3 * len(shapes)
    assert len(joined) == 3 * 6  # of (6, 9) three at once and one alone
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_torch_lets_go_of_one_large_matrix_before_the_next(monkeypatch):
    torch = pytest.importorskip("torch")
    from cruxy_torch import CruxyOptimizer, Orthogonal
    from cruxy_torch._distributed import whole

    made, alive, f = [], [], Orthogonal._orthogonal

    def watched(*args):
        alive.append(sum(ref() is not None for ref in made))
        found = f(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(whole, "STACKED_ON_CPU", 1)
    monkeypatch.setattr(Orthogonal, "_orthogonal", watched)
    params = [torch.nn.Parameter(torch.tensor(matrix(6, 9, seed=i))) for i in range(4)]
    optimizer = CruxyOptimizer(params, lr=0.01, direction=Orthogonal())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert alive == [0, 0, 0, 0]


def test_torch_iterates_in_bfloat16_where_it_is_told_to(monkeypatch):
    torch = pytest.importorskip("torch")
    from cruxy_torch import Orthogonal
    from cruxy_torch._actuators import orthogonal

    x = torch.tensor(matrix(3, 12, 20))
    exact = Orthogonal(stacked=1)._orthogonal(x, 1)
    monkeypatch.setattr(orthogonal, "_iterated", lambda whole: torch.bfloat16)
    found = Orthogonal(stacked=1)._orthogonal(x, 1)
    assert found.dtype == torch.float32
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    off = (exact - orthogonal_scale(12, 20) * u @ vt).norm()  # of the iteration itself
    assert 0.0 < float((found - exact).norm()) < 0.5 * off


def test_heads_and_experts_are_the_matrices_they_are():
    """A query kernel is (inputs, heads, width); each expert is a matrix of its own."""
    tx = cruxy_optax.orthogonalize_updates()
    query = jnp.asarray(matrix(8, 2, 5))
    got, _ = tx.update({"attn": {"query": {"kernel": query}}}, tx.init({}))
    flat, _ = tx.update({"kernel": query.reshape(8, 10)}, tx.init({}))
    np.testing.assert_allclose(
        got["attn"]["query"]["kernel"].reshape(8, 10), flat["kernel"], atol=1e-6
    )
    experts = jnp.asarray(matrix(3, 8, 5))
    got, _ = tx.update({"experts": {"up_proj": experts}}, tx.init({}))
    first, _ = tx.update({"kernel": experts[0]}, tx.init({}))
    np.testing.assert_allclose(got["experts"]["up_proj"][0], first["kernel"], atol=1e-6)


def test_scanned_layers_are_named_and_each_is_a_matrix_of_its_own():
    layers = jnp.asarray(matrix(3, 8, 20)) * jnp.array([1000.0, 1.0, 1.0])[:, None, None]
    updates = {"layers": {"up": {"kernel": layers}, "norm": {"scale": jnp.ones((3, 8))}}}
    with pytest.raises(ValueError, match="nothing tells which axes are inputs"):
        cruxy_optax.orthogonalize_updates().update(updates, optax.EmptyState())
    tx = cruxy_optax.orthogonalize_updates(stacked=("layers.*",))
    got = tx.update(updates, optax.EmptyState())[0]["layers"]["up"]["kernel"]
    alone, _ = tx.update({"kernel": layers[1]}, optax.EmptyState())
    np.testing.assert_allclose(got[1], alone["kernel"], atol=1e-6)


def test_rules_and_rates_reach_every_part():
    params = {"foo": {"kernel": jnp.asarray(matrix(4, 6))}}
    rules = ((pattern, role) for pattern, role in [("foo.*", "embedding")])  # read once
    tx = cruxy_optax.self_driving_muon(rules=rules, rates={"embedding": 0.0}, weight_decay=0.0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["foo"]["kernel"])


def test_a_table_of_decays_is_no_matrix():
    tree = {"mixer": {"A_log": jnp.ones((8, 4)), "in_proj": {"kernel": jnp.ones((8, 4))}}}
    muon = cruxy_optax.scale_by_controlled_muon()
    tx = cruxy_optax.stabilize(muon, law=Meta3())
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(updates["mixer"]["A_log"], 1.0, rtol=1e-4)  # Adam's first step


def test_states_and_optimizers_of_nnx_are_taken():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(12, 8, rngs=rngs)
            self.up = nnx.Linear(8, 20, rngs=rngs)

    model = Model(nnx.Rngs(0))
    tx = cruxy_optax.self_driving_muon(averaging=None)
    state = nnx.state(model, nnx.Param)
    updates, _ = jax.jit(tx.update)(state, tx.init(state), state, value=1.0)
    u = updates["up"]["kernel"][...]
    alone, _ = cruxy_optax.orthogonalize_updates().update({"kernel": u}, optax.EmptyState())
    assert (
        float(
            jnp.abs(
                u / jnp.linalg.norm(u) - alone["kernel"] / jnp.linalg.norm(alone["kernel"])
            ).max()
        )
        < 0.2
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.up.kernel[...]
    optimizer.update(model, state)
    assert not np.array_equal(before, model.up.kernel[...])


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape), np.float32), tree())


def train(tx, params=None, state=None, steps=range(STEPS)):
    params = tree() if params is None else params
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for step in steps:
        updates, state = update(gradients(step), state, params, value=jnp.float32(1.0))
        params = optax.apply_updates(params, updates)
    return params, state


def test_only_matrices_inside_the_model_are_without_a_second_moment():
    state = cruxy_optax.self_driving_muon(averaging=None).init(tree())
    held = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    matrices, rest = 2 * 160, 96 + 20 + 8
    assert sum(size for size in held if size in (160, 96, 20, 8)) == matrices + 2 * rest


def test_a_skipped_step_moves_nothing():
    tx = cruxy_optax.self_driving_muon()
    params, state = train(tx, steps=range(3))
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), gradients(3))
    updates, after = tx.update(bad, state, params, value=1.0)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    kept = [(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)]
    assert all(np.array_equal(a, b) for a, b in kept if a.ndim > 1)


def test_sharded_matrices_give_what_whole_ones_give():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = {
        2: NamedSharding(mesh, PartitionSpec("data", None)),
        1: NamedSharding(mesh, PartitionSpec()),
    }
    tx = cruxy_optax.self_driving_muon()
    params = jax.tree.map(lambda p: jax.device_put(p, shard[p.ndim]), tree())
    ours, _ = train(tx, params, jax.jit(tx.init)(params), range(5))
    alone, _ = train(tx, steps=range(5))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("bits", [32, pytest.param(16, marks=pytest.mark.slow), 8])
def test_it_resumes_to_the_bit(bits):
    tx = cruxy_optax.self_driving_muon(state_bits=bits)
    params, state = train(tx, steps=range(6))
    saved = jax.tree.map(np.asarray, (params, state))
    there, here = train(tx, params, state, range(6, 12)), train(tx, *saved, range(6, 12))
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        assert np.array_equal(a, b)


def test_it_runs_under_meta3():
    muon = cruxy_optax.scale_by_controlled_muon()
    rate = cruxy_optax.scale_by_meta_learning_rate(1e-2)
    tx = cruxy_optax.stabilize(optax.chain(muon, rate), law=Meta3())
    params, _ = train(tx, steps=range(3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "make",
    [cruxy_optax.self_driving, cruxy_optax.self_driving_lion, cruxy_optax.self_driving_muon],
)
def test_a_rate_by_role_multiplies_the_first_step(make):
    first = []
    for rates in (None, {"embedding": 1 / 3}):
        tx = make(rates=rates, weight_decay=0.0)
        first.append(tx.update(gradients(0), tx.init(tree()), tree())[0])
    whole, third = (updates["tokens"]["embedding"] for updates in first)
    np.testing.assert_allclose(third, whole / 3, rtol=1e-6)
    assert np.array_equal(*(updates["mlp"]["up"]["kernel"] for updates in first))


# A known end.


def law_rates(law, steps, alignment=-0.25, cooldown=None):
    """What the law multiplies the rate by, step by step; `cooldown` maps steps to its lengths."""
    state, one, scales = law.init(np.float32(0.0), xp=np), np.float32(1.0), []
    for step in range(steps):
        if step in (cooldown or {}):
            state = begin_cooldown(state, cooldown[step], xp=np)
        signals = Signals(one, one, one, np.float32(alignment), one)
        state, controls = law.step(state, signals, xp=np)
        scales.append(float(controls.meta_scale))
    return np.array(scales)


def test_the_rate_falls_from_twice_what_was_found_to_zero_at_the_end():
    scales = law_rates(SelfDriving(total_steps=100), 103, alignment=0.0)
    found = scales[19]
    wanted = 2.0 * found * (1.0 - np.arange(80) / 80)
    np.testing.assert_allclose(scales[20:100], wanted, rtol=1e-5)
    assert not scales[100:].any()


def test_a_rate_that_falls_teaches_the_law_nothing():
    law = SelfDriving(total_steps=100)
    state, one, scales = law.init(np.float32(0.0), xp=np), np.float32(1.0), []
    for step in range(60):
        alignment = np.float32(0.0 if step < 20 else 0.9)
        state, _ = law.step(state, Signals(one, one, one, alignment, one * 0.5), xp=np)
        scales.append(state.scale)
    assert scales[-1] == scales[19] != scales[18]


def test_a_cooldown_begins_at_any_step_and_can_be_put_off():
    scales = law_rates(SelfDriving(), 60, cooldown={10: 20, 20: 20})
    assert scales[10] == pytest.approx(2.0 * scales[9])
    assert scales[20] == scales[19] == pytest.approx(1.1 * scales[9])  # half way down
    np.testing.assert_allclose(np.diff(scales[20:40]), -scales[20] / 20, rtol=1e-4)
    assert not scales[40:].any()


def test_the_end_is_that_of_the_law_and_not_of_the_state():
    begun = SelfDriving(total_steps=20)
    state, one = begun.init(np.float32(0.0), xp=np), np.float32(1.0)
    for law, step, some in ((begun, 25, False), (SelfDriving(total_steps=1000), 5, True)):
        for _ in range(step):
            signals = Signals(one, one, one, np.float32(-0.25), one)
            state, controls = law.step(state, signals, xp=np)
        assert bool(controls.meta_scale > 0.0) == some


def test_a_cooldown_begins_at_the_peak_of_the_law():
    law = SelfDriving(cooldown_peak=1.0)
    state, one = law.init(np.float32(0.0), xp=np), np.float32(1.0)
    signals = Signals(one, one, one, np.float32(-0.25), one)
    state, before = law.step(state, signals, xp=np)
    _, after = law.step(begin_cooldown(state, 10, xp=np), signals, xp=np)
    assert after.meta_scale == before.meta_scale


def test_a_cooldown_of_more_steps_than_can_be_counted_is_refused():
    state = cruxy_optax.self_driving().init(tree())
    with pytest.raises(
        ValueError, match=r"steps must be in \[1, 2.14748e\+09\], got 1099511627776"
    ):
        cruxy_optax.cooldown(state, 2**40)
    assert cruxy_optax.cooldown(state, 2**31 - 1)


@pytest.mark.parametrize("steps", [0, 1.0])
def test_a_cooldown_of_an_array_of_no_steps_is_one_of_a_step(steps):
    """As the difference of two counters may be, inside `jit`."""
    tx = cruxy_optax.self_driving()
    begun = jax.jit(cruxy_optax.cooldown)(tx.init(tree()), jnp.asarray(steps))
    assert jax.tree.map(lambda x: x.dtype, begun) == jax.tree.map(
        lambda x: x.dtype, tx.init(tree())
    )
    updates, _ = tx.update(gradients(0), begun, tree(), value=1.0)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_cooldown_of_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, cruxy_optax.self_driving(), wrt=nnx.Param)
    optimizer.opt_state = cruxy_optax.cooldown(optimizer.opt_state, 5)
    optimizer.update(model, nnx.state(model, nnx.Param), value=1.0)
    shown = cruxy_optax.telemetry(optimizer.opt_state)["learning_rate"]
    assert float(shown) == pytest.approx(2e-3)


@pytest.mark.parametrize(("limit", "share"), [("usual", 0.1), (0.05, 0.05)])
def test_the_limit_is_twice_of_it_where_the_rate_begins_to_fall(limit, share):
    law = SelfDriving(total_steps=10, limit_yield=None)
    tx = cruxy_optax.self_driving(1.0, weight_decay=0.0, relative_limit=limit, law=law)
    params = {"norm": {"scale": jnp.ones(4)}}
    state, moved = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(params, state, params, value=1.0)
        moved.append(float(jnp.abs(updates["norm"]["scale"]).max()))
    assert moved == pytest.approx([share, share, 2 * share, 2 * share], rel=1e-4)


def test_cooldown_asks_for_a_law_that_finds_the_rate():
    with pytest.raises(ValueError, match="under SelfDriving"):
        cruxy_optax.cooldown(cruxy_optax.meta3(1e-3).init(tree()), 10)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1"):
        cruxy_optax.cooldown(cruxy_optax.self_driving().init(tree()), 0)


def test_cooldown_compiles_nothing_anew_and_state_may_be_donated():
    tx = cruxy_optax.self_driving()
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(tree())
    for step in range(4):
        if step == 2:
            state = cruxy_optax.cooldown(state, 5)
        _, state = update(gradients(step), state, tree(), value=jnp.float32(1.0))
    assert update._cache_size() == 1


torch = pytest.importorskip("torch")

from cruxy_torch import CruxyOptimizer, param_groups  # noqa: E402


class Net(torch.nn.Module):
    """The tree above as a module."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(12, 8)
        self.mlp = torch.nn.ModuleDict(
            {"up": torch.nn.Linear(8, 20), "down": torch.nn.Linear(20, 8, bias=False)}
        )
        self.norm = torch.nn.LayerNorm(8, bias=False)
        own = {
            "tokens.weight": tree()["tokens"]["embedding"],
            "mlp.up.weight": tree()["mlp"]["up"]["kernel"].T,
            "mlp.up.bias": tree()["mlp"]["up"]["bias"],
            "mlp.down.weight": tree()["mlp"]["down"]["kernel"].T,
            "norm.weight": tree()["norm"]["scale"],
        }
        self.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in own.items()})


def torch_gradients(net, step):
    g = gradients(step)
    net.tokens.weight.grad = torch.tensor(g["tokens"]["embedding"])
    net.mlp["up"].weight.grad = torch.tensor(g["mlp"]["up"]["kernel"].T.copy())
    net.mlp["up"].bias.grad = torch.tensor(g["mlp"]["up"]["bias"])
    net.mlp["down"].weight.grad = torch.tensor(g["mlp"]["down"]["kernel"].T.copy())
    net.norm.weight.grad = torch.tensor(g["norm"]["scale"])


@pytest.mark.parametrize("total_steps", [pytest.param(None, marks=pytest.mark.slow), STEPS - 5])
def test_both_frameworks_take_the_same_steps(total_steps):
    tx = cruxy_optax.self_driving_muon(weight_decay=0.0, total_steps=total_steps)
    params, state = train(tx)
    net = Net()
    optimizer = CruxyOptimizer(
        param_groups(net, lr=1e-3),
        mode="self_driving",
        direction="muon",
        weight_decay=0.0,
        total_steps=total_steps,
    )
    for step in range(STEPS):
        torch_gradients(net, step)
        optimizer.step(loss=1.0)
    rate = optimizer.telemetry()["learning_rate"]
    assert rate == pytest.approx(float(cruxy_optax.telemetry(state)["learning_rate"]), rel=1e-3)
    moved = np.abs(np.asarray(params["mlp"]["up"]["kernel"] - tree()["mlp"]["up"]["kernel"])).max()
    # Five products of matrices round each step by about 20 ulps of the direction.
    error = np.abs(
        np.asarray(params["mlp"]["up"]["kernel"]) - net.mlp["up"].weight.detach().numpy().T
    )
    assert error.max() < 1e-3 * moved


def test_torch_resumes_a_known_end_to_the_bit():
    def made():
        net = Net()
        groups = param_groups(net, lr=1e-3)
        return net, CruxyOptimizer(groups, mode="self_driving", direction="muon", total_steps=12)

    def run(net, optimizer, steps):
        for step in steps:
            torch_gradients(net, step)
            optimizer.step(loss=1.0)

    net, optimizer = made()
    run(net, optimizer, range(12))
    first, saving = made()
    run(first, saving, range(6))
    second, loading = made()
    second.load_state_dict(first.state_dict())
    loading.load_state_dict(saving.state_dict())
    run(second, loading, range(6, 12))
    for a, b in zip(net.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_parameter_is_does_not_come_from_a_checkpoint():
    def made():
        groups = [{**group, "stacked": True} for group in param_groups(Net(), lr=1e-3)]
        return CruxyOptimizer(groups, direction="muon")

    state = made().state_dict()
    for group in state["param_groups"]:
        del group["role"], group["stacked"]
    optimizer = made()
    known = [(group["role"], group["stacked"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    assert [(group["role"], group["stacked"]) for group in optimizer.param_groups] == known


def test_a_generator_of_parameters_is_read_once():
    net = torch.nn.Linear(3, 4, bias=False)
    optimizer = CruxyOptimizer([{"params": net.parameters(), "role": "mlp.up"}], direction="muon")
    assert optimizer.param_groups[0]["params"] == [net.weight]
    one = CruxyOptimizer([{"params": net.weight, "role": "mlp.up"}], direction="muon")
    assert one.param_groups[0]["betas"] == (0.9025, 0.95)


def test_experts_of_two_axes_and_of_three_are_matrices():
    experts = torch.nn.ParameterList(torch.randn(s) for s in ((16, 8), (2, 16, 8)))
    groups = [{"params": list(experts), "role": "moe.expert.up"}]
    optimizer = CruxyOptimizer(groups, direction="muon", weight_decay=0.0)
    for p in experts:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in experts]
    optimizer.step()
    moved = [(b - p).detach() for b, p in zip(before, experts, strict=True)]
    torch.testing.assert_close(moved[1][0], moved[0])


def test_stacked_layers_are_matrices_and_so_are_their_experts():
    gradients = torch.tensor(matrix(3, 2, 16, 8))

    def moved(role, gradient, **options):
        p = torch.nn.Parameter(torch.zeros_like(gradient))
        group = {"params": [p], "role": role, **options}
        optimizer = CruxyOptimizer([group], direction="muon", weight_decay=0.0)
        p.grad = gradient
        optimizer.step()
        return p.detach()

    layers = moved("mlp.up", gradients[:, 0], stacked=True)
    experts = moved("moe.expert.up", gradients, stacked=True)
    for layer in range(3):
        alone = moved("mlp.up", gradients[layer, 0])
        torch.testing.assert_close(layers[layer], alone, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(experts[layer, 0], alone, rtol=1e-3, atol=1e-7)


def test_vectors_among_matrices_are_refused():
    groups = [{"params": [torch.nn.Parameter(torch.ones(s)) for s in ((3, 4), (4,))]}]
    with pytest.raises(ValueError, match="must hold matrices alone"):
        CruxyOptimizer([{**groups[0], "role": "mlp.up"}], direction="muon")


@pytest.mark.parametrize("saved", ["muon", None])
def test_a_checkpoint_of_another_direction_is_refused(saved):
    def made(direction):
        return CruxyOptimizer(param_groups(Net(), lr=1e-3), direction=direction)

    loading = made(None if saved else "muon")
    with pytest.raises(ValueError, match="direction"):
        loading.load_state_dict(made(saved).state_dict())


def test_muon_asks_what_each_parameter_is():
    with pytest.raises(ValueError, match="param_groups"):
        CruxyOptimizer(Net().parameters(), direction="muon")


def test_an_end_belongs_to_self_driving():
    with pytest.raises(ValueError, match="total_steps"):
        CruxyOptimizer(Net().parameters(), total_steps=10, mode="meta3")
    for options in (
        {"law": SelfDriving(total_steps=10)},
        {"law": PlateauGuard(SelfDriving()), "total_steps": 10},
    ):
        assert CruxyOptimizer(Net().parameters(), **options).total_steps == 10
    with pytest.raises(ValueError, match="cooldown"):
        CruxyOptimizer(Net().parameters()).cooldown(5)
