"""Defines the settings of the computation that all modules of a model share, like the dtype."""

import dataclasses

from llava_jax.config import AttentionImplementation, Remat


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Settings of the computation that all modules of a model share.

    Apart from rounding, only `dtype` changes results.

    Attributes:
        dtype: Dtype of activations, "float32" or "bfloat16"; matrices are cast to this dtype at
            each use.
        implementation: Implementation of attention.
        remat: Activations that are kept for the backward pass; see `config.MemoryConfig`.
        offload_activations: Whether the inputs of blocks are kept in host memory from the forward
            pass to the backward pass. Needs remat "full".
        gather_weights: Whether each device gathers the sharded weights of an MLP once for all
            chunks of tokens, instead of once per chunk. This needs more memory and less
            communication.
    """

    dtype: str = "float32"
    implementation: AttentionImplementation = "plain"
    remat: Remat = "full"
    offload_activations: bool = False
    gather_weights: bool = True


FLOAT32 = ComputeConfig()
"""Default settings, which every device supports."""
