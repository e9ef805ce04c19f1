"""The flags of XLA's CPU compiler for tests, which spend their time compiling and not computing.

Disabling the fusion emitters would save more, but then sums are rounded differently.
"""

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
