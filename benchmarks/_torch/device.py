"""Where PyTorch computes."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where models are trained."""


def name() -> str:
    """The accelerator, or the processor where there is none, in the words that JAX has for it."""
    return f"gpu: {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else "cpu: cpu"
