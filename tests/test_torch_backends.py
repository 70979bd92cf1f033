"""Which code takes a step: what there is, what is chosen for a process, what an optimizer took."""

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

import cruxy_torch  # noqa: E402
import torch_models as models  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer  # noqa: E402
from cruxy_torch._actuators import apply  # noqa: E402
from cruxy_torch._native import library, passes, triton_found  # noqa: E402
from cruxy_torch.backends import (  # noqa: E402
    VARIABLE,
    _choices,
    _of_environment,
    chosen,
    path,
)
from torch_low_bit import gradients, parameters  # noqa: E402

TESTS = Path(__file__).parent
needs_compiler = pytest.mark.skipif(not library.available(), reason="needs a C compiler")

TRAIN = """
import os, sys
import torch
import torch_models as models

def train(name):
    os.environ["CRUXY_TORCH_BACKEND"] = name
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 10)
    torch.save((models.everything(net, optimizer), optimizer.backend.tensors), name)

for name in sys.argv[1:]:
    child = os.fork()  # torch is imported once, the variable read in each process
    if not child:
        train(name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
BUILD = "from cruxy_torch._native import library; print(library.available())"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The environment is read anew, and what was chosen and found is forgotten afterwards."""
    monkeypatch.delenv(VARIABLE, raising=False)
    _of_environment.cache_clear()
    yield
    _of_environment.cache_clear()
    library._library.cache_clear()


def python(*arguments, cwd=None, **environment):
    """A process of its own, running."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def trained(**options):
    net = models.model()
    optimizer = models.optimizer(net, **options)
    models.train(net, optimizer, 10)
    return models.everything(net, optimizer)


OPTIONS = {
    "auto": {},
    "native": {"fused": True},
    "foreach": {"foreach": True},
    "reference": {"fused": False},
}


@pytest.mark.slow
@needs_compiler
def test_the_variable_is_obeyed_and_every_value_gives_equal_parameters(tmp_path):
    finished(python("-c", TRAIN, *OPTIONS, cwd=tmp_path))
    theirs = trained(**OPTIONS["reference"])
    for name, options in OPTIONS.items():
        ours, taken = torch.load(tmp_path / name)
        assert taken == {"native" if name == "auto" else name: 8}
        models.assert_equal(ours, trained(**options))  # to the bit what the arguments give
        for key, value in theirs.items():
            scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
            allowed = 10 * 16 * 2.0**-24  # roundings of float32, as in test_torch_paths
            torch.testing.assert_close(ours[key], value, rtol=allowed, atol=allowed * scale)


def test_an_unknown_value_of_the_variable_is_refused_at_the_first_step(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    (p,) = parameters((3,))
    optimizer = CruxyOptimizer([p])
    gradients([p], 0)
    words = "must be one of 'auto', 'native', 'triton', 'foreach', 'reference', got 'cuda'"
    with pytest.raises(ValueError, match=words):
        optimizer.step(loss=1.0)


def test_an_empty_variable_is_automatic(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert chosen() == "auto"


def test_a_choice_holds_inside_its_block_and_outside_until_the_next(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    seen = [chosen()]
    with cruxy_torch.use_backend("foreach"):
        seen.append(chosen())
        with cruxy_torch.use_backend(None):
            seen.append(chosen())
        seen.append(chosen())
    seen.append(chosen())
    assert seen == ["reference", "foreach", "auto", "foreach", "reference"]


def test_blocks_that_overlap_hold_until_their_own_end():
    first, second = cruxy_torch.use_backend("foreach"), None
    seen = []
    with contextlib.ExitStack() as ends_last, contextlib.ExitStack() as ends_first:
        ends_first.enter_context(first)
        second = ends_last.enter_context(cruxy_torch.use_backend("reference"))
        seen.append(chosen())
        ends_first.close()
        seen.append(chosen())
    seen.append(chosen())
    with second:
        seen.append(chosen())
    assert [*seen, chosen()] == ["reference", "reference", "auto", "reference", "auto"]


def test_the_first_block_holds_where_a_later_one_has_ended():
    with cruxy_torch.use_backend("foreach"), contextlib.ExitStack() as inner:
        inner.enter_context(cruxy_torch.use_backend("reference"))
        with cruxy_torch.use_backend("auto"):
            inner.close()
            assert chosen() == "auto"
        assert chosen() == "foreach"


def test_a_choice_without_a_block_holds_until_the_block_around_it_ends():
    with cruxy_torch.use_backend("foreach"):
        for _ in range(3):
            cruxy_torch.use_backend("auto")
            cruxy_torch.use_backend("reference")
        assert chosen() == "reference"
        assert len(_choices) == 3  # however often it was called
    assert chosen() == "auto"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .* got 'fused'"):
        cruxy_torch.use_backend("fused")
    assert chosen() == "auto"


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, "reference"),
        ({"foreach": True}, "foreach"),
        ({"fused": False}, "reference"),
        pytest.param({"fused": True}, "native", marks=needs_compiler),
        pytest.param({"compile": True}, "compile", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_an_optimizer_that_was_told_is_not_told_otherwise(options, taken):
    params = parameters((3,), (4, 5))
    optimizer = CruxyOptimizer(params, **options)
    gradients(params, 0)
    with cruxy_torch.use_backend("reference"):
        optimizer.step(loss=1.0)
        assert optimizer.backend.tensors == {taken: 2}


KINDS = {
    "class TwoTensor": 1,
    "dtype torch.bfloat16": 1,
    "dtype torch.float64": 1,
    "layout: not all in one order without gaps": 1,
}


def mixed():
    """One tensor for each reason, and two for the library."""
    whole, coded = parameters((96, 77), (128, 64))
    (half,) = parameters((6, 5), dtype=torch.bfloat16)
    (double,) = parameters((6, 5), dtype=torch.float64)
    gaps = torch.nn.Parameter(torch.randn(8, 6)[:, ::2])
    wrapped = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    groups = [
        {"params": [whole, half, double, gaps]},
        {"params": [coded], "state_bits": 8},
        {"params": [wrapped], "weight_decay": 0.0},
    ]
    for p in (whole, coded, half, double, gaps):
        p.grad = torch.randn_like(p)
    wrapped.grad = TwoTensor(torch.ones(3), torch.ones(3))
    return groups


@needs_compiler
def test_an_optimizer_tells_what_took_its_step_and_why_not_the_library(monkeypatch):
    optimizer = CruxyOptimizer(mixed())
    assert optimizer.backend == ({}, {})
    native, single = [], []
    update, one = passes.update, apply.SteppedTensor
    monkeypatch.setattr(
        passes, "update", lambda c, *a, **k: native.extend(c.params) or update(c, *a, **k)
    )
    monkeypatch.setattr(apply, "SteppedTensor", lambda *a: single.append(a) or one(*a))
    optimizer.step(loss=1.0)
    assert optimizer.backend.tensors == {"native": len(native), "reference": len(single)}
    assert (len(native), optimizer.backend.why) == (2, KINDS)
    optimizer.zero_grad()  # parameters stand in for gradients that are gone
    assert (optimizer.backend.tensors["native"], optimizer.backend.why) == (2, KINDS)


@needs_compiler
def test_asking_changes_nothing():
    groups = mixed()[:2]
    optimizer = CruxyOptimizer(groups)
    optimizer.step(loss=1.0)
    before = [v.clone() for state in optimizer.state.values() for v in state.values()]
    assert optimizer.backend.tensors["native"] == 2
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("made", "taken", "why"),
    [
        (AXIOM, "reference", "FactoredDirection has no native pass"),
        (lambda ps: Cosmic(ps, state_budget="1MB"), "foreach", "another backend was chosen"),
    ],
)
@needs_compiler
def test_axiom_and_cosmic_tell_too(made, taken, why):
    params = parameters((8, 8), (8, 8))
    optimizer = made(params)
    gradients(params, 0)
    with cruxy_torch.use_backend("foreach" if taken == "foreach" else None):
        optimizer.step(loss=1.0)
        assert optimizer.backend == ({taken: 2}, {why: 2})


@needs_compiler
def test_released_gradients_are_taken_one_by_one():
    params = parameters((8, 8), (8, 8))
    optimizer = CruxyOptimizer(params, foreach=True)
    optimizer.register_hooks()
    sum(p.square().sum() for p in params).backward()
    optimizer.step(loss=1.0)
    assert optimizer.backend.tensors == {"reference": 2}


def test_triton_that_is_not_there_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(triton_found, "_version", lambda: "")
    assert cruxy_torch.backends()[1][:3] == (
        "triton", False, "Triton is not installed; CUDA builds of PyTorch bring it"
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"'triton' needs Triton and .* not installed"):
        cruxy_torch.use_backend("triton")
    assert chosen() == "auto"


@pytest.mark.parametrize(
    ("version", "why"),
    [("3.1.0", "Triton 3.1.0 is older than 3.2"), ("3.10.0+git1", "no CUDA device")],
)
def test_why_triton_cannot_be_used(version, why, monkeypatch):
    monkeypatch.setattr(triton_found, "_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_found.found() == (why, version, False)


def test_the_variable_may_name_triton_on_a_cpu_whose_tensors_take_their_default(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _of_environment.cache_clear()
    try:
        assert chosen() == "triton"
        with_it = path(torch.device("cpu"))
        assert with_it == (passes if library.available() else None, False)
        with pytest.raises(RuntimeError, match="'triton' needs Triton and a CUDA device"):
            path(torch.device("cuda"))
    finally:
        monkeypatch.undo()
        _of_environment.cache_clear()


class TestTheLibrary:
    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library._library.cache_clear()

    def test_nothing_is_built_unless_asked_for(self, tmp_path):
        native, _, foreach, reference, _ = cruxy_torch.backends()
        assert (native.name, native.available, native.path) == ("native", False, None)
        assert (foreach.available, reference.available) == (True, True)
        assert not list(tmp_path.rglob("*.so"))

    def test_a_compiler_that_fails_leaves_its_reason(self, monkeypatch):
        monkeypatch.setenv("CC", "/bin/false")
        assert cruxy_torch.backends()[0].why == library.NOT_BUILT
        params = parameters((3,))
        optimizer = CruxyOptimizer(params)
        gradients(params, 0)
        optimizer.step(loss=1.0)
        why = "/bin/false ended with exit status 1"
        assert cruxy_torch.backends()[0][1:3] == (False, why)
        assert optimizer.backend == ({"reference": 1}, {f"no library: {why}": 1})
        with pytest.raises(RuntimeError, match=r"'native' needs a C compiler .* exit status 1"):
            cruxy_torch.use_backend("native")
        assert chosen() == "auto"

    def test_a_compiler_that_is_no_command_leaves_its_reason(self, monkeypatch):
        monkeypatch.setenv("CC", '"x')
        why = "CC must be a command, got '\"x': No closing quotation"
        assert cruxy_torch.backends()[0].why == why
        params = parameters((3,))
        optimizer = CruxyOptimizer(params)
        gradients(params, 0)
        optimizer.step(loss=1.0)
        assert optimizer.backend == ({"reference": 1}, {f"no library: {why}": 1})

    def test_a_compiler_of_cpp_that_is_no_command_leaves_its_reason(self, monkeypatch):
        monkeypatch.setenv("CXX", '"x')
        assert cruxy_torch.backends()[4][1:3] == (
            False,
            "CXX must be a command, got '\"x': No closing quotation",
        )

    def test_the_last_line_of_the_compiler_is_kept(self, monkeypatch, tmp_path):
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho one >&2\necho 'fatal: no such thing' >&2\nexit 3\n")
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(compiler))
        assert library.found(build=True).why == "fatal: no such thing"

    def test_without_a_compiler_that_is_the_reason(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert library.found(build=False).why.startswith("no C compiler found")
        assert library.found(build=True).why.startswith("no C compiler found")

    @needs_compiler
    def test_two_processes_build_it_at_once(self, tmp_path):
        both = [python("-c", BUILD, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
        assert [finished(process) for process in both] == ["True\n", "True\n"]
        (built,) = tmp_path.rglob("*.so")  # and it is whole: this process loads it, and builds none
        found = cruxy_torch.backends()[0]
        assert (found.available, found.path) == (True, built)

    @needs_compiler
    def test_a_damaged_file_is_told_and_passed_over(self):
        path = library._path(library._compiler(), *next(library._recipes()))
        path.write_text("no library")
        found = cruxy_torch.backends()[0]
        assert (found.available, found.path) == (False, path)
        assert "file too short" in found.why
        assert library.found(build=True).path != path


def test_the_command_prints_the_table():
    out = finished(python("-W", "error::RuntimeWarning", "-m", "cruxy_torch.backends"))
    assert f"torch {torch.__version__}" in out
    names = [line.split()[0] for line in out.splitlines()[-6:]]
    assert names == ["backend", "native", "triton", "foreach", "reference", "compile"]


def test_the_command_prints_the_rule_that_the_variable_breaks():
    out = finished(python("-m", "cruxy_torch.backends", **{VARIABLE: "cuda"}))
    assert f"{VARIABLE}=cuda: {VARIABLE} must be one of 'auto', 'native'" in out
    assert out.splitlines()[-1].startswith("compile")


@pytest.mark.slow
def test_the_command_times_five_rounds():
    out = finished(python("-m", "cruxy_torch.backends", "--time"))
    rows = [line.split() for line in out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["foreach", "reference"]
    assert all(float(low) <= float(middle) <= float(high) for _, middle, low, _, high in rows)
