"""The version of the distribution, and what it says where a framework is not installed."""

from collections.abc import Iterable
from importlib import metadata, util

DISTRIBUTION = "cruxy-optax"


def version() -> str:
    """The version that is installed; `"0+unknown"` for a checkout that is not."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def require(package: str, extra: str, modules: Iterable[str]) -> None:
    """Raises, and names what to install, where a package lacks what it stands on.

    Args:
        package: what was imported.
        extra: of the distribution, which brings the modules.
        modules: that have to be there, by name.

    Raises:
        ModuleNotFoundError: where one of them is missing.
    """
    missing = [name for name in modules if util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{package} needs {', '.join(modules)}, of which {', '.join(missing)} is not "
            f'installed; install it with: pip install "{DISTRIBUTION}[{extra}]"',
            name=missing[0],
        )
