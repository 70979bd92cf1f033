"""`CruxyOptimizer(vote=)`: what it asks for, and how a state says whose vote its momentum is."""

from typing import Any

import torch.distributed as dist

from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._actuators.voted import VotedLion
from cruxy_torch._distributed.shards import any_sharded

_NAME = "Lion by vote"


def check(vote: Any, process_group: Any, direction: Any, *, compile: bool) -> None:
    """Raises unless these go together."""
    if vote is None:
        return
    if not isinstance(vote, dist.ProcessGroup):
        raise TypeError(
            f"vote must be a process group, got {vote!r}; give torch.distributed.group.WORLD after "
            "init_process_group()."
        )
    if process_group is not None and process_group is not vote:
        raise ValueError(
            "process_group must be left out beside vote, whose group it then is, got another one; "
            "give vote alone."
        )
    if direction is not None or compile:
        got = f"direction={direction!r}" if direction is not None else "compile=True"
        raise ValueError(f"vote must go with Lion, not compiled, got {got}; leave one of them out.")


def name_of(vote: dist.ProcessGroup) -> str:
    """What groups call this direction: a state of another rank is then refused."""
    return f"{_NAME} of rank {dist.get_rank(vote)} of {dist.get_world_size(vote)}"


def direction(
    vote: dist.ProcessGroup | None, group: dict[str, Any], frame: Frame
) -> VotedLion | None:
    """The direction of a group that votes; `None` of one that does not.

    Raises:
        RuntimeError: where the optimizer was unpickled or copied, which leaves its ranks behind.
    """
    if vote is not None:
        return VotedLion(vote, frame)
    if str(group.get("direction", "")).startswith(_NAME):
        raise RuntimeError(
            "an optimizer that votes must be made where it is used, got a pickled or copied one, "
            "which has lost its process group; make a new one and load the state_dict()."
        )
    return None


def check_group(group: dict[str, Any]) -> None:
    """Raises unless a group can vote."""
    if not group["use_lion"]:
        raise ValueError(
            "use_lion must be True in every group where ranks vote, got False: of the directions "
            "Lion's alone is one bit an element; give use_lion=True, or leave vote out."
        )
    if any_sharded(group["params"]):
        raise ValueError(
            "parameters must be whole on every rank where ranks vote, got a DTensor; use "
            "DistributedDataParallel with cruxy_torch.local_gradients_hook, or for sharded ones "
            "cruxy_torch.compress_fsdp."
        )
