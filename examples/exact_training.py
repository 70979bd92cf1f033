"""Trains a small GPT or ViT whose every bit is the same on any machine, and prints its checksum.

    python examples/exact_training.py                                     # a GPT, in PyTorch
    python examples/exact_training.py --micro-batches 4                   # the same checksum
    torchrun --nproc-per-node 2 examples/exact_training.py                # the same checksum
    python examples/exact_training.py --model vit
    python examples/exact_training.py --steps 10 --save run.npz           # stop here,
    python examples/exact_training.py --steps 20 --load run.npz           # and go on, in either

Gradients are added in grains of one sample, so that neither the number of micro-batches nor that of
processes is part of the result. A saved run holds its arrays under the names and in the layout of
`cruxy_exact.reference`, which both frameworks read.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

FRAMEWORKS = ("torch", "jax")


def main(argv: Sequence[str] | None = None) -> str:
    """Trains with the command line `argv`, by default the process's own; returns the checksum."""
    parser = argparse.ArgumentParser(description="Bit-exact training.")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--model", choices=("gpt", "vit"), default="gpt")
    parser.add_argument("--steps", type=int, default=10, help="the step at which to stop")
    parser.add_argument("--micro-batches", type=int, default=1, help="divides the batch of 8")
    parser.add_argument("--load", type=Path, help="a run to go on from")
    parser.add_argument("--save", type=Path, help="where to save the run at its end")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.micro_batches < 1 or 8 % options.micro_batches:
        parser.error("--steps has to be at least 1, and --micro-batches has to divide 8.")
    side = importlib.import_module(f"_exact_{options.framework}")
    return side.train(options)


if __name__ == "__main__":
    main()
