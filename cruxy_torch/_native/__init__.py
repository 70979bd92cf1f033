"""The fast path on CPU."""
