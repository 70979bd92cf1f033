"""What measures and trains in PyTorch: the twin of each file lies in `benchmarks/_jax`."""
