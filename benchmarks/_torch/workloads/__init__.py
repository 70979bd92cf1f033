"""The workloads in PyTorch: their models, losses and held-out figures."""
