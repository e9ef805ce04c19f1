"""Converts checkpoints between the formats of all trainers; only this folder reads pickles."""
