"""Large models of `transformers`, made on the meta device, and what labels them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from cruxy_torch import label_roles

Made = tuple[torch.nn.Module, Callable[[torch.nn.Module], dict[str, str]]]


def _made(config: Any) -> Callable[[], Made]:
    def make() -> Made:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config), label_roles

    return make


MODELS: dict[str, Callable[[], Made]] = {
    "GPT-2": _made(transformers.GPT2Config()),
    "LLaMA, 7B": _made(transformers.LlamaConfig()),
    "Mixtral, 8 x 7B": _made(transformers.MixtralConfig()),
    "LLaMA, 70B": _made(
        transformers.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
    ),
}
"""By name, what makes a model and the function that labels it."""
