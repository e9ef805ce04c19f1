"""How fast training is: what `llava-jax benchmark` measures."""
