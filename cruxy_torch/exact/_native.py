"""PyTorch as exact functions see it on CPU."""

import torch


def namespace():
    """The namespace."""
    return torch
