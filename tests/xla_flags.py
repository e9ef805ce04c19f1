"""The flags of XLA's CPU compiler for tests, which spend their time compiling and not computing."""

import importlib.metadata
import re

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"

EXACT: dict[str, bool | str] = {}
"""Compiler options for tests that compare two programs bit for bit."""

# Fusion emitters take three times as long to compile. Without them, a sum may be rounded
# differently in two programs. Newer versions of jaxlib always use them, and do not know the flag.
if [int(x) for x in re.findall(r"\d+", importlib.metadata.version("jaxlib"))] < [0, 11]:
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
    EXACT = {"xla_cpu_use_fusion_emitters": True}
