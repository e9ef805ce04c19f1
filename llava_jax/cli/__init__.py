"""Implements the command `llava-jax`, with one module for each subcommand."""
