"""Reads and writes safetensors checkpoints: weights, adapters, tokenizers, image processors."""
