"""Counts the operations that a train step needs in theory, for comparison with a compiled step.

Only matrix products are counted. The table shows the number of pairs of a multiplication and an
addition, per token, of a linear layer with a weight [out, in] and an adapter of rank R:

                              weight                     adapter
    forward pass              out x in                   R x (in + out)
    gradient of the input     out x in                   R x (in + out)
    gradient of the weight    out x in, if it trains     R x (in + out)

For each token and head, attention needs two products of T x H in the forward pass and four in the
backward pass. H is the size of a head, and T is the number of keys (`Row.seen`). With remat "full",
the backward pass computes the forward products of a block again. Only the last product is not
computed again, because no gradient in the block depends on its result.
"""

import dataclasses
from collections.abc import Mapping

from llava_jax.config import LoraConfig, ModelConfig, TrainConfig, Tuning

Linears = Mapping[str, tuple[int, int]]
"""Sizes (in, out) of a block's linear layers by name; the layer that runs last comes last."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Sizes of a batch row that determine its number of operations.

    Attributes:
        tokens: Number of tokens, with or without a loss.
        learned: Number of tokens that have a loss.
        seen: Number of keys per token for which attention is counted, as a mean over the tokens. In
            a compiled step, attention is counted for all keys of the row.
        slots: Number of image slots.
    """

    tokens: int
    learned: int
    seen: float
    slots: int


def full_row(config: TrainConfig, slots: int) -> Row:
    """Returns a row of `data.max_length` tokens that all have a loss and attend to all keys.

    The operations of a compiled step are counted as if all rows were of this kind.

    Args:
        config: Config of the run.
        slots: Number of image slots of the row.
    """
    length = config.data.max_length
    return Row(length, learned=length, seen=float(length), slots=slots)


def model_flops(config: TrainConfig, model: ModelConfig, row: Row) -> float:
    """Returns the FLOPs of the forward pass and the backward pass of one row."""
    llm, vision, tune = model.llm, model.vision, config.tune
    width, again = llm.hidden_size, config.memory.remat == "full"
    patches = vision.num_patches
    queries, keys = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_key_value_heads))
    decoder = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, llm.intermediate_size),
        "up_proj": (width, llm.intermediate_size),
        "down_proj": (llm.intermediate_size, width),
    }
    size, positions = vision.hidden_size, vision.num_positions
    tower = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (size, size)),
        "fc1": (size, vision.intermediate_size),
        "fc2": (vision.intermediate_size, size),
    }
    # A layer needs the gradient of its input only if something trains before the layer.
    below = tune.vision != "frozen"
    blocks = _block(decoder, queries * row.seen, tune.llm, config.lora, again=again, backwards=True)
    head = llm.vocab_size * width * (3 if tune.llm == "full" else 2)
    text = row.tokens * llm.num_hidden_layers * blocks + row.learned * head

    lora = config.vision_lora
    blocks = _block(tower, float(size * positions), tune.vision, lora, again=again, backwards=below)
    first, second = len(model.feature_layers) * size * width, width * width
    trains = tune.projector == "full"
    projector = first * (1 + trains + below + again) + second * (1 + trains + 1)
    embed = 3 * vision.patch_size**2 * size * (2 if tune.vision == "full" else 1)
    features = patches
    if model.pools_before_projector:  # the projector runs on all tokens, not on all features
        text += row.tokens * projector
        features = 0
    slot = positions * model.used_vision_layers * blocks + features * projector + patches * embed
    return 2 * (text + row.slots * slot)


def slot_tokens(config: TrainConfig, model: ModelConfig) -> float:
    """Returns the number of tokens that need as many operations as one image slot.

    Args:
        config: Config of the run.
        model: Sizes of the model.
    """
    without, one = (model_flops(config, model, full_row(config, slots)) for slots in (0, 1))
    return (one - without) / without * config.data.max_length


def _block(
    linears: Linears,
    logits: float,
    tuning: Tuning,
    lora: LoraConfig,
    *,
    again: bool,
    backwards: bool,
) -> float:
    """Returns the number of pairs of a multiplication and an addition of one block, for one token.

    Args:
        linears: Linear layers of the block.
        logits: Number of heads x size of a head x number of keys.
        tuning: How the block is trained.
        lora: Settings of the adapters; only used if `tuning` is "lora".
        again: Whether the backward pass computes the forward products again.
        backwards: Whether the block has a backward pass.
    """
    ranks = {name: lora.rank * (tuning == "lora" and lora.has_target(name)) for name in linears}
    weights = sum(inputs * outputs for inputs, outputs in linears.values())
    adapters = sum(ranks[name] * sum(linears[name]) for name in linears)
    count = weights + adapters + 2 * logits
    if backwards:
        count += weights * (2 if tuning == "full" else 1) + 2 * adapters + 4 * logits
    if backwards and again:
        last, (inputs, outputs) = list(linears.items())[-1]
        count += weights + adapters + 2 * logits - outputs * (inputs + ranks[last])
    return count
