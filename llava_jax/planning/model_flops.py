"""The operations that the mathematics of a train step asks for, to hold a compiled step's against.

Counted are products of matrices, in multiplications with an addition. What a linear layer of weight
[out, in] needs, for each token:

    forwards                 out x in          and of an adapter  R x (in + out)
    its input's gradient     out x in                             R x (in + out)
    its weight's gradient    out x in if it trains                R x (in + out)

Attention needs two products of T x H for each token and head forwards and four backwards, of as
many keys T as the row says. With remat "full" a block's forward products are made again, but for
its last, whose result nothing in the block depends on.
"""

import dataclasses
from collections.abc import Mapping

from llava_jax.config import LoraConfig, ModelConfig, TrainConfig, Tuning

Linears = Mapping[str, tuple[int, int]]
"""(in, out) of a block's linear layers, the last one last."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row of a batch asks for, in numbers of tokens.

    Attributes:
        tokens: All tokens.
        learned: Tokens that have a loss.
        seen: Keys that a token's attention is counted for; a compiled step's are all.
        images: Images, not tokens.
    """

    tokens: int
    learned: int
    seen: float
    images: int


def full_row(config: TrainConfig, images: int) -> Row:
    """`data.max_length` tokens that are all learned, as a compiled step's bounds have it."""
    length = config.data.max_length
    return Row(length, learned=length, seen=float(length), images=images)


def model_flops(config: TrainConfig, model: ModelConfig, row: Row) -> float:
    """Floating-point operations of a row, forwards and backwards."""
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
    below = tune.vision != "frozen"  # what trains below a layer asks for its input's gradient
    blocks = _block(decoder, queries * row.seen, tune.llm, config.lora, again=again, backwards=True)
    head = llm.vocab_size * width * (3 if tune.llm == "full" else 2)
    text = row.tokens * llm.num_hidden_layers * blocks + row.learned * head

    lora = config.vision_lora
    blocks = _block(tower, float(size * positions), tune.vision, lora, again=again, backwards=below)
    first, second = size * width, width * width
    trains = tune.projector == "full"
    projector = first * (1 + trains + below + again) + second * (1 + trains + 1)
    embed = 3 * vision.patch_size**2 * size * (2 if tune.vision == "full" else 1)
    image = positions * model.used_vision_layers * blocks + patches * (projector + embed)
    return 2 * (text + row.images * image)


def _block(
    linears: Linears,
    logits: float,
    tuning: Tuning,
    lora: LoraConfig,
    *,
    again: bool,
    backwards: bool,
) -> float:
    """Of a block and one token; `logits` is heads x head size x keys."""
    ranks = {name: lora.rank * (tuning == "lora" and name in lora.targets) for name in linears}
    weights = sum(inputs * outputs for inputs, outputs in linears.values())
    adapters = sum(ranks[name] * sum(linears[name]) for name in linears)
    count = weights + adapters + 2 * logits
    if backwards:
        count += weights * (2 if tuning == "full" else 1) + 2 * adapters + 4 * logits
    if backwards and again:
        last, (inputs, outputs) = list(linears.items())[-1]
        count += weights + adapters + 2 * logits - outputs * (inputs + ranks[last])
    return count
