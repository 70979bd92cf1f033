"""The two frameworks: their names, what each needs, and the room that holds what is written in it.

Nothing else at the root of this package knows how a framework is imported, so that the figures of
one can be taken where the other is not installed.
"""

import importlib
import importlib.util
from typing import Any

FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}

PACKAGES = {"jax": ("jax", "optax"), "torch": ("torch",)}
"""What every figure of a framework needs."""

EXTRAS = {"jax": "jax,examples,bench,test", "torch": "torch,bench"}
"""The extras of this project that install what a framework's benchmarks need."""


def missing(framework: str) -> str | None:
    """The first of a framework's packages that is not installed; `None` where all are."""
    for package in PACKAGES[framework]:
        if importlib.util.find_spec(package) is None:
            return package
    return None


def installed() -> list[str]:
    """The frameworks that are there, JAX first."""
    return [name for name in FRAMEWORKS if missing(name) is None]


def needs(what: str, package: str | None, framework: str) -> str:
    """The message that `what` wants a package, and how to install it."""
    return (
        f"{what} needs the package {package}, which is not installed; "
        f"run pip install -e '.[{EXTRAS[framework]}]'."
    )


def room(framework: str, module: str, what: str) -> Any:
    """A module of a framework's room, imported only now.

    Args:
        framework: a key of `FRAMEWORKS`.
        module: in `benchmarks/_jax` or `benchmarks/_torch`, such as "training".
        what: what the module is wanted for, which the error names.

    Raises:
        ValueError: if a package that the module needs is not installed.
    """
    try:
        return importlib.import_module(f"benchmarks._{framework}.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(needs(what, error.name, framework)) from error
