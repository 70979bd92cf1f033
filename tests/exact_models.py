"""Training of the reference model in PyTorch, and what it has to come to."""

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from cruxy_torch import exact


class Checkpointed(exact.ReferenceModel):
    """The same model, whose blocks are run again in the backward pass."""

    def __init__(self, reference, like):
        super().__init__(reference, like)
        for block in self.blocks:
            forward = block.forward
            block.forward = lambda h, forward=forward: checkpoint(forward, h, use_reentrant=False)


def model(reference, kind=exact.ReferenceModel):
    return kind(reference, torch.zeros(1))


def batch(reference, step):
    return reference.data(step, torch.zeros(1), xp=torch)


def train(model, steps, begin=0, optimizer=None, both=False):
    r = model.reference
    optimizer = optimizer or exact.AdamW(model.parameters(), lr=r.lr)
    for step in range(begin, steps):
        exact.set_step(model, step)
        x, y = batch(r, step)
        optimizer.zero_grad()
        exact.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = exact.scale(p.grad, 1 / (r.batch * r.length))
        exact.clip_grad_norm_(model.parameters(), r.clip)
        optimizer.step()
    return (model, optimizer) if both else model


def reference_state(reference, steps):
    """The parameters of the reference after some steps in NumPy."""
    with np.errstate(all="ignore"):
        state = reference.start(np.zeros(1, np.float32), xp=np)
        for step in range(steps):
            state, _ = reference.step(state, step, xp=np)
    return state.params
