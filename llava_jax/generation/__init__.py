"""Generates text: prompts, sampling, the engine with its caches, and the chat in a terminal."""
