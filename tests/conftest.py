"""The whole suite's setting: eight fake CPU devices, strict numerics, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# The suite spends its time compiling, not computing.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import jaxtyping  # noqa: E402 - JAX must be configured before anything imports it

jaxtyping.install_import_hook("llava_jax", "beartype.beartype")
