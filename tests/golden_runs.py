"""The runs of every optimizer and bit width whose numbers may not change, and what is kept of them.

`python tests/golden_runs.py torch` and `... jax` write `tests/golden/`; a fixture is written by the
commit before a change that must change no number. `test_golden.py` holds today's code to it.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

try:
    from streams import rough
except ModuleNotFoundError:  # run from the root
    sys.path.insert(0, str(Path(__file__).parent))
    from streams import rough

FOLDER = Path(__file__).parent / "golden"
SAVED, STEPS = 100, 200
SHAPES: dict[str, tuple[int, ...]] = {"w": (64, 64), "c": (6, 3, 3, 3), "b": (33,), "s": ()}
"""A matrix that is coded, and tensors too small for it."""


def machine() -> str:
    """What bits depend on beside the code: the processor; versions stand beside each fixture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.machine()]
    kept = [line for line in lines if line.startswith(("model name", "flags"))]
    return hashlib.sha256("\n".join(sorted(set(kept))).encode()).hexdigest()[:16]


def start(dtype: str = "float32") -> dict[str, np.ndarray]:
    """The parameters before the first step."""
    rng = np.random.default_rng(0)
    return {k: 0.2 * rng.normal(size=shape).astype(dtype) for k, shape in SHAPES.items()}


def stream(bad: bool = True) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Gradients and losses: surges, spikes, zeros, and with `bad` steps that are not finite."""
    norms, _, losses = rough(STEPS, seed=3)
    rng = np.random.default_rng(4)
    drift = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
    grads = []
    for norm in norms:
        size = norm if bad or np.isfinite(norm) else 1.0
        noise = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
        each = {k: (size / 60 * (noise[k] + 0.3 * drift[k])).astype(np.float32) for k in SHAPES}
        grads.append(each)
    return grads, losses


def digest(arrays: list[np.ndarray]) -> str:
    """Of the bytes of arrays in this order."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def main(framework: str) -> None:
    """Writes a framework's fixture."""
    FOLDER.mkdir(exist_ok=True)
    if framework == "torch":
        import golden_torch as golden
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        import golden_jax as golden  # type: ignore[no-redef]
    module: Any = golden
    module.write(FOLDER)


if __name__ == "__main__":
    main(sys.argv[1])
