"""Exact optimizers, schedules, laws and checksums; the lint of what the definition forbids."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from cruxy_control import Meta3, PlateauGuard, SelfDriving, Signals, StabilityV2  # noqa: E402
from cruxy_exact import checksum as checksums  # noqa: E402
from cruxy_exact import optimizers  # noqa: E402
from cruxy_exact import verify as check  # noqa: E402
from cruxy_exact.__main__ import main  # noqa: E402
from cruxy_exact.engines import Precision  # noqa: E402
from cruxy_exact.reference import Reference  # noqa: E402
from cruxy_exact.scalars import Exact  # noqa: E402
from exact_arrays import NAMES, array, namespace, normal, run, same  # noqa: E402

ROOT = Path(__file__).parent.parent
JAX_SLOW = ["torch", pytest.param("jax.numpy", marks=pytest.mark.slow)]


def adamw(p, g, m, v, w, xp):
    products = optimizers.next_products((w, w * 0.5), (0.9, 0.999), xp=xp)
    factors = optimizers.adam_factors(*products, xp=xp)
    return optimizers.adamw(p, g, m, xp.abs(v), factors, lr=1e-3, xp=xp)


STEPS = {
    "adamw": adamw,
    "lion": lambda p, g, m, v, w, xp: optimizers.lion(p, g, m, lr=1e-3, weight_decay=0.1, xp=xp),
    "sgd": lambda p, g, m, v, w, xp: optimizers.sgd(
        p, g, m, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, xp=xp
    ),
    "norm": lambda p, g, m, v, w, xp: optimizers.global_norm([p, g, m], xp=xp),
    "gamma norm 1.5": lambda p, g, m, v, w, xp: optimizers.gamma_norm([p, g], 1.5, xp=xp),
    "gamma norm 1.7": lambda p, g, m, v, w, xp: optimizers.gamma_norm([p, g], 1.7, xp=xp),
}


@pytest.mark.parametrize("name", JAX_SLOW)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_has_the_bits_it_has_in_numpy(step, name):
    arrays = [normal(50, 7, seed=i, scale=10.0 ** -(2 * i)) for i in range(4)]
    arrays.append(np.array(0.7, np.float32))
    got, want = run(STEPS[step], *arrays, name=name), run(STEPS[step], *arrays, name="numpy")
    pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gamma", [1.5, 1.7, 2.0])
def test_norms_are_right_at_any_scale(scale, gamma):
    leaves = [normal(40, scale=scale), normal(7, seed=1, scale=scale)]
    true = float(sum(np.sum(np.abs(x.astype(float)) ** gamma) for x in leaves) ** (1 / gamma))
    assert optimizers.gamma_norm(leaves, gamma, xp=np) == pytest.approx(true, rel=2e-6)
    if gamma == 2.0:
        assert optimizers.global_norm(leaves, xp=np) == pytest.approx(true, rel=2**-22)


def test_a_norm_that_is_not_finite_clips_to_nan():
    with np.errstate(all="ignore"):
        norm = optimizers.global_norm([np.float32([1.0, np.inf])], xp=np)
        assert np.isnan(optimizers.clip_factor(norm, 1.0, xp=np))


def cosine(t):
    rise, fall = t / 1000, (t - 1000) / 99_000
    height = 0.5 * (1 + np.cos(np.pi * np.clip(fall, 0, 1)))
    return np.where(t < 1000, 3e-4 * rise, 1e-5 + (3e-4 - 1e-5) * height)


def stable(t):
    left = np.clip((100_000 - t) / 20_000, 0, 1)
    return np.where(t < 1000, 3e-4 * t / 1000, 1e-5 + (3e-4 - 1e-5) * left)


SCHEDULES = {
    "cosine": (lambda t, xp: optimizers.warmup_cosine(
        t, peak=3e-4, end=1e-5, warmup=1000, steps=100_000, xp=xp), cosine),
    "stable": (lambda t, xp: optimizers.warmup_stable_decay(
        t, peak=3e-4, end=1e-5, warmup=1000, decay=20_000, steps=100_000, xp=xp), stable),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_has_the_same_bits_over_a_hundred_thousand_steps(schedule):
    call, true = SCHEDULES[schedule]
    count = np.arange(100_010, dtype=np.int32)
    values = [run(call, count, name=name) for name in NAMES]
    assert same(values[0], values[1])
    assert same(values[0], values[2])
    assert np.max(np.abs(values[0] - true(count.astype(float)))) <= 3e-4 * 2.0**-21


LAWS = {
    "meta3": Meta3(),
    "v2": StabilityV2(),
    "self-driving": SelfDriving(total_steps=60),
    "guarded": PlateauGuard(law=SelfDriving()),
}


def orders(law, name, steps=60):
    """What a law orders over some steps with outliers and a gradient that is not finite."""
    xp, random = namespace(name), np.random.default_rng(0)
    scalar = lambda x: array(np.float32(x), xp)  # noqa: E731
    state, step, out = law.init(scalar(0.0), xp=xp), law.step, []
    call = lambda state, *s: step(state, Signals(*s), xp=xp)  # noqa: E731
    if name == "jax.numpy":
        import usual

        call = usual.jit(call)
    for t in range(steps):
        norm = float(np.exp(0.5 * random.standard_normal())) * (100 if t == 30 else 1)
        norm = math.nan if t == 40 else norm
        loss = 3 / (1 + t) + 0.1 * random.standard_normal()
        signals = (norm, 1.3 * norm, loss, np.tanh(random.standard_normal()), 0.7 if t % 3 else 1)
        state, controls = call(state, *map(scalar, signals))
        out.append([float(x) for x in controls])
    return np.float32(out)


@pytest.mark.parametrize("name", JAX_SLOW)
@pytest.mark.parametrize("law", LAWS)
def test_a_law_on_exact_scalars_gives_the_same_orders(law, name):
    import jax

    with np.errstate(all="ignore"):
        want, plain = orders(Exact(LAWS[law]), "numpy"), orders(LAWS[law], "numpy")
        with jax.enable_x64(True):
            got = orders(Exact(LAWS[law]), name)
    assert same(got, want)
    assert np.allclose(want, plain, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_law_on_plain_scalars_does_not():
    """The negative control: PyTorch's own functions round otherwise."""
    with np.errstate(all="ignore"):
        assert not same(orders(Meta3(), "torch"), orders(Meta3(), "numpy"))


@pytest.mark.parametrize("name", NAMES)
def test_a_checksum_sees_numbers_and_not_how_they_lie(name):
    x = normal(6, 4)
    x[1, 1] = np.nan
    want = checksums.checksum({"a": {"w": x}, "b": [x[0]]}, xp=np)
    xp = namespace(name)
    wide, flipped = array(np.repeat(x, 2, 1), xp), array(x.T.copy(), xp)
    for w in (array(x, xp), wide[:, ::2], flipped.T):
        assert checksums.checksum({"b": [w[0]], "a": {"w": w}}, xp=xp) == want


def test_a_checksum_tells_names_bits_grains_and_every_bit_apart():
    x = {"w": np.ones((2, 3), np.float32)}
    almost = {"w": np.nextafter(x["w"], np.float32(2))}
    found = [
        checksums.checksum(x, xp=np), checksums.checksum({"v": x["w"]}, xp=np),
        checksums.checksum({"w": x["w"].T}, xp=np), checksums.checksum(almost, xp=np),
        checksums.checksum(x, bits=22, xp=np), checksums.checksum(x, grain=1, xp=np),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_a_checksum_of_bfloat16_is_an_error():
    with pytest.raises(TypeError, match=r"of float32 arrays, got torch\.bfloat16 in 'w'"):
        checksums.checksum({"w": torch.ones(2, dtype=torch.bfloat16)}, xp=torch)


class Off:
    """NumPy, a softmax of which is off from some call on; by more than the next product rounds."""

    def __init__(self, calls):
        self.__name__, self.calls = "numpy", calls

    def __getattr__(self, name):
        return getattr(np, name)

    def exact_softmax_forward(self, z, *, xp):
        from cruxy_exact.attention import softmax_forward

        p, _ = softmax_forward.__wrapped__(z, xp=np)
        self.calls -= 1
        if self.calls < 0:
            p = p.copy()
            p.flat[0] *= np.float32(0.999)
        return p, (p,)


@pytest.mark.parametrize(
    ("calls", "place"),
    [(0, "step 0: 0.attention forward"), (1, "step 0: 1.attention forward"),
     (3, "step 1: 1.attention forward")],
)  # fmt: skip
def test_verify_names_the_first_step_and_operation_that_differ(calls, place):
    where, reference = check.framework("numpy"), Reference()
    expected = check.table(where, reference, 2)
    where.xp = Off(calls)
    state, _, _ = check.train(where, reference, 2)
    assert check.of(where, reference, state) != expected["checksum"]
    where.xp = Off(calls)
    assert check.difference(where, reference, expected, 2).endswith(place)


SELF_DRIVING = Reference(driver=check.self_driving())
BITS = {bits: Reference(precision=Precision(bits)) for bits in (20, 22, 13)}
REFERENCES = {
    **{f"{bits} bits": reference for bits, reference in BITS.items()},
    "grains": Reference(grain=1),
    "self-driving": SELF_DRIVING,
}


def test_published_checksums_are_of_this_definition():
    rows = check.published()
    assert {check.key(reference) for reference in REFERENCES.values()} == rows.keys()
    assert all(row["seen"] and len(row["checksum"]) == 16 for row in rows.values())


@pytest.mark.parametrize("bits", BITS)
def test_every_operation_of_the_first_step_is_as_published(bits):
    """A constant or an order that differs makes another definition, under another name."""
    reference = BITS[bits]
    row = check.published()[check.key(reference)]
    _, [record], _ = check.train(check.framework("numpy"), reference, 1, recorded=True)
    assert [name for name, _ in record] == row["operations"]
    assert "".join(digits for _, digits in record) == row["steps"][0]


@pytest.mark.parametrize("name", JAX_SLOW)
def test_a_self_driving_run_has_the_bits_it_has_in_numpy(name):
    found = []
    for framework in ("numpy", name.partition(".")[0]):
        where = check.framework(framework)
        state, _, _ = check.train(where, SELF_DRIVING, 3)
        found.append(check.of(where, SELF_DRIVING, state))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_published_comes_out_again(reference, framework):
    assert check.verify(check.framework(framework), REFERENCES[reference])[1] == ""


FILES = [
    *(ROOT / "cruxy_exact" / f"{name}.py" for name in (
        "arithmetic", "sums", "engines", "layers", "attention", "convolution", "optimizers",
        "accumulate", "initial", "reference", "scalars", "tape", "driven",
    )),
    *(ROOT / "cruxy_torch" / "exact").glob("*.py"),
    *(ROOT / "cruxy_optax" / "exact").glob("*.py"),
]  # fmt: skip
ON_THE_HOST = {"div", "rotary_table", "_cos_sin", "shapes", "slowdown", "__init__", "heads"}
"""Functions in which `/` is of Python numbers, but for `div` itself."""


def quotients(tree):
    """Functions that divide by `/` otherwise than in a number that is rounded on the host."""
    found = []

    def visit(node, function, on_host):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        on_host = on_host or (isinstance(node, ast.Call) and ast.unparse(node.func) == "f32")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {"math"}
            if names and not on_host and function not in ON_THE_HOST:
                found.append((function, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child, function, on_host)

    visit(tree, "", False)
    return found


PLAIN = ("models.py", "_reference.py")
"""Which hold what exact training is compared with."""


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in PLAIN], ids=lambda p: p.stem)
def test_nothing_is_divided_outside_div_and_no_fused_call_is_made(path):
    tree = ast.parse(path.read_text("utf-8"))
    allowed = {
        ("gamma_norm", "1 / gamma"),
        ("linear", "1 / math.sqrt(rows)"),
        ("mean", "1.0 / jnp.size(x)"),
        ("init", "1 / math.sqrt(math.prod(shape[:-1]))"),
    }
    assert [q for q in quotients(tree) if q not in allowed] == []
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    called = {ast.unparse(n.func).rpartition(".")[2].rstrip("_") for n in calls}
    fused = {"addcmul", "addcdiv", "lerp", "addmm", "baddbmm", "pow", "rsqrt", "einsum"}
    assert not called & fused
    assert not {keyword.arg for n in calls for keyword in n.keywords} & {"alpha", "beta"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("verify --bits 0", "bits must be"),
        ("verify --bits 19", "a published reference must be verified, got 'exact-1 bits=19"),
        ("verify --device cuda", "use --framework torch"),
        ("verify --grain 0", "--grain must be at least 1, got 0"),
        ("verify --grain -1", "--grain must be at least 1, got -1"),
        ("verify --replace", "--replace must go with publish"),
        ("verify --bench", "--bench must go with verify and --framework torch or jax"),
        ("publish --bench --framework jax", "--bench must go with verify"),
    ],
)
def test_options_that_do_not_go_together_are_no_difference_of_bits(options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_gpu_that_is_not_there_is_said(name, capsys):
    module = pytest.importorskip(name)
    has = module.cuda.is_available() if name == "torch" else module.default_backend() == "gpu"
    if has:
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--framework", name, "--device", "cuda"])
    assert stopped.value.code == 2
    assert f"device must be one that {name} has here" in capsys.readouterr().err
