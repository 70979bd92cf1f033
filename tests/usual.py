"""`jax.jit` as users have it, to hold bits: `conftest.py` has other programs hurried through."""

import os
from functools import partial

import jax

OPTIONS = {"xla_backend_optimization_level": 3}
if "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
    OPTIONS["xla_cpu_use_fusion_emitters"] = True

jit = partial(jax.jit, compiler_options=OPTIONS)
