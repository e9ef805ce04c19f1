"""Reads and writes released weights, adapters, tokenizers and processors."""
