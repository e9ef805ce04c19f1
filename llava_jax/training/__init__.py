"""Executes a run from start to end: loop, checkpoints, resuming, evaluation and export."""
