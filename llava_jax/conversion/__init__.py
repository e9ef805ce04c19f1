"""Converts checkpoints from and to other trainers' formats; only this folder reads pickles."""
