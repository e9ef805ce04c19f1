"""Defines which parts of a model are trained, and the settings of their LoRA adapters."""

import dataclasses
from typing import Annotated, Any, Literal

from llava_jax.config.fields import Bound, at_least, at_most, fraction
from llava_jax.config.model import LLM_LINEARS

Tuning = Literal["frozen", "lora", "full"]


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Which parts of the model are trained, and how.

    Attributes:
        llm: How the decoder is trained: "frozen" trains nothing, "lora" trains adapters, and "full"
            trains all weights.
        vision: How the vision tower is trained, with the same values as tune.llm.
        projector: How the projector is trained, with the same values as tune.llm. Its adapters have
            the settings of the decoder's adapters.
    """

    llm: Tuning = "lora"
    vision: Tuning = "frozen"
    projector: Tuning = "full"

    @property
    def has_adapters(self) -> bool:
        """Whether at least one part is trained with adapters."""
        return "lora" in (self.llm, self.vision, self.projector)


ALL_LINEAR = "all-linear"
"""Target that stands for all linear layers of a part, as in PEFT."""


def _every(bound: Bound) -> Bound:
    """Returns the condition that every value of a dictionary or of a tuple fulfills `bound`."""

    def allows(found: Any) -> bool:
        values = found.values() if isinstance(found, dict) else found
        return all(map(bound.allows, values if isinstance(found, dict | tuple) else (found,)))

    return Bound(allows, bound.text, bound.reason)


_LEAST_RANK = at_least(1, "an adapter of rank 0 has no weights")
_MOST_RANK = at_most(65_536, "no layer is wider")
_LEAST_ALPHA = at_least(1e-4, "with less, an adapter adds nothing")
_MOST_ALPHA = at_most(1e6, "with more, it cannot learn")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA as PEFT defines it: y = W x + (alpha / rank) B A dropout(x).

    Attributes:
        rank: Rank of the adapter matrices A and B.
        alpha: Scale of the adapters: the output of each adapter is multiplied by alpha / rank.
        dropout: Dropout rate for the inputs of the adapters.
        targets: Names of the linear layers that get an adapter; "all-linear" stands for all linear
            layers of the part.
        use_rslora: Multiply the output of an adapter by alpha / sqrt(rank) (Kalajdzievski, 2023)
            instead of alpha / rank.
        rank_pattern: Ranks of some layers, by regular expressions. As in PEFT, the first expression
            that matches the end of a module's name gives the rank. For example, the name of a
            module is "model.language_model.layers.0.self_attn.q_proj".
        alpha_pattern: Alphas of some layers, in the same form as rank_pattern.
        layers_to_transform: Indices of the blocks that get adapters; None means all blocks.
        modules_to_save: Parts of the decoder that are trained in full beside the adapters:
            "embed_tokens" is the embedding, and "lm_head" is the output matrix.
        trainable_token_indices: Ids of tokens whose embedding is trained beside the adapters.
    """

    rank: Annotated[int, _LEAST_RANK, _MOST_RANK] = 128
    alpha: Annotated[float, _LEAST_ALPHA, _MOST_ALPHA] = 256.0
    dropout: Annotated[float, fraction("it is a probability")] = 0.05
    targets: tuple[str, ...] = LLM_LINEARS
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, int], _every(_LEAST_RANK), _every(_MOST_RANK)] = (
        dataclasses.field(default_factory=dict)
    )
    alpha_pattern: Annotated[dict[str, float], _every(_LEAST_ALPHA), _every(_MOST_ALPHA)] = (
        dataclasses.field(default_factory=dict)
    )
    layers_to_transform: Annotated[
        tuple[int, ...] | None, _every(at_least(0, "it is the index of a block"))
    ] = None
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    trainable_token_indices: Annotated[
        tuple[int, ...], _every(at_least(0, "it is the id of a token"))
    ] = ()

    def has_target(self, name: str) -> bool:
        """Returns True if the linear layers with this name get adapters."""
        return name in self.targets or self.targets == (ALL_LINEAR,)
