"""`CruxyOptimizer(vote=)`: what it asks for, and how a state says whose vote its momentum is."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._actuators.voted import VotedLion
from cruxy_torch._distributed.shards import any_sharded
from cruxy_torch._kept import BLOCK_SIZE
from cruxy_torch._law_state import KEY
from cruxy_torch._loading import check_form
from cruxy_torch._memory.state import moment, value_of

_NAME = "Lion by vote"
_MERGED = f"{_NAME} of all ranks"


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


def merge_votes(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of the states of all ranks that voted, to go on from on any number of ranks.

    The momentum of the new state is the mean of the ranks' own, which is that of the mean gradient:
    every rank begins with it, and goes its own way from there. A run on as many ranks as before
    goes on bit for bit from the ranks' own states, and not from this one.

    Args:
        states: `state_dict()` of `CruxyOptimizer(vote=)` on each rank, in any order.

    Returns:
        A `state_dict` for `CruxyOptimizer(vote=).load_state_dict` on every rank of a group of any
        size. Momenta in 8 and 4 bits are coded anew, to the nearest.

    Raises:
        ValueError: unless these are the states of all ranks, each once, after the same step.

    Examples:
        ```python
        states = [torch.load(f"rank{rank}.pt") for rank in range(4)]  # on 4 ranks
        optimizer.load_state_dict(cruxy_torch.merge_votes(states))  # on 6
        ```
    """
    names = [str(state["param_groups"][0].get("direction")) for state in states]
    wanted = {f"{_NAME} of rank {rank} of {len(states)}" for rank in range(len(states))}
    if not states or set(names) != wanted:
        raise ValueError(
            f"states must be those of all ranks that voted, each once, got {len(states)}: "
            f"{', '.join(sorted(names)) or 'none'}; give state_dict() of every rank."
        )
    steps = sorted({int(state["param_groups"][0][KEY]["step"]) for state in states})
    if len(steps) > 1 or len({tuple(state["state"]) for state in states}) > 1:
        raise ValueError(
            f"states must be of the same parameters after the same step, got steps {steps}; give "
            "those that all ranks saved together."
        )
    first = states[0]
    merged = {i: _mean([state["state"][i] for state in states]) for i in first["state"]}
    groups = [{**group, "direction": _MERGED} for group in first["param_groups"]]
    return {**first, "state": merged, "param_groups": groups}


def _mean(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of one parameter, with the mean of the ranks' momenta."""
    first = states[0]
    if "exp_avg" in first:
        total = torch.stack([state["exp_avg"].float() for state in states]).mean(0)
        return {**first, "exp_avg": total.to(first["exp_avg"].dtype)}
    if "exp_avg_codes" not in first:
        return dict(first)
    codes: Tensor = first["exp_avg_codes"]
    bits = 8 * codes.shape[1] // BLOCK_SIZE
    blocks = torch.empty(len(codes) * BLOCK_SIZE, dtype=torch.float32, device=codes.device)
    values = [value_of(blocks, state, "exp_avg") for state in states]
    mean = torch.stack(values).mean(0)
    coded = moment(blocks, mean, "exp_avg", torch.float32, bits)
    return {**first, **{name: coded[name] for name in ("exp_avg_codes", "exp_avg_scales")}}


def own_state(state_dict: dict[str, Any], vote: dist.ProcessGroup) -> dict[str, Any]:
    """The state as one of this rank, if it is or was merged of all.

    Raises:
        ValueError: where it is none, that of another rank, or of another number of them.
    """
    check_form(state_dict)
    ours, groups = name_of(vote), state_dict["param_groups"]
    saved = str(groups[0].get("direction"))
    if saved == _MERGED:
        groups = [{**group, "direction": ours} for group in groups]
        return {**state_dict, "param_groups": groups}
    if saved != ours and saved.startswith(_NAME):
        raise ValueError(
            f"the state must be one of the direction {ours}, got one of {saved}; load what this "
            "rank has saved, or where their number has changed cruxy_torch.merge_votes(states) of "
            "all ranks."
        )
    return state_dict


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
