"""Means of gradients over ranks whose wire carries 8 or 4 bits an element."""

# torch documents `dist.GradBucket`, and does not export it by name.
# pyright: reportPrivateImportUsage=false

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from cruxy_exact.codes import BlockCode, pack, unpack
from cruxy_exact.random_bits import random_bits, stream_key
from cruxy_torch._distributed.messages import gathered
from cruxy_torch._kept import BLOCK_SIZE, numbers

_OF_THE_MEAN = -1
"""The stream of random bits of the second phase; those of the first are numbered by rank."""


class _Wire:
    """A code, the random bits of its rounding, and an account of the bytes.

    Attributes:
        bytes_sent: what this rank has handed to other ranks.
        bytes_uncompressed: what the collective that this one replaces hands over, in the dtype of
            the gradients: of an all-reduce `2 (n - 1) / n` times the gradients, of a reduce-scatter
            half of it, over `n` ranks.
    """

    def __init__(self, bits: int, seed: int) -> None:
        self._code, self._seed, self._step = BlockCode(bits, signed=True), seed, 0
        self.bytes_sent = self.bytes_uncompressed = 0

    def state_dict(self) -> dict[str, int]:
        """The number of the step, from which random bits follow, for a resume bit for bit."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from what `state_dict` gave."""
        self._step = int(state_dict["step"])

    def encode(self, blocks: Tensor, first: Tensor, stream: int) -> Tensor:
        """A message of each row of blocks: their codes, then their scales.

        Args:
            blocks: float32, `(rows, blocks, 256)`.
            first: the number of each block in all of them; int32, `(rows, blocks)`.
            stream: another for messages with other random bits.

        Returns:
            uint8, `(rows, bytes)`.
        """
        code = self._code
        scales = code.scale(blocks.abs().amax(-1), xp=torch)
        counter = torch.tensor(
            (self._step + 2**31) % 2**32 - 2**31, dtype=torch.int32, device="cpu"
        )
        key = stream_key(counter, self._seed, stream, xp=torch).to(blocks.device)
        index = first[..., None] * BLOCK_SIZE + numbers(BLOCK_SIZE, 0, blocks.device)
        noise = code.noise(random_bits(key, index))
        codes = code.encode(blocks, scales[..., None], noise, xp=torch)
        if code.bits == 4:
            codes = pack(*codes.split(BLOCK_SIZE // 2, dim=-1))
        parts = (codes.view(torch.uint8), scales.to(torch.bfloat16).view(torch.uint8))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def decode(self, messages: Tensor) -> Tensor:
        """The blocks of each message; float32, `(rows, blocks, 256)`."""
        code, width = self._code, BLOCK_SIZE * self._code.bits // 8
        count = messages.shape[1] // (width + 2)
        codes = messages[:, : count * width].reshape(-1, count, width)
        scales = messages[:, count * width :].contiguous().view(torch.bfloat16)
        whole = torch.cat(unpack(codes), dim=-1) if code.bits == 4 else codes.view(torch.int8)
        return code.decode(whole, scales.to(torch.float32)[..., None], xp=torch)

    def scattered_sum(self, blocks: Tensor, first: Tensor, group: Any) -> Tensor:
        """The sum over ranks of this rank's row, from messages of one row to each rank.

        Args:
            blocks: float32, a row for each rank: `(ranks, blocks, 256)`.
            first: see `encode`.
            group: of the ranks.

        Returns:
            float32, `(blocks, 256)`.
        """
        messages = self.encode(blocks, first, dist.get_rank(group))
        received = torch.empty_like(messages)
        dist.all_to_all_single(received, messages, group=group)
        self.bytes_sent += messages[1:].numel()
        return self.decode(received).sum(0)


class CompressedAllReduce(_Wire):
    """State of `compressed_allreduce_hook`: 8 or 4 bits an element, and the bytes it has sent.

    A rank codes its gradients in as many parts as there are ranks, sends each rank its part, adds
    up what it receives in float32, and sends the mean of its part, coded again, to all: two phases,
    as of an ordinary all-reduce. All ranks decode the same bytes and so have the same mean, to the
    bit. Codes are unbiased (`cruxy_exact.BlockCode`, a bfloat16 scale for 256 elements, blocks of
    each parameter for themselves), so that an error has nothing to be fed back, and there is no
    buffer. What is not finite on one rank makes its block NaN on all: the guard of our optimizers
    then skips the step on all alike.

    Worth it where the wire is what a step waits for: coding costs time.

    Args:
        bits: 8 sends 1.008 bytes an element, 4 sends 0.508; `python -m benchmarks wires` measures
            what each costs in loss.
        process_group: of the replicas; `None` for all processes.
        seed: of the random bits, any whole number.

    Raises:
        ValueError: where `bits` is neither; from the hook where a gradient is float64 or sparse.

    Examples:
        ```python
        model = torch.nn.parallel.DistributedDataParallel(net)
        state = cruxy_torch.CompressedAllReduce(bits=8)
        model.register_comm_hook(state, cruxy_torch.compressed_allreduce_hook)
        ```

    References:
        Alistarh et al., [QSGD](https://arxiv.org/abs/1610.02132), 2017; Wang et al., [ZeRO++:
        Extremely Efficient Collective Communication for Giant Model
        Training](https://arxiv.org/abs/2306.10209), 2023.
    """

    def __init__(
        self, bits: int = 8, process_group: dist.ProcessGroup | None = None, *, seed: int = 0
    ) -> None:
        super().__init__(bits, seed)
        self._group = process_group
        self._first: dict[Tensor, int] = {}
        self._blocks = 0

    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        buffer, group = bucket.buffer(), self._group
        _check(buffer)
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return _done(buffer)
        grads = bucket.gradients()
        blocks, first = self._cut(bucket.parameters(), grads, ranks)
        mean = self.scattered_sum(blocks, first, group) / ranks
        rank = dist.get_rank(group)
        message = self.encode(mean[None], first[rank][None], _OF_THE_MEAN)
        received, work = gathered(message[0], group, wait=False)
        self.bytes_sent += (ranks - 1) * message.numel()
        self.bytes_uncompressed += 2 * (ranks - 1) * buffer.numel() * buffer.element_size() // ranks
        if bucket.is_last():
            self._step += 1

        def finish(_: Any) -> Tensor:
            _join(self.decode(received).view(-1, BLOCK_SIZE), grads)
            return buffer

        return work.get_future().then(finish)

    def _cut(self, params: list[Tensor], grads: list[Tensor], ranks: int) -> tuple[Tensor, Tensor]:
        """Gradients in blocks of their own, a row for each rank, and the number of each block.

        What is coded, and by which random bits, is then the same however parameters are put into
        buckets, which `DistributedDataParallel` does anew after its first step.
        """
        counts = [_blocks_of(grad) for grad in grads]
        each = -(-sum(counts) // ranks)
        rows = grads[0].new_zeros((ranks * each, BLOCK_SIZE), dtype=torch.float32)
        first = torch.zeros(ranks * each, dtype=torch.int32, device=rows.device)
        begin = 0
        for param, grad, count in zip(params, grads, counts, strict=True):
            if param not in self._first:
                self._first[param] = self._blocks
                self._blocks += count
            rows[begin : begin + count].view(-1)[: grad.numel()] = grad.reshape(-1)
            first[begin : begin + count] = numbers(count, self._first[param], rows.device)
            begin += count
        return rows.view(ranks, each, BLOCK_SIZE), first.view(ranks, each)


def compressed_allreduce_hook(
    state: CompressedAllReduce, bucket: dist.GradBucket
) -> Future[Tensor]:
    """For `DistributedDataParallel.register_comm_hook`: the mean over ranks in 8 or 4 bits.

    Args:
        state: see `CompressedAllReduce`.
        bucket: of gradients.

    Returns:
        A future of their mean; the second phase is awaited while the backward pass goes on.
    """
    return state._reduce(bucket)


def local_gradients_hook(state: Any, bucket: dist.GradBucket) -> Future[Tensor]:
    """For `DistributedDataParallel.register_comm_hook`: every rank keeps its own gradients.

    For `CruxyOptimizer(use_lion=True, vote=group)`, which sends votes in their place.

    Args:
        state: nothing; `None`.
        bucket: of gradients.
    """
    return _done(bucket.buffer())


class CompressedReduceScatter(_Wire):
    """What `compress_fsdp` puts in the place of the reduce-scatter of gradients.

    Its account and its counter are those of the whole model.

    Args:
        bits: 8 or 4.
        seed: of the random bits, any whole number.
    """

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for `fully_shard`."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """The sum or the mean over ranks of this rank's part of the input, in the output."""
        _check(input_tensor)
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(
                f"compressed gradients must be averaged or added up, got {op}; leave "
                "set_gradient_divide_factor() out."
            )
        ranks, size = dist.get_world_size(group), output_tensor.numel()
        count = _blocks_of(output_tensor)
        rows = input_tensor.new_zeros((ranks, count * BLOCK_SIZE), dtype=torch.float32)
        rows[:, :size] = input_tensor.view(ranks, size)
        first = numbers(ranks * count, 0, rows.device).view(ranks, count)
        total = self.scattered_sum(rows.view(ranks, count, BLOCK_SIZE), first, group)
        total = total.view(-1)[:size]
        output_tensor.copy_(total / ranks if op == dist.ReduceOp.AVG else total)
        self.bytes_uncompressed += (ranks - 1) * size * input_tensor.element_size()
        self._step += 1


def compress_fsdp(
    model: torch.nn.Module, bits: int = 8, *, seed: int = 0
) -> CompressedReduceScatter:
    """Has every `fully_shard` module of a model send its gradients in 8 or 4 bits an element.

    Of the three collectives of a step it changes the reduce-scatter of gradients alone: parameters
    are gathered as they are, and under hybrid sharding the all-reduce between replicas stays exact.
    Codes are unbiased and need no buffer; see `CompressedAllReduce`.

    Args:
        model: to which `torch.distributed.fsdp.fully_shard` has been applied.
        bits: 8 or 4.
        seed: of the random bits, any whole number.

    Returns:
        What counts the bytes: `bytes_sent`, `bytes_uncompressed`. For a resume bit for bit save its
        `state_dict()`, one number, alike on all ranks.

    Raises:
        ValueError: where `bits` is neither, or no module is sharded; from `backward` where a
            gradient is float64, or where the model sets a divide factor of its own.
        RuntimeError: where this version of PyTorch cannot replace the reduce-scatter.

    Examples:
        ```python
        torch.distributed.fsdp.fully_shard(model)
        wire = cruxy_torch.compress_fsdp(model, bits=8)
        ```
    """
    wire = CompressedReduceScatter(bits, seed)
    modules = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    if not modules:
        raise ValueError(
            "model must have modules under torch.distributed.fsdp.fully_shard, got none in "
            f"{type(model).__name__}; shard it first, or register compressed_allreduce_hook with "
            "DistributedDataParallel."
        )
    if not hasattr(modules[0], "set_custom_reduce_scatter"):
        raise RuntimeError(
            "PyTorch must let a module's reduce-scatter be replaced (FSDPModule."
            f"set_custom_reduce_scatter), which {torch.__version__} does not; take a later one."
        )
    for module in modules:
        cast(Any, module).set_custom_reduce_scatter(wire)
    return wire


def _check(gradients: Tensor) -> None:
    if gradients.layout is not torch.strided or gradients.dtype == torch.float64:
        got = gradients.dtype if gradients.layout is torch.strided else gradients.layout
        raise ValueError(
            f"compressed gradients must be dense and of at most 32 bits an element, got {got}; "
            "leave the hook out."
        )


def _done(buffer: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(buffer)
    return future


def _blocks_of(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() / BLOCK_SIZE)


def _join(rows: Tensor, grads: list[Tensor]) -> None:
    """Writes blocks back into the gradients that were cut into them."""
    begin = 0
    for grad in grads:
        count = _blocks_of(grad)
        grad.copy_(rows[begin : begin + count].view(-1)[: grad.numel()].view(grad.shape))
        begin += count
