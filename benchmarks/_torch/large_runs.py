"""A large model with weights drawn at random, trained for a few steps in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn

from benchmarks._torch.large_models import MODELS, WAYS, Way
from cruxy_control.memory import GB
from cruxy_torch import compress_activations, state_bytes
from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch.training.results import resident_gb

_LARGE = MODELS["TinyLlama, 1.1B"]

SHAPES = {
    "llama-1.1b": _LARGE,
    "llama-0.3b": transformers.LlamaConfig(**{**_LARGE.to_dict(), "num_hidden_layers": 4}),
    "llama-tiny": transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
}
"""What can be measured: a published shape, the same with 4 of its 22 layers, and one for tests."""

_RELEASED = "AXIOM, gradients released"

RUNS: tuple[tuple[str, int | None], ...] = (
    ("AdamW", None),
    (_RELEASED, None),
    (_RELEASED, 8),
)
"""A way of `WAYS` by its label, and bits an element of the activations; `None` for exact ones."""


def way_of(label: str) -> Way:
    """The way of `WAYS` of this label."""
    (way,) = (way for way in WAYS if way.label == label)
    return way


def measured(name: str, label: str, bits: int | None, tokens: int, steps: int) -> dict[str, Any]:
    """What a run takes, measured in a process of its own.

    Args:
        name: a key of `SHAPES`.
        label: of a way in `WAYS`.
        bits: of activations, `None` for exact ones.
        tokens: of the one sequence in a batch.
        steps: to take.

    Raises:
        ValueError: where the process fails, with the end of what it said, or not on Linux.
    """
    if sys.platform != "linux":
        raise ValueError(f"--measure needs the /proc of Linux, got {sys.platform}; leave it out.")
    given = json.dumps([name, label, bits, tokens, steps])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._torch.large_runs", given],
        cwd=Path(__file__).parents[2],
        # What is freed goes back at once, so that the peak is that of what is alive.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{label} on {name} failed, got {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def available() -> int | None:
    """Bytes of memory that may be taken; `None` where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def _run(name: str, label: str, bits: int | None, tokens: int, steps: int) -> dict[str, Any]:
    way, libraries = way_of(label), resident_gb("VmRSS")
    model = _made(SHAPES[name], way.dtype)
    params = [*model.parameters()]
    gradients, kept, losses = _Gradients(params), _Kept(params), []
    optimizer: Any = way.make(params, SHAPES[name].hidden_size // 4)
    if way.released:
        assert isinstance(optimizer, ControlledOptimizer)
        optimizer.register_hooks()
    ids = torch.arange(tokens, dtype=torch.int64, device="cpu")[None] % SHAPES[name].vocab_size
    for step in range(steps):
        optimizer.zero_grad()
        if bits is None:
            with kept.counted():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            with compress_activations(model, bits, step=step) as store:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            kept.bytes = int(store.memory_stats()["stored_bytes"])
        loss.backward()
        losses.append(float(loss.detach()))
        ours = isinstance(optimizer, ControlledOptimizer)
        optimizer.step(**({"loss": loss.detach()} if ours else {}))
        del loss
    return {
        "libraries": round(GB * libraries),
        "peak": round(GB * resident_gb("VmHWM")),
        "weights": sum(p.nbytes for p in params),
        "gradients": gradients.most,
        "state": state_bytes(optimizer),
        "activations": kept.bytes,
        "losses": losses,
    }


class _Gradients:
    """The most bytes of gradients that were alive at once."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params, self.most = params, 0
        for param in params:  # before the optimizer's own, which free them
            param.register_post_accumulate_grad_hook(self._look)

    def _look(self, _: Tensor) -> None:
        alive = sum(p.grad.nbytes for p in self.params if p.grad is not None)
        self.most = max(self.most, alive)


class _Kept:
    """Bytes that autograd keeps of a forward pass beside parameters, each storage once."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in params}
        self.bytes = 0

    def counted(self) -> Any:
        """A block around the forward pass, whose count replaces the one before."""
        self.bytes, self._seen = 0, set(self._weights)
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _made(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with normal numbers of deviation 0.02 for weights, all made in their dtype."""
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    block = 0.02 * torch.randn(1 << 20, generator=generator, dtype=torch.float32, device="cpu")
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            value = torch.ones(param.shape, dtype=dtype, device="cpu")
            if param.ndim > 1:
                for part in value.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
            setattr(module, name, nn.Parameter(value))
    return model.train()


if __name__ == "__main__":
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    print(json.dumps(_run(*json.loads(sys.argv[1]))))
