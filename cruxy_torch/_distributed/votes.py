"""One vote an element and rank: what most ranks say, in two messages of a bit each."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_exact.votes import majority, pack_votes, unpack_votes
from cruxy_torch._distributed.messages import gathered


def majority_of(
    ballots: Sequence[Tensor], coins: Sequence[Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    """What most ranks voted on each element, the coin in a tie.

    A rank sends each other its part of all votes, counts those that it receives, and sends what the
    majority in its part is to all.

    Args:
        ballots: of this rank, booleans of any shapes, the same on all ranks.
        coins: what decides a tie, booleans of the same shapes, the same on all ranks.
        group: of the ranks.

    Returns:
        Booleans of the same shapes.
    """
    ranks = dist.get_world_size(group)
    sizes = [ballot.numel() for ballot in ballots]
    own, coin = (torch.cat([part.reshape(-1) for part in each]) for each in (ballots, coins))
    missing = -len(own) % (8 * ranks)
    own, coin = (
        torch.nn.functional.pad(each, (0, missing)).view(ranks, -1) for each in (own, coin)
    )
    message = pack_votes(own, xp=torch)
    received = torch.empty_like(message)
    dist.all_to_all_single(received, message, group=group)
    ayes = unpack_votes(received, xp=torch).sum(0, dtype=torch.int32)
    won = majority(ayes, ranks, coin[dist.get_rank(group)], xp=torch)
    results, _ = gathered(pack_votes(won, xp=torch), group)
    whole = unpack_votes(results, xp=torch).reshape(-1)
    parts = whole[: sum(sizes)].split(sizes)
    return [part.view(ballot.shape) for part, ballot in zip(parts, ballots, strict=True)]
