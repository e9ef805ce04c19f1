"""Measures the speed and the memory of training, for `llava-jax benchmark`."""
