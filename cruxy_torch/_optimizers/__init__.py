"""The optimizers, on `torch.optim`."""
