"""The flags of XLA's CPU compiler for tests, which spend their time compiling and not computing."""

FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"
"""Option for kernels that take three times as long to compile. Without them, a sum may be rounded
differently in two programs; tests of equality bit for bit between programs turn them on."""

XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    f"--{FUSION_EMITTERS}=false"
)
