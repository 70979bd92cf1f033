"""What it takes to train a Llama of seven billion parameters, counted without making a weight.

    python examples/memory_of_7b.py
    python examples/memory_of_7b.py --device 24GB

The configuration is enough; a folder or a name on the hub serves as well.
"""

import argparse
from collections.abc import Sequence

from transformers import LlamaConfig

import cruxy_torch

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
"""The shape of Llama 2 7B (Touvron et al. 2023)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints bytes by kind, every way to train, and which of them fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="24GB", help="memory of the device (default: 24GB)")
    device = parser.parse_args(argv).device
    estimate = cruxy_torch.estimate_memory(LLAMA_7B, device_memory=device)
    print(estimate)
    print(f"\nweights: {estimate['fp16_gb']:.2f} GB in 16 bits, {estimate['int8_gb']:.2f} in 8")
    for way, size in estimate.ways.items():
        print(f"{way:60} {size / 1e9:6.2f} GB")
    print(f"\n{estimate['recommendation']}")


if __name__ == "__main__":
    main()
