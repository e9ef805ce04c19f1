"""Evaluates models on benchmarks."""
