"""Roles: what each parameter of a Llama is, and groups for any optimizer made of that.

The model stands on the meta device: no weight is made.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cruxy_torch

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
)


def main() -> None:
    """Prints the table of roles, and the groups that torch's AdamW is given."""
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    rates = {"embedding": 1 / 3, "norm": 3}
    print(cruxy_torch.role_table(model, rates=rates))
    groups = cruxy_torch.param_groups(model, lr=1e-3, weight_decay=0.1, rates=rates)
    optimizer = torch.optim.AdamW(groups)
    print()
    for group in optimizer.param_groups:
        name, count = group["role"], len(group["params"])
        print(f"{name:16} {count:3} tensors  rate {group['lr']:.1e}  decay {group['weight_decay']}")


if __name__ == "__main__":
    main()
