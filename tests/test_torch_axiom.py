"""`AXIOM` in PyTorch: its formulas, its bytes, its guard, its state."""

import copy
import io
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import (  # noqa: E402
    AXIOM,
    _blocks,
    estimate_memory,
    state_bytes,
)
from relatives import crossed, relatives  # noqa: E402
from torch_models import trained_with_and_without_scaler  # noqa: E402

STILL = Meta3(
    phase_strength=0.0, rate_gain=0.0, beta1_gain=0.0, beta2_gain=0.0, clip_threshold=None
)
"""A controller that orders nothing but the guard."""

SHAPES = [(200, 130), (128, 128), (3, 128, 256), (128, 3, 3, 130), (20, 10), (9,), ()]

OPTIONS = {
    "plain": {},
    "relative": {"relative_step": True},
    "decayed": {"weight_decay": 0.1},
    "clipped": {"clip_rms": 0.3, "decay_rate": 0.5},
    "free": {"clip_rms": None, "min_dim_size_to_factor": 129},
    "momentum": {"momentum": 0.9, "momentum_bits": 32},
    "streak": {"momentum": 0.9, "momentum_bits": 32, "streak_boost": 1.5},
    "snr": {"momentum": 0.9, "momentum_bits": 32, "snr_floor": 0.2},
    "maximize": {"maximize": True},
    "all": {
        "momentum": 0.8,
        "momentum_bits": 32,
        "streak_boost": 1.3,
        "snr_floor": 0.1,
        "relative_step": True,
        "weight_decay": 0.05,
    },
}


def tensors(seed=0):
    """Parameters of every kind: factored over two, three and four axes, and not."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def gradients(step):
    """Of sizes from 1e-2 to 1e2; one whole row of the first is zero."""
    grads = [10.0 ** (step % 5 - 2) * g for g in tensors(100 + step)]
    grads[0][3] = 0.0
    return [np.asarray(g, np.float32) for g in grads]


def optimizer(params, **options):
    return AXIOM(params, **{"lr": 1e-2, "law": STILL, "weight_decay": 0.0, **options})


def step_with(opt, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g).to(p.dtype)
    opt.step()


def reading(
    theta,
    grads,
    *,
    lr,
    momentum=0.0,
    momentum_bits=32,
    weight_decay=0.0,
    decay_rate=0.8,
    relative_step=False,
    clip_rms=1.0,
    min_dim_size_to_factor=32,
    streak_boost=1.0,
    snr_floor=0.0,
    maximize=False,
):
    """The docstring's formulas in float64, one tensor over some steps."""
    theta = np.asarray(theta, np.float64)
    v = m = 0.0
    row = column = 0.0
    order = np.argsort(theta.shape, kind="stable") if theta.ndim > 1 else ()
    factored = theta.ndim > 1 and theta.shape[order[-2]] >= min_dim_size_to_factor
    for t, g in enumerate(grads, start=1):
        g = np.asarray(g, np.float64) * (-1 if maximize else 1)
        beta = 1.0 - t**-decay_rate
        square = g**2 + 1e-30
        if factored:
            second, first = order[-2:]
            row = beta * row + (1 - beta) * square.mean(first, keepdims=True)
            column = beta * column + (1 - beta) * square.mean(second, keepdims=True)
            v = row * column / row.mean(second, keepdims=True)
        else:
            v = beta * v + (1 - beta) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()) / (clip_rms or np.inf))
        if momentum:
            m = momentum * m + (1 - momentum) * u
            m_hat = m / (1 - momentum**t)
            u = m_hat * (1 + (streak_boost - 1) * np.minimum(1, np.abs(m_hat)))
            if snr_floor:
                snr = (m_hat**2).mean(-1, keepdims=True) if m_hat.ndim else m_hat**2
                u = u * np.minimum(1, snr / snr_floor)
        rho = max(1e-3, np.sqrt((theta**2).mean())) if relative_step else 1.0
        theta = theta - lr * (rho * u + weight_decay * theta)
    return theta


@pytest.mark.parametrize(
    ("name", "block"),
    crossed(OPTIONS, [None, 5000], fast=[*((name, None) for name in OPTIONS), ("all", 5000)]),
)
def test_ten_steps_are_those_of_the_formulas(name, block, monkeypatch):
    if block:  # tensors of more elements are treated in blocks
        monkeypatch.setattr(_blocks, "BLOCK", block)
    params = [nn.Parameter(torch.tensor(x)) for x in tensors()]
    opt = optimizer(params, **OPTIONS[name])
    grads = [gradients(step) for step in range(10)]
    for each in grads:
        step_with(opt, params, each)
    for i, start in enumerate(tensors()):
        expected = reading(start, [g[i] for g in grads], lr=1e-2, **OPTIONS[name])
        # A step is at most about the rate times 8 (a coordinate of u); of that, some 16 roundings,
        # and one for each step in theta itself.
        size = max(1.0, float(np.abs(expected).max()))
        allowed = 10 * 2.0**-24 * (16 * 8 * 1e-2 + size)
        np.testing.assert_allclose(params[i].detach().numpy(), expected, rtol=0, atol=allowed)


class Lines(nn.Module):
    """The matrices and vectors of a GPT with 10.7 million parameters."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(65, 384), nn.Embedding(256, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, bias=False)
        self.blocks = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def llama_1b():
    """The shapes of TinyLlama-1.1B in bfloat16."""
    width, hidden, small = 2048, 5632, 256
    layer = [(width, width)] * 2 + [(small, width)] * 2 + [(hidden, width)] * 2 + [(width, hidden)]
    shapes = [(32000, width)] * 2 + 22 * layer + 45 * [(width,)]
    return nn.ParameterList(nn.Parameter(torch.empty(s, dtype=torch.bfloat16)) for s in shapes)


@pytest.mark.parametrize("build", [Lines, llama_1b])
def test_matrices_with_sides_of_384_or_more_cost_at_most_3_percent_of_a_byte_each(build):
    with torch.device("meta"):
        model = build()
    large = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) >= 384]
    count = sum(p.numel() for p in large)
    assert count > 0.97 * sum(p.numel() for p in model.parameters())  # nearly all of it
    held = nn.ParameterList(large)
    estimate = estimate_memory(held, AXIOM)
    assert estimate.state <= 0.03 * count


def test_momentum_in_four_bits_costs_half_a_byte():
    with torch.device("meta"):
        held = nn.ParameterList(p for p in Lines().parameters() if p.ndim == 2)
    count = sum(p.numel() for p in held)
    assert estimate_memory(held, lambda params: AXIOM(params, momentum=0.9)).state <= 0.54 * count


def test_the_estimate_is_what_a_step_makes():
    model = Lines()
    for factory in (AXIOM, lambda params: AXIOM(params, momentum=0.9)):
        opt = factory(list(model.parameters()))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert estimate_memory(model, factory).state == state_bytes(opt)


def everything(opt, params):
    kept = {f"param{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        kept |= {f"{i}.{key}": value.clone() for key, value in opt.state[p].items()}
    return kept


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("value", "bits"), crossed([math.nan, math.inf, 1e30], [None, 4, 8, 16, 32])
)
def test_a_bad_gradient_leaves_everything_bit_for_bit(value, bits):
    momentum = {"momentum": 0.9, "momentum_bits": bits} if bits else {}
    params = [nn.Parameter(torch.tensor(x)) for x in tensors()]
    opt = optimizer(params, **momentum)
    for _ in range(2):  # once before anything was learnt, once after
        for p in params:
            opt.state[p]  # made by the first step, skipped or not
        bad = gradients(0)
        bad[0].flat[7] = value
        if "row_var" in opt.state[params[0]]:
            before = everything(opt, params)
            step_with(opt, params, bad)
            assert_same(everything(opt, params), before)
        else:
            step_with(opt, params, bad)
            for p, x in zip(params, tensors(), strict=True):
                assert torch.equal(p.detach(), torch.tensor(x))
            assert all(
                not s.any()
                for p in params
                for k, s in opt.state[p].items()
                if k not in ("beta1_product", "shard_elements")
            )
        step_with(opt, params, gradients(1))
    assert opt.telemetry()["skipped_total"] == 2
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_bits": 8}])
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(options):
    params = [nn.Parameter(torch.tensor(x)) for x in tensors()]
    opt = AXIOM(params, lr=1e-2, **options)
    for step in range(3):
        step_with(opt, params, gradients(step))
    file = io.BytesIO()
    torch.save({"params": [p.data for p in params], "opt": opt.state_dict()}, file)
    for step in range(3, 6):
        step_with(opt, params, gradients(step))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(p) for p in saved["params"]]
    other = AXIOM(others, lr=1e-2, **options)
    other.load_state_dict(saved["opt"])
    for step in range(3, 6):
        step_with(other, others, gradients(step))
    assert_same(everything(other, others), everything(opt, params))


def test_bfloat16_parameters_learn_from_steps_below_half_a_unit():
    # At 1.0 bfloat16 has steps of 2^-8 below; a step of 1e-4 is lost unless chance rounds it.
    moved = {}
    for chance in (True, False):
        p = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
        opt = optimizer([p], lr=1e-4, stochastic_rounding=chance)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            opt.step()
        moved[chance] = 1.0 - p.detach().float().mean().item()
    assert moved[False] == 0.0
    # Each of 65536 elements moves by 2^-8 with probability p = 0.0256 a step, 50 times: the mean's
    # standard deviation is 2^-8 sqrt(50 p / 65536) = 1.8e-5 of 5e-3; five of them.
    assert abs(moved[True] - 5e-3) < 9e-5


def test_second_moments_of_half_precision_are_float32():
    p = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    opt = AXIOM([p])
    p.grad = torch.ones_like(p)
    opt.step()
    assert {k: v.dtype for k, v in opt.state[p].items()} == {
        "row_var": torch.float32,
        "col_var": torch.float32,
        "step": torch.int32,
    }


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(130, 200), nn.Tanh(), nn.Linear(200, 5))


def batch(step):
    x = torch.randn(16, 130, generator=torch.Generator().manual_seed(step))
    return x, x[:, :5].sin()


def train(model, opt, steps):
    for step in range(steps):
        opt.zero_grad()
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step(loss=loss)
    return loss.item()


@pytest.mark.parametrize(
    "options",
    relatives(
        [{}, {"momentum": 0.9, "momentum_bits": 32}, {"momentum": 0.9}], [{}, {"momentum": 0.9}]
    ),
)
def test_released_gradients_give_the_parameters_of_ordinary_steps(options):
    models = [net(), net()]
    for model, release in zip(models, (False, True), strict=True):
        opt = optimizer(model.parameters(), **options)
        if release:
            opt.register_hooks()
        train(model, opt, 50)
        assert release == all(p.grad is None for p in model.parameters())
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, theirs)


def test_hooks_can_be_removed_and_gradients_then_stay():
    model = net()
    opt = AXIOM(model.parameters())
    opt.register_hooks()
    opt.remove_hooks()
    before = [p.detach().clone() for p in model.parameters()]
    model(batch(0)[0]).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_it_learns():
    model = net()
    first = train(model, AXIOM(model.parameters(), lr=0.0), 1)
    assert train(model, AXIOM(model.parameters(), lr=3e-3), 100) < first / 4


def test_the_loss_reaches_the_controller():
    model = net()
    opt = AXIOM(model.parameters())
    loss = train(model, opt, 3)
    assert opt.telemetry()["loss"] == loss
    assert opt.telemetry()["curvature"] != 0.0


def test_groups_have_options_of_their_own():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = optimizer([{"params": [a], "lr": 0.0}, {"params": [b], "momentum": 0.9}], lr=0.1)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    opt.step()
    assert torch.equal(a.detach(), torch.ones(4))
    assert "exp_avg" in opt.state[b]
    assert "exp_avg" not in opt.state[a]
    np.testing.assert_allclose(b.detach(), 0.9, atol=1e-6)


def test_parameters_that_begin_late_start_their_own_clock():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt = optimizer([a, b], lr=0.1, momentum=0.5, momentum_bits=32)
    for step in range(4):
        a.grad, b.grad = torch.ones(3), torch.ones(3) if step == 3 else None
        opt.step()
    # A first step is the rate whatever the size of the gradient.
    torch.testing.assert_close(b.detach(), torch.full((3,), -0.1))
    assert [int(opt.state[p]["step"]) for p in (a, b)] == [4, 1]


def test_a_copy_goes_on_as_the_original():
    model = net()
    opt = AXIOM(model.parameters(), momentum=0.9)
    train(model, opt, 3)
    other_model, other = copy.deepcopy((model, opt))
    for each in ((model, opt), (other_model, other)):
        train(*each, 3)
    for ours, theirs in zip(other_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_scaled_gradients_are_those_of_a_run_without_a_scaler():
    models = trained_with_and_without_scaler(
        net, lambda m: AXIOM(m.parameters(), momentum=0.9, momentum_bits=32)
    )
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_reads_no_value_on_the_host():
    # A tensor on meta has no values: whoever asks for one is refused.
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
    opt = AXIOM(params, momentum=0.9, streak_boost=1.5, snr_floor=0.1, relative_step=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        opt.step()


def test_rates_are_read_and_set_in_every_group():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = AXIOM([{"params": [a]}, {"params": [b], "lr": torch.tensor(0.5)}], lr=0.25)
    assert opt.get_lr() == 0.25
    opt.set_lr(0.125)
    assert [float(g["lr"]) for g in opt.param_groups] == [0.125, 0.125]
    assert isinstance(opt.param_groups[1]["lr"], torch.Tensor)
    with pytest.raises(ValueError, match=r"lr must be in \[0, infinity\), got -1"):
        opt.set_lr(-1)


def test_memory_usage_counts_what_lives():
    model = net()
    opt = AXIOM(model.parameters())
    train(model, opt, 1)
    usage = opt.memory_usage()
    weights = sum(p.nbytes for p in model.parameters())
    assert usage["parameters"] == usage["gradients"] == weights
    assert usage["state"] == state_bytes(opt)
    assert usage["total"] == 2 * weights + usage["state"]
    opt.zero_grad()
    assert opt.memory_usage()["gradients"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, infinity\), got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum_bits": 3}, "momentum_bits must be 4, 8, 16 or 32, got 3"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0, infinity\), got -0.1"),
        ({"decay_rate": 0.0}, r"decay_rate must be in \(0, 1\], got 0.0"),
        ({"clip_rms": 0.0}, r"clip_rms must be in \(0, infinity\), got 0.0"),
        ({"min_dim_size_to_factor": 1}, "min_dim_size_to_factor must be a whole number >= 2"),
        ({"momentum": 0.9, "streak_boost": 2.0}, r"streak_boost must be in \[1, 1.5\], got 2.0"),
        ({"momentum": 0.9, "snr_floor": 1.0}, r"snr_floor must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.0, "streak_boost": 1.5}, "streak_boost needs momentum, got momentum=0.0"),
        ({"momentum": 0.0, "snr_floor": 0.1}, "snr_floor needs momentum, got momentum=0.0; set"),
    ],
)
def test_bad_arguments_are_named_with_rule_value_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        AXIOM([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(300, 130), (130, 200), (200, 131), (200, 130, 2)])
def test_a_state_of_a_matrix_of_another_shape_is_refused(shape, momentum):
    def trained(shape):
        p = nn.Parameter(torch.ones(shape))
        optimizer = AXIOM([p], momentum=momentum, momentum_bits=32)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p, optimizer

    _, saved = trained(shape)
    _, optimizer = trained((200, 130))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="must have shape"):
        optimizer.load_state_dict(saved.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    optimizer.step()


@pytest.mark.parametrize("damage", [lambda codes: codes.float(), lambda codes: codes[:, :100]])
def test_codes_that_are_none_are_refused(damage):
    p = nn.Parameter(torch.ones(200, 130))
    optimizer = AXIOM([p], momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_codes"] = damage(saved["state"][0]["exp_avg_codes"])
    with pytest.raises(ValueError, match="exp_avg_codes must hold codes of 16, 8 or 4 bits"):
        optimizer.load_state_dict(saved)
