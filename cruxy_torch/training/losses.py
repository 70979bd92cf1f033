"""What is minimised: the loss that a model of transformers gives, or a function of the user's."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_torch.training.batches import tensors

IGNORED = -100
"""The label of what does not count, as in torch's cross entropy."""

_TOKENS = (None, "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")
"""The losses of transformers that are a mean over tokens."""


class Loss:
    """The loss of a batch, and what it is a mean over.

    Args:
        loss_fn: a function of model and batch; a module of torch such as `CrossEntropyLoss`, for
            batches of inputs and targets; `None` for the loss that the model itself gives.
        model: the model.
    """

    def __init__(self, loss_fn: Callable[..., Any] | None, model: nn.Module) -> None:
        self._loss_fn = loss_fn
        inner: Any = getattr(model, "_orig_mod", model)  # what torch.compile is put around
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        kind = getattr(inner, "loss_type", None)
        self.counts_tokens = loss_fn is None and kind in _TOKENS
        is_seq2seq = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        self._shifts = kind in (None, "ForCausalLM") and not is_seq2seq
        self._names = list(inspect.signature(inner.forward).parameters)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss, a scalar tensor.

        Raises:
            ValueError: where it is none, or nothing to be minimised.
        """
        if isinstance(self._loss_fn, nn.Module):
            inputs, targets = _pair(batch)
            loss = self._loss_fn(model(inputs), targets)
        elif self._loss_fn is not None:
            loss = self._loss_fn(model, batch)
        else:
            loss = getattr(model(**self.arguments(batch)), "loss", None)
            if loss is None:
                given = sorted(self.arguments(batch))
                raise ValueError(
                    f"{type(model).__name__} must give a loss, got none from {given}; give "
                    "loss_fn=, a function of model and batch."
                )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(
                f"the loss must be a floating-point tensor of one element, got {what}; return for "
                "instance losses.mean()."
            )
        return loss.reshape(())

    def arguments(self, batch: Any) -> dict[str, Any]:
        """What the model is called with: `input_ids`, `labels` and all else that it takes.

        Labels that are absent are the tokens, without those that `attention_mask` leaves out.
        """
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        elif isinstance(batch, list | tuple):
            batch = dict(zip(("input_ids", "labels"), batch, strict=False))
        found = {name: _stacked(value) for name, value in batch.items() if name in self._names}
        found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if "labels" not in found and "labels" in self._names and "input_ids" in found:
            found["labels"] = found["input_ids"]
            if "attention_mask" in found:
                found["labels"] = found["labels"].masked_fill(found["attention_mask"] == 0, IGNORED)
        return found

    def count(self, batch: Any) -> Tensor:
        """Over how many the loss of a batch is a mean: tokens, else examples; 0-d."""
        if not self.counts_tokens:
            sizes = [len(tensor) for tensor in tensors(batch) if tensor.ndim]
            return torch.tensor(float(sizes[0] if sizes else 1), dtype=torch.float64, device="cpu")
        labels = self.arguments(batch)["labels"]
        labels = labels[..., 1:] if self._shifts else labels
        return (labels != IGNORED).sum(dtype=torch.float64)

    def tokens(self, batch: Any) -> int | None:
        """Tokens that a batch brings, padding included; `None` where there are none."""
        if not self.counts_tokens:
            return None
        found = self.arguments(batch).get("input_ids")
        return None if found is None else found.numel()


def _stacked(value: Any) -> Any:
    """What torch's collation has made of lists of numbers: one tensor, a row an example."""
    if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
        return torch.stack(value, dim=-1)
    return value


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"a batch must be inputs and targets under such a loss_fn, got {type(batch).__name__}; "
        "give a function of model and batch."
    )
