"""Converts checkpoints between all supported formats; only this folder reads pickles."""
