"""The workloads in JAX: their models, losses and held-out figures."""
