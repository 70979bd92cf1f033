"""The optimizers: each a chain of parts under a law."""
