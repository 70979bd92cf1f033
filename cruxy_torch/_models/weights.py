"""`load_model`: a model of transformers with linear layers in few bits, and what of it trains."""

import logging
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from cruxy_control.memory import GB
from cruxy_torch._memory.estimate import is_coded
from cruxy_torch._models.estimate import estimate_memory
from cruxy_torch._models.skeleton import class_of, config_of, needed
from cruxy_torch._roles.table import role_table

_log = logging.getLogger(__name__)

Train = Literal["rest", "lora", "all"]
Backend = Literal["auto", "torchao", "bitsandbytes"]
_AUTO = {8: "torchao", 4: "bitsandbytes"}


def load_model(
    source: str | Path,
    bits: int = 8,
    train: Train = "rest",
    backend: Backend = "auto",
    *,
    rank: int = 16,
    gradient_checkpointing: bool = False,
    **from_pretrained: Any,
) -> Any:
    """Loads a model of transformers with its linear layers in few bits, ready to be trained.

    The codes are those of torchao or bitsandbytes, and no other copy of a layer is made on the way.
    Codes are frozen: what trains is the rest, or adapters. To train every weight of a model that
    does not fit, load it with `bits=16, train="all"` and give `AXIOM` with released gradients.

    Args:
        source: a folder or a name on the hub.
        bits: of linear layers, output layers excepted: 8, 4, or 16 for none in few bits. The rest
            is bfloat16.
        train: what is trained:

            - `"rest"`: everything that is not in few bits: embeddings, norms, biases, the output
              layer. `cruxy_torch.role_table` of it is logged at INFO.
            - `"lora"`: low-rank adapters (peft) beside every linear layer of attention and MLP, in
              float32; all else is frozen.
            - `"all"`: every weight; needs `bits=16`.
        backend: whose codes: `"torchao"`, which has 8 bits, or `"bitsandbytes"`, which has 8 and 4
            (nf4). `"auto"` is torchao for 8 and bitsandbytes for 4.
        rank: of the adapters, at least 1.
        gradient_checkpointing: recomputes activations in the backward pass.
        **from_pretrained: handed to the model's `from_pretrained`, such as `revision` or
            `attn_implementation`. Unless they are here `dtype` is bfloat16 and `device_map` the
            first CUDA device, or the CPU where there is none.

    Returns:
        The model, of the class that its configuration names, in training mode; under `"lora"` a
        `peft.PeftModel`, whose `save_pretrained` saves the adapters alone.

    Raises:
        ImportError: where a package is not installed; the message names the extra that brings it.
        ValueError: where an argument is outside its range, codes are to be trained, or nothing is
            left to train or to be kept in few bits.
        OSError: where there is no such model.
    """
    codes = _checked(source, bits, train, backend, rank)
    needed("transformers", "hf", "load_model")
    needed("accelerate", "hf", "load_model")
    if train == "lora":
        needed("peft", "hf", "train='lora'")
    quantized = _quantization(bits, codes)
    config = from_pretrained.pop("config", None) or config_of(source, **_where(from_pretrained))
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.bfloat16, "device_map": {"": place}, **from_pretrained}
    if quantized is not None:
        options["quantization_config"] = quantized
    model = class_of(config).from_pretrained(source, config=config, **options)
    if bits < 16 and not any(map(is_coded, model.parameters())):
        raise ValueError(
            f"{codes} must have something to keep in {bits} bits, got no layer of its kind in "
            f"{type(model).__name__}; try backend='bitsandbytes', which also takes GPT-2's Conv1D, "
            "or bits=16."
        )
    _keep_unpacked(model)
    if train == "lora":
        model = _adapted(model, rank)
    elif gradient_checkpointing and bits < 16:
        model.enable_input_require_grads()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"train={train!r} must leave something to train, got a model without a trainable "
            "parameter; use train='lora'."
        )
    if train == "rest":
        _log.info("what train='rest' trains:\n%s", role_table(model))
    return model.train()


def _checked(source: Any, bits: Any, train: Any, backend: Any, rank: Any) -> str:
    """The backend, where all arguments are in their ranges."""
    if bits not in (16, 8, 4):
        raise ValueError(f"bits must be 16, 8 or 4, got {bits!r}; 8 loses next to nothing.")
    if train not in get_args(Train):
        raise ValueError(f"train must be 'rest', 'lora' or 'all', got {train!r}; use 'rest'.")
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend must be 'auto', 'torchao' or 'bitsandbytes', got {backend!r}; use 'auto'."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}; 16 is usual.")
    if backend == "torchao" and bits == 4:
        raise ValueError(
            "backend must have codes of so many bits, got 'torchao' with bits=4; use "
            "'bitsandbytes', or bits=8."
        )
    if train == "all" and bits < 16:
        estimate = estimate_memory(source)
        raise ValueError(
            f"train='all' needs weights that can move, got bits={bits}, whose codes are frozen; "
            f"bits=16 with AXIOM and released gradients takes {estimate.released_total / GB:.2f} "
            "GB for weights, gradients and state. With codes use train='lora'."
        )
    return _AUTO.get(bits, "") if backend == "auto" else backend


def _quantization(bits: int, backend: str) -> Any:
    """What transformers has to know of the codes; `None` for none."""
    if bits == 16:
        return None
    needed(backend, "low-bit", f"bits={bits}")
    transformers = needed("transformers", "hf", "load_model")
    if backend == "torchao":
        kind = needed("torchao.quantization", "low-bit", f"bits={bits}").Int8WeightOnlyConfig
        return transformers.TorchAoConfig(kind())
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that say where a model is, which its configuration needs too."""
    names = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code", "local_files_only")
    return {name: options[name] for name in names if name in options}


def _keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing codes anew on a CPU in the first evaluation.

    What it packs for inference it does not unpack for training, where its product then has no
    derivative: what is below a layer gets no gradient through it.
    """
    for module in model.modules():
        packs: dict[str, Any] = vars(module)
        if "support_avx512bf16_for_cpu" in packs:
            packs["support_avx512bf16_for_cpu"] = False


def _adapted(model: nn.Module, rank: int) -> Any:
    """The model with adapters beside its linear layers.

    Not after `peft.prepare_model_for_kbit_training`, which makes embeddings, norms and the output
    layer float32: they are frozen, and twice as large.
    """
    peft = needed("peft", "hf", "train='lora'")
    model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)
