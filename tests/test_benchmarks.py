"""The instruments measure what they say, and each framework's work without the other."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks._jax.hlo import copied_bytes, host_calls, reads_of_parameters
from benchmarks._shapes import SIZES
from benchmarks._timing import interleave, summary


def test_sizes_are_about_what_their_names_say():
    unit = {"m": 1e6, "b": 1e9}
    for name, shapes in SIZES.items():
        count = sum(jnp.prod(jnp.array(shape, float)).item() for shape in shapes.values())
        assert count == pytest.approx(float(name[:-1]) * unit[name[-1]], rel=0.35), name


def test_ratio_is_taken_round_by_round():
    rows = summary({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}, "a")
    assert rows["b"]["ratio"] == 2.0
    assert rows["b"]["ratio_quartiles"] == [2.0, 2.0]
    assert rows["a"]["milliseconds"] == 2000.0


def test_rounds_are_interleaved_and_warm_ups_left_out():
    seen = []

    def candidate(name):
        return lambda: seen.append(name) or 1.0

    times = interleave({"a": candidate("a"), "b": candidate("b")}, repeats=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert [set(seen[i : i + 2]) for i in range(0, len(seen), 2)] == [{"a", "b"}] * 7


def compiled(fn, *arguments):
    return jax.jit(fn, keep_unused=True).lower(*arguments).compile().as_text()


def test_reads_of_a_gradient_are_counted():
    x = jnp.ones((64, 64))
    once = compiled(lambda x, y: (y * 2.0 + x,), x, x)
    assert reads_of_parameters(once, {1}) == [1]
    twice = compiled(lambda x, y: (jnp.sort(y), jnp.sum(y), x), x, x)
    assert reads_of_parameters(twice, {1})[0] >= 2


def test_host_callback_is_seen():
    def noisy(x):
        jax.debug.callback(lambda v: None, x)
        return x * 2

    assert host_calls(compiled(noisy, jnp.ones(3))) > 0
    assert host_calls(compiled(lambda x: x * 2, jnp.ones(3))) == 0


def test_copies_are_counted_in_bytes():
    text = "ENTRY %main (p: f32[64,64]) -> f32[64,64] {\n  %c = f32[64,64]{1,0} copy(%p)\n}\n"
    assert copied_bytes(text) == 64 * 64 * 4


ROOT = Path(__file__).parent.parent

IN_JAX = ("jax", "jaxlib", "optax", "flax", "chex", "orbax", "cruxy_optax", "benchmarks._jax")
IN_TORCH = ("torch", "cruxy_torch", "benchmarks._torch")


def module_files():
    """The files of the package by the name of their module."""
    found = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = module_files()


def imports(module):
    """What a module's import statements name, wherever they stand in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module


@pytest.mark.parametrize("module", FILES)
def test_module_imports_no_framework_but_that_of_its_room(module):
    barred = [] if module.startswith("benchmarks._jax") else [*IN_JAX]
    barred += [] if module.startswith("benchmarks._torch") else [*IN_TORCH]
    wrong = [
        name
        for name in imports(module)
        if any(name == start or name.startswith(f"{start}.") for start in barred)
    ]
    assert wrong == []


def test_modules_import_one_another_in_no_circle():
    done = set()

    def follow(module, way):
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for name in imports(module):
                if name in FILES:
                    follow(name, [*way, module])
            done.add(module)

    for module in FILES:
        follow(module, [])


def test_rooms_name_their_files_alike():
    jax_alone = {"alignment", "faults", "hlo", "workloads.cartpole", "workloads.finetuning"}
    jax_alone |= {"entries", "exact_losses", "rivals", "variants", "wired_optimizers", "wires"}
    jax_alone |= {f"workloads.{name}" for name in ("char", "diffusion", "residual", "table")}
    torch_alone = {"activations", "labelling", "large_models", "large_runs", "launches"}
    of_jax, of_torch = (
        {name.partition(room)[2] for name in FILES if name.startswith(f"benchmarks.{room}")}
        for room in ("_jax.", "_torch.")
    )
    assert of_jax - jax_alone == of_torch - torch_alone


# What Python runs at every start, in the processes that a sweep starts too.
WITHOUT_JAX = f"import sys; sys.modules.update(dict.fromkeys({IN_JAX[:-1]!r}))"

COMMANDS = (
    "step-time --framework torch --size 0.1m --repeats 2 --training digits-conv --optimizer meta3",
    "memory --framework torch --training digits-conv --optimizer meta3-8bit axiom",
    "resume --workload digits-conv --optimizer meta3 --steps 4 --stop 2",
    "rate-sensitivity --workload digits-conv --optimizer self_driving --seeds 1 --steps 4 "
    "--workers 0",
)

IN_ANOTHER_PROCESS = (
    "tuned-baselines --framework torch --workload digits-conv --optimizer meta3 --seeds 1 "
    "--steps 4 --workers 1"
)

RUN = """
import sys
from benchmarks.__main__ import main
for command in sys.stdin.read().splitlines():
    main(command.split())
"""


def without_jax(folder, commands):
    """Runs commands, which write to `folder`, in a process that cannot import JAX."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(WITHOUT_JAX)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", RUN],
        input="\n".join(f"{command} --output {folder}" for command in commands),
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def figures_without_jax(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("torch-alone")
    done = without_jax(folder, COMMANDS)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(
    "figures",
    [
        "step-time-0.1m-torch",
        "memory-state-torch",
        "resume-digits-conv-torch",
        "rate-sensitivity-digits-conv-4-steps-torch",
    ],
)
def test_figures_of_pytorch_are_taken_without_jax(figures, figures_without_jax):
    rows = figures_without_jax[figures]
    rows = rows["timings"][0] if "timings" in rows else rows
    assert rows["optimizers"]


@pytest.mark.slow
def test_processes_of_a_sweep_train_without_jax(tmp_path):
    pytest.importorskip("torch")
    done = without_jax(tmp_path, [IN_ANOTHER_PROCESS])
    assert done.returncode == 0, done.stderr


def test_figures_of_jax_are_refused_without_it(tmp_path):
    done = without_jax(tmp_path, ["rate-sensitivity --framework jax --workload digits-conv"])
    assert (done.returncode, "needs the package jax" in done.stderr) == (2, True), done.stderr
