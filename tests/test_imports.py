"""Who may import whom: one table of walls, no circle, no long file, what an import brings in."""

import ast
import os
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cruxy_control", "cruxy_exact", "cruxy_optax", "cruxy_torch")
ARRAYS = ("jax", "jaxlib", "optax", "flax", "chex", "torch", "numpy", "ml_dtypes")
JAX = ("jax", "jaxlib", "optax", "flax", "chex", "cruxy_optax")

# Imports a package with every module in it and prints the top-level names this has brought in.
PROBE = """
import importlib, pkgutil, sys
before = set(sys.modules)
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""

FORBIDDEN = {
    "cruxy_optax": {"torch", "cruxy_torch"},
    "cruxy_torch": {"jax", "jaxlib", "optax", "flax", "cruxy_optax"},
}


def brought_in_by(package: str, root: Path) -> set[str]:
    """The top-level modules that importing all of `package`, found in `root`, loads."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, package],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0, probe.stderr
    return set(probe.stdout.split())


def test_the_control_law_needs_the_standard_library_alone():
    brought_in = brought_in_by("cruxy_control", ROOT)
    assert brought_in - sys.stdlib_module_names == {"cruxy_control"}


@pytest.mark.parametrize("package", [name for name in FORBIDDEN if (ROOT / name).is_dir()])
def test_a_package_does_not_import_the_other_framework(package):
    assert brought_in_by(package, ROOT) & FORBIDDEN[package] == set()


@pytest.mark.parametrize("importer", ["__init__.py", "hidden.py"])
def test_an_import_in_any_module_is_seen(tmp_path, importer):
    (tmp_path / "framework.py").touch()
    package = tmp_path / "leaky"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / importer).write_text("import framework\n")
    assert brought_in_by("leaky", tmp_path) - sys.stdlib_module_names == {"leaky", "framework"}


class Imports(NamedTuple):
    """What a module imports, by full name; `at_once` when it is itself imported."""

    at_once: frozenset[str]
    ever: frozenset[str]


def read_modules(root: Path, packages: Iterable[str]) -> dict[str, Imports]:
    """The imports of every module of these packages, read and not run."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
    }
    return {name: _read(name, path, files) for name, path in files.items()}


def _read(name: str, path: Path, modules: Container[str]) -> Imports:
    tree = ast.parse(path.read_text("utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test))
        for node in ast.walk(block)
    }
    ever = [
        (node, target) for node in ast.walk(tree) for target in _targets(node, package, modules)
    ]
    return Imports(
        at_once=frozenset(target for node, target in ever if id(node) not in later),
        ever=frozenset(target for _, target in ever),
    )


def _targets(node: ast.AST, package: str, modules: Container[str]) -> Iterator[str]:
    """The modules that a statement imports: `from a import b` is `a.b` where that is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{source}.{alias.name}"
            yield whole if whole in modules else source


def within(module: str, places: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(module == place or module.startswith(place + ".") for place in places)


MODULES = read_modules(ROOT, (*PACKAGES, "benchmarks"))
LAWS = tuple(
    f"cruxy_control.{path.stem}"
    for path in (ROOT / "cruxy_control").glob("*.py")
    for node in ast.parse(path.read_text("utf-8")).body
    if isinstance(node, ast.ClassDef)
    and {"init", "step"} <= {getattr(f, "name", None) for f in node.body}
    and path.stem != "law"  # which says what one is
)


def rooms(*names: str, of: Iterable[str] = ("cruxy_optax", "cruxy_torch")) -> tuple[str, ...]:
    """These rooms or files in both frameworks."""
    return tuple(f"{package}.{name}" for package in of for name in names)


LOOP = (
    *rooms("_stabilize", "_controls", "_states", "_release", of=["cruxy_optax"]),
    *rooms(
        "_controlled_optimizer",
        "_step",
        "_decide",
        "_groups",
        "_law_state",
        "_release",
        of=["cruxy_torch"],
    ),
)
PUBLIC = rooms("training", "integrations", of=["cruxy_torch"])


class Wall(NamedTuple):
    """No module within `behind`, but for those within `free`, reaches one within `out_of_reach`.

    Neither by an import of its own, wherever it stands, nor by what comes in with that.
    """

    behind: tuple[str, ...]
    out_of_reach: tuple[str, ...]
    free: tuple[str, ...] = ()
    faces: tuple[str, ...] = ()
    """Modules that are free and what is inside them is not: packages that show what others make."""


WALLS = {
    "the laws know no framework": Wall(("cruxy_control",), ARRAYS),
    "exact arithmetic knows no framework": Wall(("cruxy_exact",), ARRAYS),
    "the laws know no exact arithmetic": Wall(("cruxy_control",), ("cruxy_exact",)),
    "exact arithmetic knows no laws": Wall(("cruxy_exact",), ("cruxy_control",)),
    "nothing shared knows a framework's package": Wall(
        ("cruxy_control", "cruxy_exact"), ("cruxy_optax", "cruxy_torch", "benchmarks")
    ),
    "JAX knows no PyTorch": Wall(("cruxy_optax",), ("torch", "cruxy_torch")),
    "PyTorch knows no JAX": Wall(("cruxy_torch",), JAX),
    "sensors know no actuators": Wall(rooms("_sensors"), rooms("_actuators")),
    "the loop knows no actuators": Wall(LOOP, rooms("_actuators", "_optimizers")),
    "no part knows the optimizers": Wall(
        rooms("_actuators", "_memory", "_distributed", "_native", "_sensors"), rooms("_optimizers")
    ),
    "nothing inside knows what is built on it": Wall(
        PACKAGES, PUBLIC, free=PUBLIC, faces=("cruxy_torch",)
    ),
    "PyTorch is measured without JAX": Wall(("benchmarks._torch",), ("benchmarks._jax", *JAX)),
} | {f"{law} knows no other law": Wall((law,), tuple({*LAWS} - {law})) for law in sorted(LAWS)}
"""Every wall of the house, by what it keeps true."""


def breaches(wall: Wall, modules: Mapping[str, Imports]) -> list[str]:
    """The ways through a wall, as `module -> ... -> what it must not reach`."""
    return sorted(
        " -> ".join(way)
        for name in modules
        if within(name, wall.behind) and not within(name, wall.free) and name not in wall.faces
        for way in _ways(name, wall.out_of_reach, modules)
    )


def _ways(
    start: str, places: tuple[str, ...], modules: Mapping[str, Imports]
) -> Iterator[tuple[str, ...]]:
    """The shortest ways from a module to places, through what its imports import in turn."""
    seen, waiting = {start}, [(start,)]
    for way in waiting:
        imports = modules.get(way[-1], Imports(frozenset(), frozenset()))
        for target in sorted((imports.ever if way == (start,) else imports.at_once) - seen):
            seen.add(target)
            if within(target, places):
                yield (*way, target)
            else:
                waiting.append((*way, target))


@pytest.mark.parametrize("name", WALLS)
def test_no_import_goes_through_a_wall(name):
    assert breaches(WALLS[name], MODULES) == []


def test_every_law_is_behind_a_wall():
    assert {"cruxy_control.meta3", "cruxy_control.self_driving"} <= set(LAWS)


def circles(modules: Mapping[str, Imports]) -> list[list[str]]:
    """The modules that stand on themselves, in groups; what is imported later does not count."""
    reach: dict[str, set[str]] = {}
    for start in modules:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = {t for t in modules[waiting.pop()].at_once if t in modules} - seen
            seen |= new
            waiting += new
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in modules if a in reach[a]}
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_module_stands_on_itself(package):
    assert circles({k: v for k, v in MODULES.items() if within(k, [package])}) == []


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_file_is_longer_than_four_hundred_lines(package):
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: n for path, n in lines.items() if n > 400} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import house.attic",
        "from house import attic",
        "from house.attic import trunk",
        "from . import attic",
        "from .attic import trunk",
        "def later():\n    from house import attic",
        "if TYPE_CHECKING:\n    import house.attic as a",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, line):
    for file, text in (("__init__", ""), ("attic", "trunk = 1"), ("cellar", line)):
        (tmp_path / "house").mkdir(exist_ok=True)
        (tmp_path / "house" / f"{file}.py").write_text(text + "\n")
    wall = Wall(("house.cellar",), ("house.attic",))
    assert breaches(wall, read_modules(tmp_path, ["house"])) == ["house.cellar -> house.attic"]


def test_way_through_a_wall_may_be_long(tmp_path):
    (tmp_path / "house").mkdir()
    for file, text in (("cellar", "from house import stairs"), ("stairs", "import numpy.linalg")):
        (tmp_path / "house" / f"{file}.py").write_text(text + "\n")
    wall = Wall(("house.cellar",), ("numpy",))
    assert breaches(wall, read_modules(tmp_path, ["house"])) == [
        "house.cellar -> house.stairs -> numpy.linalg"
    ]


def test_circle_is_seen_and_an_import_inside_a_function_is_none(tmp_path):
    (tmp_path / "house").mkdir()
    for file, text in (
        ("a", "from house import b"),
        ("b", "from house.c import x"),
        ("c", "import house.a"),
        ("d", "def later():\n    import house.e"),
        ("e", "import house.d"),
    ):
        (tmp_path / "house" / f"{file}.py").write_text(text + "\n")
    assert circles(read_modules(tmp_path, ["house"])) == [["house.a", "house.b", "house.c"]]
