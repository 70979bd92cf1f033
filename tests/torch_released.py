"""What the tests of gradient release share."""

import torch_models as models
from cruxy_control import Meta3
from cruxy_torch._native import library
from torch_models import OPTIONS

OFF = Meta3(
    phase_strength=0, rate_gain=0, beta1_gain=0, beta2_phase_strength=0, beta2_gain=0,
    clip_threshold=None,
)  # fmt: skip
"""The controller off: everything it moves stays at 1."""

PATHS = {"single": {"fused": False}, "foreach": {"foreach": True}}
if library.available():
    PATHS["native"] = {"fused": True}

COUNTERS = ("controller.skipped_total", "controller.skipped_in_a_row")


def train(net, optimizer, steps, *, start=0, hook=None):
    """Trains without looking at gradients, which may be gone; `hook(net)` comes after backward."""
    losses = []
    for step in range(start, start + steps):
        loss = models.loss_of(net, *models.batch(step, next(net.parameters()).dtype))
        loss.backward()
        if hook is not None:
            hook(net)
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def released(name="meta3", **options):
    net = models.model()
    optimizer = models.optimizer(net, **{**OPTIONS[name], **options})
    optimizer.register_hooks()
    return net, optimizer
