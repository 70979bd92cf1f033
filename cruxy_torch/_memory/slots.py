"""`AXIOM_CHECKPOINT`: tensors in 8 or 4 bits in numbered slots, by hand."""

import torch
from torch import Tensor

from cruxy_control.checks import check_count
from cruxy_exact.affine import AffineCode
from cruxy_exact.random_bits import stream_key
from cruxy_torch._memory.flat_codes import CodedFlat, decode, encode

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AXIOM_CHECKPOINT:  # noqa: N801
    """Activations in numbered slots, under the names of `quarterbit`, for a model stored by hand.

    `compress_activations` does the same to all that autograd keeps, without a word in the model.

    Args:
        max_slots: how many slots there are, at least 1.
        max_n: the most elements of a tensor, at least 1.
        bits: 8 or 4, which keep 25.4 % or 12.9 % of the bytes of float32.
        seed: of the random bits by which values are rounded, any whole number.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import torch, cruxy_torch
        >>> slots = cruxy_torch.AXIOM_CHECKPOINT(max_slots=32, max_n=512 * 64, bits=4)
        >>> hidden = torch.linspace(0.0, 1.0, 512 * 64).view(512, 64)
        >>> slots.store(hidden, slot=0)
        >>> restored = slots.restore(slot=0)
        >>> bool((restored - hidden).abs().max() < 0.01)
        True
        >>> print(f"Compression: {slots.memory_stats()['compression_ratio']:.1f}x")
        Compression: 7.8x
    """

    def __init__(self, max_slots: int, max_n: int, *, bits: int = 8, seed: int = 0) -> None:
        self._count = check_count("max_slots", max_slots, 1, remedy="give one for each layer")
        self._most = check_count("max_n", max_n, 1, remedy="give the elements of the largest one")
        self._code, self._seed, self._stored = AffineCode(bits), seed, 0
        self._slots: dict[int, tuple[CodedFlat, torch.Size]] = {}

    @torch.no_grad()
    def store(self, tensor: Tensor, slot: int) -> None:
        """Keeps a tensor in a slot, in place of what is there.

        Args:
            tensor: float32, bfloat16 or float16, at least one element and at most `max_n`.
            slot: a whole number from 0, below `max_slots`.

        Raises:
            ValueError: where it has too many elements, or none, or there is no such slot.
            TypeError: where it has another dtype.
        """
        self._check(slot)
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"tensor must be float32, bfloat16 or float16, got {tensor.dtype}; keep what has "
                "another dtype as it is."
            )
        if not 1 <= tensor.numel() <= self._most:
            raise ValueError(
                f"tensor must have at least 1 and at most {self._most} elements, got "
                f"{tensor.numel()}; make max_n larger."
            )
        counter = torch.tensor(self._stored % 2**31, dtype=torch.int32, device="cpu")
        key = stream_key(counter, self._seed, slot, xp=torch).to(tensor.device)
        self._stored += 1
        self._slots[slot] = (encode(tensor.reshape(-1), self._code, key), tensor.shape)

    def restore(self, slot: int) -> Tensor:
        """What is in a slot, as near as its codes have it: a new tensor of its shape and dtype.

        Raises:
            ValueError: where nothing is, or there is no such slot.
        """
        self._check(slot)
        if slot not in self._slots:
            raise ValueError(f"slot {slot} is empty; store() a tensor in it first.")
        coded, shape = self._slots[slot]
        return decode(coded)[: coded.count].view(shape)

    def memory_stats(self) -> dict[str, float | int]:
        """The bytes of all slots.

        Returns:
            `original_bytes` of the tensors, `stored_bytes` of their codes, and
            `compression_ratio`, the first by the second, 1 of nothing.
        """
        coded = [kept for kept, _ in self._slots.values()]
        original, stored = (
            sum(kept.count * kept.dtype.itemsize for kept in coded),
            sum(kept.nbytes for kept in coded),
        )
        return {
            "original_bytes": original,
            "stored_bytes": stored,
            "compression_ratio": original / stored if stored else 1.0,
        }

    def _check(self, slot: int) -> None:
        if check_count("slot", slot, 0, remedy="slots are numbered from 0") >= self._count:
            raise ValueError(
                f"slot must be below {self._count}, got {slot}; make max_slots larger."
            )
