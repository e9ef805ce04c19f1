"""Reads and writes checkpoints: weights, adapters, tokenizers and image processors."""
