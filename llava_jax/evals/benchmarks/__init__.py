"""Reads and scores benchmarks; each benchmark has its own module, and `registry` lists them."""
