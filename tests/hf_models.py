"""A tiny Llama, its data and one run of `CruxyTrainer`, for the tests of the integrations."""

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from cruxy_torch.integrations.huggingface import CruxyTrainer

SHARED = {"max_steps": 6, "gradient_accumulation_steps": 2}
"""What the run on two ranks and the run it is compared with have in common."""


def llama():
    """A Llama of 5,000 parameters whose first gradients have a norm above 1."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )


def with_lora():
    """The same Llama with LoRA adapters in its attention."""
    import peft

    model = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


def sequences(count):
    """Token sequences with a rule to learn."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 32, (count, 1), generator=generator)
    tokens = (starts + 3 * torch.arange(12)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def training_arguments(folder, **arguments):
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})


class Telemetry(TrainerCallback):
    """Keeps what the optimizer reports after each step."""

    def __init__(self):
        self.rows = []

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rows.append(optimizer.optimizer.telemetry())


def train(
    folder,
    *,
    model=None,
    count=64,
    callbacks=(),
    resume=None,
    scaler=None,
    trainer_class=CruxyTrainer,
    trainer_options=None,
    **arguments,
):
    """One run; returns the trainer and the model."""
    model = llama() if model is None else model
    trainer = trainer_class(
        model=model,
        args=training_arguments(folder, **arguments),
        train_dataset=sequences(count),
        callbacks=list(callbacks),
        **(trainer_options or {}),
    )
    if scaler is not None:
        # Accelerate leaves both out on a CPU, which can do them.
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, model


def train_on_rank(rank, folder, sharded):
    """The same run as one of two ranks, each with half of every batch; then its second half again.

    Saves the whole parameters and the controller after each of the two.
    """
    # Accelerate insists on an address; the file below is where the two meet.
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    arguments = {**SHARED, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3}
    if sharded:
        shard_on_cpu()
        layers = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {**layers, "state_dict_type": "SHARDED_STATE_DICT"}
    for name in ("whole", "resumed"):
        resume = f"{folder}/run/checkpoint-3" if name == "resumed" else None
        trainer, _ = train(f"{folder}/run", resume=resume, **arguments)
        torch.save(
            {
                "model": {n: whole(p) for n, p in trainer.model.named_parameters()},
                "controller": trainer.optimizer.optimizer.param_groups[0]["controller"],
            },
            f"{folder}/{name}{rank}.pt",
        )
    torch.distributed.destroy_process_group()


def whole(param):
    """A parameter without its sharding."""
    return param.full_tensor().detach() if hasattr(param, "full_tensor") else param.detach()


def shard_on_cpu():
    """Lets Accelerate shard a model on CPUs, where it replicates it although PyTorch can shard."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def assert_same_state(ours, theirs):
    """Bit equality of two dictionaries of tensors."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(theirs[name])), name


def weights(model):
    """Copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
