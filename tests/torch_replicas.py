"""What two replicas do in the test of losses of their own; each returns what it was warned of."""

import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from cruxy_torch import CruxyOptimizer


def run(rank, folder):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    seen = {}
    for case in ("own", "reduced", "group", "alone"):
        p = torch.nn.Parameter(torch.ones(5))
        group = dist.group.WORLD if case == "group" else None
        optimizer = CruxyOptimizer([p], process_group=group)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(6):
                if case == "alone" and rank and step:
                    break  # a rank that steps no more keeps nobody waiting
                p.grad = torch.full((5,), 0.1 * (1 + step))
                optimizer.step(loss=1.0 + (rank if case != "reduced" else 0))
                if case != "alone":
                    dist.barrier()
        seen[case] = [str(warning.message) for warning in caught]
    seen["partial"], seen["whole"] = (
        partial_sums(rank, reduced=reduced) for reduced in (False, True)
    )
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def partial_sums(rank, *, reduced):
    """A parameter after a step with gradients as tensor parallelism leaves them, or added up."""
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
    part = torch.linspace(0.1, 0.5, 5) * (1 + rank)
    grad = DTensor.from_local(part, mesh, [Partial()])
    p.grad = grad.redistribute(mesh, [Replicate()]) if reduced else grad
    CruxyOptimizer([p], lr=0.1).step()
    return p.to_local().detach()
