"""Generates answers: prompts, sampling, the engine with its caches, and the terminal chat."""
