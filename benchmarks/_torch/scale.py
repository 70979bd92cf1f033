"""What a PyTorch optimizer's step sends between ranks and holds: one rank of many, nothing run."""

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import cruxy_torch
from benchmarks._counted import Task, counted
from benchmarks._models import MODELS, split, tensors
from benchmarks._wire import Message

Groups = list[dict[str, Any]]


def _all(groups: Groups) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def _cosmic(groups: Groups) -> Any:
    params = _all(groups)
    return cruxy_torch.Cosmic(params, state_budget=4 * sum(p.numel() for p in params))


def _muon(groups: Groups) -> Any:
    return cruxy_torch.CruxyOptimizer(groups, mode="self_driving", direction="muon")


OPTIMIZERS: dict[str, tuple[str, Callable[[Groups], Any]]] = {
    "adamw": ("AdamW", lambda groups: torch.optim.AdamW(_all(groups))),
    "meta3": ("Meta3", lambda groups: cruxy_torch.CruxyOptimizer(_all(groups))),
    "meta_lion": (
        "Meta-Lion",
        lambda groups: cruxy_torch.CruxyOptimizer(_all(groups), lr=1e-4, use_lion=True),
    ),
    "self_driving": (
        "Self-driving",
        lambda groups: cruxy_torch.CruxyOptimizer(_all(groups), mode="self_driving"),
    ),
    "self_driving_muon": ("Self-driving Muon", _muon),
    "axiom": ("AXIOM", lambda groups: cruxy_torch.AXIOM(_all(groups))),
    "cosmic": ("COSMIC, 4 bytes", _cosmic),
    "tiger": ("Tiger", lambda groups: cruxy_torch.Tiger(_all(groups))),
}
"""Label and maker by name, from groups with the role of each. PyTorch's Adafactor reads numbers of
a tensor on the host, so that nothing counts it without running it; its Muon is for matrices alone.
"""


def measured(
    mesh: Mapping[str, int], tasks: Sequence[Task], *, patience: float
) -> Iterator[dict[str, Any]]:
    """What each step takes on a rank; see `counted`."""
    return counted(stepped, mesh, tasks, patience=patience)


class Watch(TorchDispatchMode):
    """Records every message, and how many bytes of tensors live at once.

    Attributes:
        messages: in order.
        peak: bytes of storages made meanwhile, at most, beside those that were there.
    """

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
        names = zip(groups, mesh.mesh_dim_names, strict=True)
        self._axes = {group.group_name: (name,) for group, name in names}
        self._everything = tuple(mesh.mesh_dim_names)
        self.messages: list[Message] = []
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at it, once it is one of a rank's own tensors."""
        if DTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            self._note(name, args)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _note(self, name: str, args: Any) -> None:
        operation = next(known for key, known in _OPERATIONS.items() if key in name)
        sent = [x for x in tree_iter(args[0]) if isinstance(x, torch.Tensor)]
        group = next(_group_name(a) for a in args if _group_name(a) is not None)
        resolved = dist.distributed_c10d._resolve_process_group(group)  # pyright: ignore
        size = dist.get_world_size(resolved)
        axes = self._axes.get(group, self._everything)
        total = sum(x.numel() * x.element_size() for x in sent)
        self.messages.append(Message(operation, total, axes, size))

    def _hold(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


_OPERATIONS = {
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
    "all_gather": "all-gather",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "alltoall": "all-to-all",
    "broadcast": "collective-broadcast",
}


def _group_name(argument: Any) -> str | None:
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument).group_name
        except RuntimeError:
            return None
    return argument if isinstance(argument, str) and argument.isdecimal() else None


@functools.cache  # PyTorch goes on using the groups of the first of equal meshes
def _mesh(axes: tuple[tuple[str, int], ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names, sizes = zip(*axes, strict=True)
    dist.init_process_group("fake", rank=0, world_size=math.prod(sizes), store=FakeStore())
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def stepped(task: Task, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a step of an optimizer takes on a rank, in a group of ranks that are not there."""
    name, model, stacked = task
    mesh = _mesh(tuple(sizes.items()))
    by_role: dict[str, list[nn.Parameter]] = {}
    for own in tensors(MODELS[model], stacked=stacked).values():
        spec = split(own, sizes)
        placements = [Shard(spec.index(a)) if a in spec else Replicate() for a in sizes]
        shape = [n // sizes[a] if a else n for n, a in zip(own.shape, spec, strict=True)]
        whole = torch.empty(own.shape, device="meta")
        by_role.setdefault(own.role, []).append(
            nn.Parameter(
                DTensor.from_local(
                    torch.empty(shape, device="meta"),
                    mesh,
                    placements,
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
            )
        )
    groups: Groups = [
        {"params": params, "role": role, **({"stacked": True} if stacked else {})}
        for role, params in by_role.items()
    ]
    if name != "self_driving_muon":
        for group in groups:
            group.pop("stacked", None)
    params = _all(groups)
    with torch.device("meta"):
        optimizer = OPTIMIZERS[name][1](groups)
        for p in params:
            p.grad = torch.zeros_like(p)
        loss = torch.zeros(())
        gives = {"loss": loss} if "loss" in inspect.signature(optimizer.step).parameters else {}
        optimizer.step(**gives)  # what is kept is made in the first
        with Watch(mesh) as watch:
            optimizer.step(**gives)
    held = sum(map(_local_bytes, params))
    state = sum(
        _local_bytes(x) for own in optimizer.state.values() for x in tree_iter(own) if _is(x)
    )
    state += sum(
        _local_bytes(x)
        for group in optimizer.param_groups
        for key, value in group.items()
        if key != "params"
        for x in tree_iter(value)
        if _is(x)
    )
    return {
        "tensors": len(params),
        "parameter_bytes": held,
        "gradient_bytes": held,
        "state_bytes": state,
        "peak_bytes": 2 * held + state + watch.peak,
        "messages": [message._asdict() for message in watch.messages],
        "cpu_seconds": None,
    }


def _is(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _local_bytes(tensor: Any) -> int:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()
