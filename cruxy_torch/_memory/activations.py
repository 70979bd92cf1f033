"""What autograd keeps for the backward pass, in 8 or 4 bits an element."""

import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cruxy_control.checks import check_count
from cruxy_exact.affine import AffineCode
from cruxy_exact.random_bits import stream_key
from cruxy_torch._memory.flat_codes import CodedFlat, decode, encode

SLICE = 4
"""A view of less than one part in so many of its storage is coded alone, not with all of it."""

_SAME_NUMBERS = frozenset(
    "AliasBackward0 AsStridedBackward0 DetachBackward0 PermuteBackward0 ReshapeAliasBackward0 "
    "SliceBackward0 TBackward0 ToCopyBackward0 TransposeBackward0 UnsafeViewBackward0 "
    "ViewBackward0".split()
)
"""Operations whose output is their input in another shape or dtype."""

_FINE = AffineCode(8)
"""For what the backward pass takes the exponential of: with wide steps that is biased."""

_LOG_PROBABILITIES = frozenset(
    (functional.cross_entropy, functional.log_softmax, torch.log_softmax, Tensor.log_softmax)
)
"""Functions whose backward pass takes the exponential of their logarithms of probabilities."""

_STATISTIC = 8
"""Attention takes that of one number a row, of so many times fewer elements than its query."""

_steps: "weakref.WeakKeyDictionary[torch.nn.Module, int]" = weakref.WeakKeyDictionary()
"""How often each model's activations have been compressed."""


class _Entry:
    """The codes of one storage, kept by the saved tensors that are views of it."""

    def __init__(self, coded: CodedFlat) -> None:
        self.coded = coded


class _Last:
    """The last storage that was decoded, until another one is, or its codes are gone.

    A node that saved several views of it asks for them one after the other.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._entry: Callable[[], _Entry | None] = lambda: None

    def decoded(self, entry: _Entry) -> Tensor:
        flat = self._flat if self._entry() is entry else None
        if flat is None:
            self._flat = None
            flat = decode(entry.coded)
            self._entry, self._flat = weakref.ref(entry, self._forget), flat
        return flat

    def _forget(self, reference: Any) -> None:
        if reference is self._entry:
            self._flat = None


class _View(NamedTuple):
    """A saved tensor that is part of what an entry has coded."""

    entry: _Entry
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Exact(NamedTuple):
    """A saved tensor as it is, and its version then."""

    tensor: Tensor
    version: int


class _Exponentiated(TorchFunctionMode):
    """Knows, while a function runs, of which tensors its backward pass takes the exponential.

    Attributes:
        most: elements of the largest of them; 0 where there is none.
    """

    most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, self.most
        if func in _LOG_PROBABILITIES:
            self.most = sys.maxsize
        elif func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.most = query.numel() // _STATISTIC
        try:
            return func(*args, **kwargs)
        finally:
            self.most = before


class ActivationStore:
    """What `compress_activations` returns: a context, and an account of what was kept in it.

    A block counts one forward pass; entered again, it begins a new account.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        code: AffineCode,
        *,
        min_elements: int,
        stochastic: bool,
        seed: int,
        step: int | None,
    ) -> None:
        self._model, self._code = model, code
        self._min, self._stochastic, self._seed = min_elements, stochastic, seed
        self._step = step
        self._hooks: Any = None
        self._exponentiated = _Exponentiated()
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._counter = torch.tensor(
            (step + 2**31) % 2**32 - 2**31, dtype=torch.int32, device="cpu"
        )
        self._original = self._exact = self._coded = 0
        self._seen: dict[int, tuple[StorageWeakRef, dict[Any, Any]]] = {}
        self._entries: weakref.WeakSet[_Entry] = weakref.WeakSet()
        self._ordinal, self._last = 0, _Last()

    def __enter__(self) -> Self:
        if self._hooks is not None:
            raise RuntimeError(
                "a block of compress_activations() must not stand inside itself; leave it first."
            )
        _refuse_compiled(self._model)
        step = _steps.get(self._model, 0) if self._step is None else self._step
        if self._step is None:
            _steps[self._model] = step + 1
        else:
            self._step += 1
        self._begin(step)
        kept = (*self._model.parameters(), *self._model.buffers())
        self._parameters = {_address(t) for t in kept} - {None, 0}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        self._exponentiated.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hooks, self._hooks = self._hooks, None
        self._seen = {}  # storages that come later may have their addresses
        self._exponentiated.__exit__(kind, error, trace)
        hooks.__exit__(kind, error, trace)

    def memory_stats(self) -> dict[str, float | int]:
        """The bytes that the last block kept for the backward pass, but for parameters and buffers.

        Returns:
            `original_bytes` are those that autograd keeps without compression, each storage
            counted once; `stored_bytes` those that are kept; `exact_bytes` of these are in tensors
            that were passed through; `compression_ratio` is the first by the second, 1 of nothing.
            `held_bytes` are those of the codes that are alive now: 0 once the graph is gone.
        """
        stored = self._coded + self._exact
        return {
            "original_bytes": self._original + self._exact,
            "stored_bytes": stored,
            "exact_bytes": self._exact,
            "compression_ratio": (self._original + self._exact) / stored if stored else 1.0,
            "held_bytes": sum(entry.coded.nbytes for entry in self._entries),
        }

    def _pack(self, tensor: Tensor) -> _Exact | _View:
        if torch.compiler.is_compiling():
            raise RuntimeError(_NOT_COMPILED)
        if self._is_parameter(tensor):
            return _exact(tensor)
        if not self._is_worth_it(tensor):
            if type(tensor) is Tensor:
                self._count_exact(tensor)
            return _exact(tensor)
        return self._view(tensor)

    def _unpack(self, packed: _Exact | _View) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compressed activations must not be differentiated twice, got a backward pass with "
                "create_graph=True: codes have no derivative; leave compress_activations() out."
            )
        if isinstance(packed, _Exact):
            if packed.tensor._version != packed.version:
                raise RuntimeError(
                    "a tensor that the backward pass needs must not be modified in place, got one "
                    f"of shape {tuple(packed.tensor.shape)} at version {packed.tensor._version} "
                    f"that was saved at {packed.version}; modify a clone of it."
                )
            return packed.tensor
        return self._last.decoded(packed.entry).as_strided(
            packed.size, packed.stride, packed.offset
        )

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or a buffer, a view of one, or its copy in another dtype."""
        if isinstance(tensor, torch.nn.Parameter) or _address(tensor) in self._parameters:
            return True
        node = tensor.grad_fn
        while node is not None and node.name() in _SAME_NUMBERS:
            node = node.next_functions[0][0]
        variable = getattr(node, "variable", None)
        return isinstance(variable, torch.nn.Parameter)

    def _is_worth_it(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return False
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        storage = tensor.untyped_storage()
        count = min(tensor.numel(), storage.nbytes() // tensor.element_size())
        return count >= self._min

    def _count_exact(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known(storage)
        if not known:
            self._exact += storage.nbytes()
            known["exact"] = True

    def _known(self, storage: torch.UntypedStorage) -> dict[Any, Any]:
        """What this block has noted of a storage; the weak reference keeps its address its own."""
        reference = StorageWeakRef(storage)
        return self._seen.setdefault(reference.cdata, (reference, {}))[1]

    def _view(self, tensor: Tensor) -> _View:
        storage = tensor.untyped_storage()
        tensor = tensor.detach()
        size, width = tensor.numel() * tensor.element_size(), tensor.element_size()
        is_whole = storage.nbytes() <= SLICE * size and storage.nbytes() % width == 0
        own = () if is_whole else (tensor.shape, tensor.stride(), tensor.storage_offset())
        known, key = self._known(storage), (tensor._version, tensor.dtype, *own)
        entry = known[key]() if key in known else None
        if is_whole:
            stride, offset = tensor.stride(), tensor.storage_offset()
            flat = tensor.as_strided((storage.nbytes() // width,), (1,), 0)
        else:
            flat = tensor.reshape(-1)
            stride, offset = _contiguous_strides(tensor.shape), 0
        if entry is None:
            is_fine = tensor.numel() <= self._exponentiated.most
            entry = self._encode(flat, _FINE if is_fine else self._code)
            known[key] = weakref.ref(entry)
        return _View(entry, tensor.shape, stride, int(offset))

    def _encode(self, flat: Tensor, code: AffineCode) -> _Entry:
        key = None
        if self._stochastic:
            key = stream_key(self._counter, self._seed, self._ordinal, xp=torch).to(flat.device)
        self._ordinal += 1
        entry = _Entry(encode(flat, code, key))
        self._entries.add(entry)
        self._original += flat.numel() * flat.element_size()
        self._coded += entry.coded.nbytes
        return entry


def compress_activations(
    model: torch.nn.Module,
    bits: int = 8,
    *,
    min_elements: int = 4096,
    stochastic: bool = True,
    seed: int = 0,
    step: int | None = None,
) -> ActivationStore:
    """Inside the block, what autograd keeps for the backward pass is kept in 8 or 4 bits.

    The forward pass is what it is without it, bit for bit. The backward pass computes with what
    the codes stand for: 1.016 bytes an element for 8 bits and 0.516 for 4, where float32 has 4 and
    bfloat16 2. Codes are unbiased (`cruxy_exact.AffineCode`): the mean over many draws of a
    saved tensor is that tensor, and so is that of the gradients of what is linear in it. Where the
    backward pass takes an exponential, of a loss's log-probabilities and of attention's sums, 8
    bits are kept in any case: wider steps have a bias there that grows as a model becomes sure.
    `backward` may be called inside the block or after it.

    What is passed through as it is: parameters and buffers, their views and their copies in another
    dtype (of those that are trained); integers and masks; float64 and complex numbers; tensor
    subclasses; tensors of fewer than `min_elements`. A storage that is saved several times, whole
    or in views, is coded once.

    Regions of `torch.utils.checkpoint` may stand inside: their inputs are compressed, and nothing
    else is kept of them.

    Args:
        model: whose parameters and buffers are left alone.
        bits: 8 or 4.
        min_elements: what has fewer is kept as it is; at least 1.
        stochastic: rounds up or down by chance; `False` takes the nearest level, whose error is
            smaller and a bias.
        seed: of the random bits, any whole number.
        step: number of the step, from which random bits follow; `None` counts the blocks of this
            model in this process. Give it where a run is to be resumed bit for bit.

    Returns:
        A context that can be entered; its `memory_stats()` tells what was kept.

    Raises:
        ValueError: where an argument is outside its range, or the model is compiled.
        RuntimeError: from inside `torch.compile`; from a backward pass with `create_graph=True`;
            from `backward` where a tensor that was passed through was modified in place.

    Examples:
        >>> import torch, cruxy_torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
        ... )
        >>> x = torch.ones(512, 64)
        >>> with cruxy_torch.compress_activations(model, bits=8) as store:
        ...     loss = model(x).square().mean()
        >>> loss.backward()
        >>> print(f"{store.memory_stats()['compression_ratio']:.2f}")
        3.94

    References:
        Chen et al., [ActNN](https://arxiv.org/abs/2104.14129), 2021; Liu et al., [GACT: Activation
        Compressed Training for Generic Network
        Architectures](https://arxiv.org/abs/2206.11357), 2022.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; give the model whose "
            "forward pass stands in the block."
        )
    min_elements = check_count("min_elements", min_elements, 1, remedy="4096 is a usual value")
    return ActivationStore(
        model,
        AffineCode(bits),
        min_elements=min_elements,
        stochastic=stochastic,
        seed=seed,
        step=step,
    )


_NOT_COMPILED = (
    "compress_activations() must not run under torch.compile, whose graphs decide what they save "
    "before it could say how; call the model that is not compiled, or leave it out."
)


def _refuse_compiled(model: torch.nn.Module) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(_NOT_COMPILED)
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{_NOT_COMPILED} Got a compiled {type(module).__name__}.")


def _exact(tensor: Tensor) -> _Exact:
    # An output that refers to the node that saves it would never be freed.
    return _Exact(tensor if tensor.is_leaf else tensor.detach(), tensor._version)


def _address(tensor: Tensor) -> int | None:
    """Where its storage begins; `None` of what has none, such as a subclass that wraps others."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))
