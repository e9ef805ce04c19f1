"""Checks results, memory and speed on the attached device (`llava-jax gpu-check`)."""
