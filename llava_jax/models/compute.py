"""How a model computes, as opposed to what: the part of a run's plan that its modules need."""

import dataclasses

from llava_jax.config import AttentionImplementation, Remat


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Settings that every part of a model shares. Only `dtype` changes results.

    Attributes:
        dtype: Dtype of activations, "float32" or "bfloat16"; parameters are cast where they are
            used.
        implementation: How attention is computed.
        remat: What the backward pass computes again.
        offload_activations: Whether the inputs of blocks wait in host memory for the backward
            pass; needs remat "full".
        gather_weights: Whether the weights of an MLP are gathered from other devices once, for all
            of its chunks of tokens. It takes memory for them and saves communication.
    """

    dtype: str = "float32"
    implementation: AttentionImplementation = "plain"
    remat: Remat = "full"
    offload_activations: bool = False
    gather_weights: bool = True


FLOAT32 = ComputeConfig()
"""The defaults, which every device can compute."""
