"""The Triton kernels against the plain reference, on a GPU or by Triton's interpreter."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton_cases as cases  # noqa: E402
from cruxy_exact.codes import BlockCode  # noqa: E402
from cruxy_torch._kept import read, write  # noqa: E402
from cruxy_torch._native import fit, triton_launch, triton_passes, triton_tables  # noqa: E402
from triton_cases import DEVICE, everything, group, orders, ulps  # noqa: E402

pytestmark = [pytest.mark.gpu, cases.needs_a_place_to_run]

ROUNDINGS = 8
"""Units of the last place: a compiler of the reference may contract a product and a sum, which
moves a moment by one of them and a direction by a few."""


ORDERED = ("beta1", "beta2", "rate", "average_weight", "average_pull")


def stepped(steps=2, **options):
    """A group after some steps by Triton, and the same by the reference."""
    asked = {name: options.pop(name) for name in (*ORDERED, "ok", "scale") if name in options}
    limited = options.pop("limited", False)
    results = []
    for library in (triton_passes, None):
        own = group(**options)
        for step in range(steps):
            limits = None
            if limited:
                limits = torch.linspace(1e-3, 2e-2, len(own.params), device=DEVICE)
            with torch.no_grad():
                own.update(
                    orders(key=77 + step, limits=limits, **asked), native=library, foreach=False
                )
        results.append(everything(own))
    return results


def assert_alike(ours, theirs, *, dtype=torch.float32):
    """Within `ROUNDINGS`, but for the few codes that one of them turns."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.dtype in (torch.int8, torch.uint8, torch.bfloat16):
            assert torch.ne(ours[name], value).float().mean() <= 2e-3 or value.numel() < 2, name
        elif name.endswith("param") or "average" in name:
            apart = (ours[name] - value).abs()
            assert (apart <= ROUNDINGS * 2.0**-24 * (1.0 + value.abs())).all(), name
        else:
            # A sum may cancel: the last place that counts is that of its summands.
            apart = (ours[name] - value).abs()
            largest = value.abs().max() if value.numel() else 0.0
            assert (apart <= ROUNDINGS * 2.0**-24 * (value.abs() + 0.1 * largest)).all(), name


FORMS = [
    {"bits": bits, "dtype": dtype, "lion": lion, "chance": dtype is torch.bfloat16 and bits < 32}
    for bits, dtype, lion in itertools.product(
        (32, 16, 8, 4), (torch.float32, torch.bfloat16), (False, True)
    )
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: " ".join(map(str, f.values())))
def test_update_follows_the_reference_in_every_form(form):
    ours, theirs = stepped(averaged=form["bits"] in (32, 4), **form)
    assert_alike(ours, theirs)


OPTIONS = {
    "l2": {"coupled": True},
    "no decay": {"decay": 0.0},
    "no look ahead": {"nesterov": False},
    "limits": {"limited": True},
    "average of the last alone": {"averaged": True, "average_weight": 1.0},
    "average that pulls": {"averaged": True, "average_pull": 0.3},
    "average that pulls bfloat16": {"averaged": True, "average_pull": 0.3, "dtype": torch.bfloat16},
    "climbing": {"scale": -0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_update_follows_the_reference_under_every_option(name):
    assert_alike(*stepped(shapes=((33, 80), (7,)), **OPTIONS[name]))


@pytest.mark.skipif(not cases.INTERPRETED, reason="what torch contracts on a GPU is its own")
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_lion_has_the_bits_of_the_reference(bits):
    ours, theirs = stepped(steps=2, bits=bits, lion=True, shapes=((96, 77), (70,)))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.skipif(not cases.INTERPRETED, reason="what torch contracts on a GPU is its own")
def test_adam_is_within_a_place_of_the_reference_which_contracts_a_square_and_a_sum():
    ours, theirs = stepped(steps=1, shapes=((96, 77), (70,)))
    apart = {name: ulps(value, theirs[name]) for name, value in ours.items() if "param" not in name}
    assert {n: u for n, u in apart.items() if u > (1.0 if n.endswith("exp_avg_sq") else 0.0)} == {}


@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lion", [False, True])
def test_codes_and_their_random_bits_are_those_of_the_package(bits, lion, chance):
    # Where both decay rates are 0 a moment is the gradient, or its square, and nothing is rounded.
    shape = (37, 121)
    own = group(bits=bits, lion=lion, shapes=(shape, (4099,)), chance=chance, decay=0.0)
    values = [grad.clone() for grad in own.grads]
    expected = group(bits=bits, lion=lion, shapes=(shape, (4099,)), chance=chance)
    with torch.no_grad():
        own.update(
            orders(beta1=0.0, beta2=0.0, scale=1.0, key=-99), native=triton_passes, foreach=False
        )
    ok = torch.tensor(True, device=DEVICE)
    for name, wanted in (("exp_avg", values), ("exp_avg_sq", [x * x for x in values])):
        if name not in expected.columns.moments:
            continue
        write(expected.columns.moments[name], wanted, orders(key=-99).key, ok)
        for ours, theirs in zip(own.columns.states, expected.columns.states, strict=True):
            assert torch.equal(ours[f"{name}_codes"], theirs[f"{name}_codes"])
            assert torch.equal(ours[f"{name}_scales"], theirs[f"{name}_scales"])


@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_decoded_as_in_the_package(bits):
    own = group(bits=bits, shapes=((16, 256),), decay=0.0)
    first, second = (own.columns.moments[name][0] for name in ("exp_avg", "exp_avg_sq"))
    for kept in (first, second):
        every = torch.arange(kept.codes.numel(), device=DEVICE) % 256
        kept.codes.copy_(every.view(kept.codes.shape).to(kept.codes.dtype))
        kept.scales.copy_(2.0 ** torch.arange(-8, 8, device=DEVICE))
    (m,) = read([first], [torch.float32])
    total = triton_passes.sums_by_tensor(
        [torch.ones(16, 256, device=DEVICE)], 1.5, torch.ones((), device=DEVICE), [(first, 1.0)]
    )
    # Levels and scales are short numbers, whose sums are exact in float64 and nearly so in float32.
    torch.testing.assert_close(
        total[3, 0].double(), m.double().square().sum(), rtol=24 * 2.0**-24, atol=0.0
    )


def test_bfloat16_parameters_are_rounded_by_the_bits_of_the_package():
    both = []
    for library in (triton_passes, None):
        own = group(dtype=torch.bfloat16, chance=True, lion=True, shapes=((50, 41), (3,)))
        with torch.no_grad():
            own.update(orders(), native=library, foreach=False)
        both.append([p.clone() for p in own.params])
    assert all(map(torch.equal, *both))


def bound(sizes, tiles=64):
    """Relative roundings of a sum: an element goes through so many additions."""
    return (tiles + 12) * 2.0**-24


@pytest.mark.parametrize("gamma", [1.5, 2.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_every_tensor_are_those_of_float64(dtype, gamma):
    own = group(dtype=dtype)
    scale, factor = torch.tensor(0.7, device=DEVICE), float(torch.tensor(0.7))
    momenta = [torch.randn_like(g, dtype=torch.float32) for g in own.grads]
    signed = [(m, -1.0 if i % 2 else 1.0) for i, m in enumerate(momenta)]
    sums = triton_passes.sums_by_tensor(own.grads, gamma, scale, signed, own.params).double()
    few = 1e-6 if gamma == 1.7 else 2.0**-23  # the power of a number is not rounded to the nearest
    for i, (g, (m, sign), p) in enumerate(zip(own.grads, signed, own.params, strict=True)):
        g, m, p = g.double() * factor, m.double(), p.double()
        wanted = (g.square(), g.abs() ** gamma, sign * g * m, m.square(), p.square())
        for k, terms in enumerate(wanted):
            apart = (sums[k, i] - terms.sum()).abs()
            assert apart <= (bound(1) + few) * terms.abs().sum() + 1e-30, (k, i)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_sums_over_all_are_those_of_the_reference(bits):
    from cruxy_torch._sensors.measure import sums

    own = group(bits=bits, shapes=((96, 77), (64, 64)))
    with torch.no_grad():
        own.update(orders(), native=None, foreach=False)  # moments that are not zero
    momenta = [(kept, -1.0) for kept in own.momenta()]
    scale = torch.tensor(0.5, device=DEVICE)
    ours, theirs = (
        sums(own.grads, 1.5, scale, momenta, native=library, foreach=False)
        for library in (triton_passes, None)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)


def test_sums_are_the_same_bits_each_time():
    own = group(shapes=((200, 130), (17,), (5000,)))
    scale = torch.ones((), device=DEVICE)
    first, second = (triton_passes.sums(own.grads, 1.5, scale) for _ in range(2))
    assert torch.equal(first, second)


def test_a_gradient_that_is_not_finite_shows_in_the_sums():
    for value in (torch.nan, torch.inf):
        own = group(shapes=((7, 5), (300,)))
        own.grads[1][250] = value
        total = triton_passes.sums(own.grads, 1.5, torch.ones((), device=DEVICE))
        assert not total.isfinite().any()


@pytest.mark.parametrize("bits", [32, 8])
def test_a_skipped_step_leaves_every_bit_as_it_was(bits):
    own = group(bits=bits, averaged=True)
    own.grads[0][0, 0] = torch.nan
    before = everything(own)
    with torch.no_grad():
        own.update(orders(ok=False), native=triton_passes, foreach=False)
    after = everything(own)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_products_of_decay_rates_advance_once_however_many_programs_a_tensor_has():
    own = group(shapes=((5, 3000), (0, 3), (), (2,)))
    for _ in range(2):
        with torch.no_grad():
            own.update(orders(beta1=0.5, beta2=0.25), native=triton_passes, foreach=False)
    assert [s["beta1_product"].item() for s in own.columns.states] == [0.25] * 4
    assert [s["beta2_product"].item() for s in own.columns.states] == [0.0625] * 4
    assert all(not table.counters.any() for table in triton_tables._tables.values())


@pytest.mark.slow
def test_thousands_of_tensors_in_one_launch(monkeypatch):
    launched = []
    launch = triton_launch.launch
    monkeypatch.setattr(
        triton_launch, "launch", lambda *a, **k: launched.append(a[1]) or launch(*a, **k)
    )
    shapes = tuple((i % 5,) for i in range(2_000))
    ours, theirs = stepped(steps=1, shapes=shapes, averaged=True)
    assert_alike(ours, theirs)
    assert len(launched) == 1


def test_tensors_that_begin_anywhere_give_the_same_numbers():
    def result(offset):
        own = group(shapes=((40, 30), (1100,)))
        columns = own.columns
        for column in (columns.params, columns.grads, *columns.moments.values()):
            for i, tensor in enumerate(column):
                flat = torch.zeros(tensor.numel() + offset, device=DEVICE)
                column[i] = flat[offset:].view(tensor.shape).copy_(tensor)
        with torch.no_grad():
            own.update(orders(), native=triton_passes, foreach=False)
        return columns.params

    assert all(map(torch.equal, result(0), result(1)))


def test_a_table_is_built_once_for_the_same_addresses():
    own = group(shapes=((8, 8), (5,)))
    triton_tables._tables.clear()
    for _ in range(3):
        with torch.no_grad():
            own.update(orders(), native=triton_passes, foreach=False)
    assert len(triton_tables._tables) == 1
    own.grads[0] = own.grads[0].clone()
    with torch.no_grad():
        own.update(orders(), native=triton_passes, foreach=False)
    assert len(triton_tables._tables) == 2


def test_a_graph_takes_the_table_that_steps_on_another_stream_have_built(monkeypatch):
    triton_tables._tables.clear()
    columns = {"numel": [7], "grad": [1024]}
    ours = triton_tables.table(columns, DEVICE)
    monkeypatch.setattr(triton_tables, "_stream", lambda device: (False, 5))
    theirs = triton_tables.table(columns, DEVICE)
    monkeypatch.setattr(triton_tables, "_stream", lambda device: (True, 9))
    assert ours is not theirs
    assert triton_tables.table(columns, DEVICE) is theirs
    assert triton_tables.table(columns | {"grad": [2048]}, DEVICE) is not theirs
    assert len(triton_tables._tables) == 2  # what is copied in a graph is not kept


def test_tables_are_let_go():
    triton_tables._tables.clear()
    for length in range(triton_tables._KEPT + 3):
        triton_tables.table({"numel": [length], "grad": [16 * length]}, DEVICE)
    assert len(triton_tables._tables) == triton_tables._KEPT


def test_a_tensor_without_storage_is_refused():
    own = group(shapes=((8, 8),))
    own.grads[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no storage"), torch.no_grad():
        own.update(orders(), native=triton_passes, foreach=False)


LEFT = {
    "layout: not all in one order without gaps": lambda: torch.randn(8, 6, device=DEVICE)[:, ::2],
    "dtype torch.float64": lambda: torch.randn(4, device=DEVICE, dtype=torch.float64),
    "dtype torch.float16": lambda: torch.randn(4, device=DEVICE, dtype=torch.float16),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_not_taken_is_told(why):
    tensor = LEFT[why]()
    assert triton_passes.misfit([tensor, tensor], []) == why
    assert triton_passes.parts([[tensor], [tensor]]) == ([], [0])


def test_centralized_matrices_are_not_taken():
    matrix, vector = torch.ones(4, 5, device=DEVICE), torch.ones(4, device=DEVICE)
    columns = [matrix, vector], [matrix, vector]
    assert triton_passes.parts(columns, centralize=True) == ([[1]], [0])
    assert triton_passes.misfit([matrix], [], centralize=True) == "centralized"


def test_the_scale_of_a_code_and_its_shift_are_handed_over():
    form = triton_passes.Form.of(group(bits=8, shapes=((4096,),)).columns.moments["exp_avg"][0])
    code = BlockCode(8, True)
    assert (form.format, form.top, 1 << (form.shift - 1)) == (2, code.top, code.half)
    assert fit.Rules("cpu", frozenset(), rounded=True, centralized=False).rounded
