"""Bit-exact training: the same weights to the byte on any CPU or GPU, in either framework.

Needs JAX 0.8 or newer. 64-bit types stay off in the program around: exact functions switch them on
for themselves.
"""

import importlib
import os
from typing import Any

import jax

from cruxy_exact.accumulate import Grains
from cruxy_exact.engines import Precision
from cruxy_optax.exact._attention import (
    attention,
    fused_attention,
    rotary,
    rotary_table,
    softmax,
)
from cruxy_optax.exact._checksum import checksum
from cruxy_optax.exact._controlled import ControlledState, controlled, self_driving
from cruxy_optax.exact._frame import check_flags
from cruxy_optax.exact._functional import (
    add,
    convolution,
    dropout,
    dropout_key,
    embed,
    fork,
    gelu,
    layer_norm,
    linear,
    matmul,
    mean,
    mul,
    patch_embedding,
    relu,
    rms_norm,
    scale,
    silu,
    softmax_cross_entropy_with_integer_labels,
    sum,
)
from cruxy_optax.exact._gradients import (
    apply_updates,
    clip_by_global_norm,
    global_norm,
    scale_by_count,
)
from cruxy_optax.exact._grains import (
    AccumulateGrainsState,
    accumulate_grains,
    add_grain,
    all_reduce_grains,
    grain_sum,
    merge_grains,
    no_grains,
)
from cruxy_optax.exact._optimizers import (
    AdamWState,
    LionState,
    SGDState,
    adamw,
    lion,
    sgd,
)
from cruxy_optax.exact._reference import plain_step, reference_loss
from cruxy_optax.exact._schedules import (
    warmup_cosine,
    warmup_stable_decay,
)

__all__ = [
    "AccumulateGrainsState",
    "AdamWState",
    "ControlledState",
    "Grains",
    "LionState",
    "Precision",
    "SGDState",
    "accumulate_grains",
    "adamw",
    "add",
    "add_grain",
    "all_reduce_grains",
    "apply_updates",
    "attention",
    "checksum",
    "clip_by_global_norm",
    "controlled",
    "convolution",
    "dropout",
    "dropout_key",
    "embed",
    "fork",
    "fused_attention",
    "gelu",
    "global_norm",
    "grain_sum",
    "layer_norm",
    "linear",
    "lion",
    "matmul",
    "mean",
    "merge_grains",
    "mul",
    "no_grains",
    "patch_embedding",
    "plain_step",
    "reference_loss",
    "relu",
    "rms_norm",
    "rotary",
    "rotary_table",
    "scale",
    "scale_by_count",
    "self_driving",
    "sgd",
    "silu",
    "softmax",
    "softmax_cross_entropy_with_integer_labels",
    "sum",
    "warmup_cosine",
    "warmup_stable_decay",
]

if not hasattr(jax, "enable_x64"):
    raise ImportError(f"cruxy_optax.exact needs jax 0.8 or newer, got {jax.__version__}.")
check_flags(os.environ.get("XLA_FLAGS", ""))


def __getattr__(name: str) -> Any:
    if name == "nnx":  # which needs Flax
        return importlib.import_module("cruxy_optax.exact.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
