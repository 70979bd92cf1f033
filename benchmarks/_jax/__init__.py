"""What measures and trains in JAX: the twin of each file lies in `benchmarks/_torch`."""
