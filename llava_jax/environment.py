"""What must be set before JAX is imported."""

import os

PLANNING_FLAGS = (
    # Without a GPU nothing can be tuned, and some products then find no Triton tiling.
    "--xla_gpu_enable_triton_gemm=false",
    # See program.STREAMING_OPTIONS; a compile-only client takes no options of a jit.
    "--xla_disable_hlo_passes=dynamic-slice-annotator",
)


def prepare_for_planning() -> None:
    """Lets this process compile for devices that are not here, and use none that are."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *PLANNING_FLAGS])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
