"""Exact training in PyTorch: the bits of the reference by autograd, modules and optimizers."""

import copy
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402

from cruxy_exact import verify as check  # noqa: E402
from cruxy_exact.engines import ENGINES, Precision  # noqa: E402
from cruxy_exact.reference import Reference  # noqa: E402
from cruxy_torch import exact  # noqa: E402
from exact_models import Checkpointed, batch, reference_state, train  # noqa: E402
from exact_models import model as gpt  # noqa: E402
from relatives import relatives  # noqa: E402

STEPS = 3


@pytest.fixture(autouse=True)
def usual_precision():
    yield
    exact.use(bits=20, engine="f64")


@pytest.fixture(scope="module")
def wanted():
    """The parameters of the reference after a few steps, in NumPy."""
    return reference_state(Reference(), STEPS)


def same(model, params):
    ours = model.named()
    return {k for k in params if not np.array_equal(ours[k].detach().numpy(), params[k])} == set()


def test_modules_autograd_and_optimizer_train_the_reference_to_the_bit(wanted):
    assert same(train(gpt(Reference()), STEPS), wanted)


@pytest.mark.parametrize("engine", relatives(ENGINES[1:], ["int8", "digits"]))
def test_another_engine_trains_the_same_bits(engine):
    exact.use(engine=engine)
    assert same(train(gpt(Reference()), 1), reference_state(Reference(), 1))


def test_other_bits_are_another_run(wanted):
    exact.use(bits=22)
    assert not same(train(gpt(Reference()), STEPS), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(wanted, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(train(gpt(Reference()), STEPS), wanted)
    finally:
        torch.set_num_threads(before)


def test_a_checkpointed_block_has_the_same_bits(wanted):
    assert same(train(gpt(Reference(), Checkpointed), STEPS), wanted)


def test_under_autocast_nothing_changes(wanted):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = train(gpt(Reference()), STEPS)
    assert same(model, wanted)


def test_a_run_goes_on_from_its_state_dicts(wanted):
    model, optimizer = gpt(Reference()), None
    model, optimizer = train(model, 1, both=True)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = gpt(Reference())
    torch.nn.init.zeros_(other.head.weight)
    resumed = exact.AdamW(other.parameters(), lr=3e-3)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert same(train(other, STEPS, begin=1, optimizer=resumed), wanted)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_grains_in_any_order_have_the_same_bits(seed):
    reference = Reference(grain=1)
    model = gpt(reference)
    optimizer = exact.AdamW(model.parameters(), lr=reference.lr)
    grains = exact.GrainAccumulator(model)
    for step in range(2):
        x, y = batch(reference, step)
        order = np.random.default_rng(2 * seed + step).permutation(reference.batch)
        for i in order:
            exact.set_step(model, step, int(i))
            exact.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            grains.add()
        grains.finish(count=reference.batch * reference.length)
        exact.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, reference_state(reference, 2))


def test_the_graph_of_the_reference_holds_nothing_that_is_not_exact():
    reference = Reference()
    model = gpt(reference)
    exact.set_step(model, 0)
    x, y = batch(reference, 0)
    exact.check_graph(exact.cross_entropy(model(x), y))


def test_an_operation_that_is_not_exact_is_found():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="MulBackward0, which is not exact"):
        exact.check_graph(exact.sum(exact.silu(x) * 2.0))


def test_a_tensor_that_is_used_three_times_is_found_and_fork_helps():
    x = torch.ones(3, requires_grad=True)
    y = exact.add(exact.mul(x, exact.silu(x)), x)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is used 3 times"):
        exact.check_graph(exact.sum(y))
    a, b, c = exact.fork(x, 3)
    exact.check_graph(exact.sum(exact.add(exact.mul(a, exact.silu(b)), c)))


def test_the_gradients_of_a_fork_do_not_depend_on_their_order():
    x = torch.ones(4, requires_grad=True)
    got = []
    for order in ((0, 1, 2), (2, 0, 1)):
        copies = exact.fork(x, 3)
        parts = [exact.scale(copies[i], (1e8, -1e8, 1.0)[j]) for i, j in enumerate(order)]
        (grad,) = torch.autograd.grad(exact.sum(exact.add(exact.add(*parts[:2]), parts[2])), x)
        got.append(grad)
    assert got[0].tolist() == got[1].tolist() == [1.0] * 4


class Separate(nn.Module):
    """Attention whose queries, keys and values come from layers of their own."""

    def __init__(self, order, forked):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.forked = order, forked
        self.table = exact.Embedding(11, 8)
        self.layers = nn.ModuleList(exact.Linear(8, 8) for _ in range(3))

    def forward(self, ids):
        h = self.table(ids)
        copies, heads = exact.fork(h, 3) if self.forked else (h, h, h), {}
        for i in self.order:
            heads[i] = self.layers[i](copies[i]).unflatten(-1, (2, 4)).transpose(1, 2)
        q, k, v = (heads[i] for i in range(3))
        return exact.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_separate_layers_of_attention_need_a_fork():
    """Autograd adds in the order of the calls, which is none of a user's business."""
    ids = torch.arange(10).view(2, 5)

    def trained(order, forked):
        net = Separate(order, forked)
        optimizer = exact.AdamW(net.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            exact.cross_entropy(net(ids), ids % 8).backward()
            optimizer.step()
        return exact.checksum(net)

    orders = list(itertools.permutations(range(3)))
    assert len({trained(order, True) for order in orders}) == 1
    assert len({trained(order, False) for order in orders}) > 1
    with pytest.raises(ValueError, match="is used 3 times"):
        exact.check_graph(exact.sum(Separate(orders[0], False)(ids)))


def test_convert_swaps_what_it_knows_and_keeps_the_parameters():
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GELU(), nn.SiLU(),
        nn.ReLU(), nn.Dropout(0.25), nn.Dropout(0.5), nn.Linear(4, 3, bias=False),
    )  # fmt: skip
    before = list(model.parameters())
    converted = exact.convert_(model.eval(), seed=5)
    assert [type(m) for m in converted] == [
        exact.Embedding, exact.Linear, exact.LayerNorm, exact.RMSNorm, exact.GELU, exact.SiLU,
        exact.ReLU, exact.Dropout, exact.Dropout, exact.Linear,
    ]  # fmt: skip
    assert all(a is b for a, b in zip(before, converted.parameters(), strict=True))
    assert [converted[i].layer for i in (7, 8)] == [0, 1]
    assert not any(module.training for module in converted.modules())


def test_convert_names_what_it_does_not_know_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(TypeError, match=r"1\.0 is a BatchNorm1d, which exact knows no layer for"):
        exact.convert_(model)
    assert type(model[0]) is nn.Linear
    exact.convert_(model, allow=[nn.BatchNorm1d])
    assert type(model[0]) is exact.Linear


@pytest.mark.parametrize(
    "layer", [nn.Embedding(4, 2, padding_idx=0), nn.LayerNorm((2, 3)), nn.LayerNorm(3, bias=False),
              nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same")]
)  # fmt: skip
def test_an_option_that_an_exact_layer_lacks_is_an_error(layer):
    with pytest.raises(ValueError, match=r"exact\.\w+ (takes no|needs)"):
        exact.convert_(nn.Sequential(layer))


def test_a_dropout_whose_step_was_not_set_is_an_error():
    with pytest.raises(RuntimeError, match=r"call exact.set_step\(model, step\)"):
        exact.Dropout(0.5)(torch.ones(3))


def test_half_precision_is_an_error():
    with pytest.raises(TypeError, match=r"take float32 tensors, got torch\.bfloat16"):
        exact.Linear(2, 2)(torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_mean_loss_is_an_error(reduction):
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'none'"):
        exact.cross_entropy(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), reduction)


def test_shapes_that_would_broadcast_are_an_error():
    with pytest.raises(ValueError, match=r"exact\.add needs one shape"):
        exact.add(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(batch_size):
    model = gpt(Reference()).eval()
    x, _ = batch(Reference(), 0)
    alone, among = model(x[:1]), model(x[:batch_size])
    assert torch.equal(alone, among[:1])


def test_verify_finds_what_is_published():
    where = check.framework("torch")
    expected = check.table(check.framework("numpy"), Reference(), 1)
    assert check.verify(where, Reference(), steps=1, expected=expected) == (
        expected["checksum"],
        "",
    )


def loss64(r, params, x, y):
    """The reference's loss without dropout, in float64 and PyTorch's own functions."""
    h = params["tok"][x] + params["pos"][: x.shape[1]]

    def norm(name, h):
        return F.layer_norm(h, (r.width,), params[f"{name}.w"], params[f"{name}.b"])

    def linear(name, h):
        return h @ params[f"{name}.w"] + params[f"{name}.b"]

    for i in range(r.blocks):
        parts = linear(f"{i}.qkv", norm(f"{i}.ln1", h)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (r.heads, -1)).transpose(1, 2) for t in parts)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + linear(f"{i}.o", a)
        up = F.gelu(linear(f"{i}.up", norm(f"{i}.ln2", h)), approximate="tanh")
        h = h + linear(f"{i}.dn", up)
    logits = linear("head", norm("ln", h))
    return F.cross_entropy(logits.flatten(0, 1), y.flatten().long(), reduction="sum")


@pytest.mark.parametrize(("bits", "bound"), [(20, 1e-5), (22, 2e-6)])
def test_gradients_of_the_whole_gpt_are_near_those_of_float64(bits, bound):
    r = Reference(keep=256, precision=Precision(bits=bits))
    like = torch.zeros(1)
    params = {name: p.double().requires_grad_() for name, p in r.init(like, xp=torch).items()}
    x, y = r.data(0, like, xp=torch)
    true = torch.autograd.grad(loss64(r, params, x, y), list(params.values()))
    keys = r.dropout_keys(0, 0, like, xp=torch)
    start = {name: p.detach().float() for name, p in params.items()}
    _, ours = r.gradients(start, x, y, keys, xp=torch)
    pairs = [(ours[name].double(), t) for name, t in zip(params, true, strict=True)]
    errors = sorted(float((a - b).norm() / b.norm()) for a, b in pairs)
    whole = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    assert errors[len(errors) // 2] <= bound
    assert whole <= bound * torch.cat([t.flatten() for t in true]).norm()


def test_an_empty_batch_has_gradients_of_zero():
    layer = nn.Sequential(exact.Linear(3, 4), exact.LayerNorm(4), exact.GELU(), exact.SiLU())
    exact.sum(layer(torch.zeros(0, 3))).backward()
    assert all(not p.grad.any() for p in layer.parameters())
