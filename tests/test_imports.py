"""What importing a package brings in: never the other framework, for the law no framework."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

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
