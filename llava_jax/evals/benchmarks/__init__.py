"""Reads and scores the benchmarks, each in a module of its own; `registry` lists them."""
