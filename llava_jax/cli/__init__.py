"""The command `llava-jax`: one module for each of its commands."""
