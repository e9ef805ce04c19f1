"""What `tools/benchmark.py` runs: models, batches, and the operations that they need. No JAX."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np

from llava_jax.config import LlmConfig, ModelConfig, TrainConfig, VisionConfig

CASE_FILE, BASE, ADAPTER = "case.pickle", "base", "adapter"
SCALE = ((1 / 70,) * 3, (-1.7,) * 3)  # about as CLIP's processor normalises levels


def _shape(
    vision: tuple[int, int, int], llm: tuple[int, int, int], feed_forward: int, head_dim: int
) -> ModelConfig:
    """A LLaVA of images of 336 pixels; each part is its width, depth and heads."""
    width, depth, heads = vision
    tower = VisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
    )
    width, depth, heads = llm
    decoder = LlmConfig(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
    )
    return ModelConfig(tower, decoder)


SHAPES = {
    "25m": _shape((192, 8, 3), (256, 6, 4), 688, 64),
    "150m": _shape((512, 12, 8), (768, 9, 12), 2048, 64),
    "1b": _shape((1024, 24, 16), (2048, 12, 16), 5632, 128),
    "7b": ModelConfig(),
}
"""Models by what all their parameters come to. Their vocabulary is LLaVA's own, so of the smallest
it is most."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides run.

    Attributes:
        config: The run; its recipe's schedule is constant and nothing is dropped.
        model: The sizes.
        text_tokens: Of each sample, beside an image; the last half of them is learned.
    """

    config: TrainConfig
    model: ModelConfig
    text_tokens: int

    @property
    def samples(self) -> int:
        return self.config.batch.global_size

    @property
    def tokens(self) -> int:
        """Of a sample, its image included."""
        return self.model.image_tokens + self.text_tokens

    @property
    def learned(self) -> int:
        """Tokens of a sample that have a loss."""
        return self.text_tokens // 2

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The random batch of a step: the arrays of a `llava_jax.data.batching.Batch`."""
        rng = np.random.default_rng(step)
        ids = np.full((self.samples, self.tokens), self.model.image_token_id, np.int32)
        model = self.model
        known = np.setdiff1d(
            range(model.llm.vocab_size), [model.image_token_id, model.pad_token_id]
        )
        words = rng.choice(known, (self.samples, self.text_tokens))
        ids[:, 0], ids[:, 1 + self.model.image_tokens :] = words[:, 0], words[:, 1:]
        learned = np.broadcast_to(np.arange(self.tokens) >= self.tokens - self.learned, ids.shape)
        side = self.model.vision.image_size
        places = 1 + np.arange(self.samples, dtype=np.int32)
        return {
            "input_ids": ids,
            "loss_mask": learned,
            "segment_ids": np.broadcast_to(places[:, None], ids.shape),
            "pixel_values": rng.integers(0, 256, (self.samples, 1, 3, side, side), np.uint8),
            "pixel_scale": np.tile(np.array(SCALE, np.float32), (self.samples, 1, 1)),
        }

    @property
    def needed_flops(self) -> float:
        """Operations of the matrix products that a step needs; docs/performance.md derives them.

        A multiplication and an addition are two. Nothing is counted twice for being computed again,
        nor gradients of frozen weights, keys behind the causal border, or logits without a loss.
        """
        llm, vision = self.model.llm, self.model.vision
        tunes_all = self.config.tune.llm == "full"
        width, keys = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
        queries, wide = llm.num_attention_heads * llm.head_dim, llm.intermediate_size
        linears = [(width, queries), (width, keys), (width, keys), (queries, width)]
        linears += [(width, wide), (width, wide), (wide, width)]
        passes = 3 if tunes_all else 2  # forwards, to the input, and to the weight
        rank = 0 if tunes_all else self.config.lora.rank
        layer = sum(passes * i * o + 3 * rank * (i + o) for i, o in linears)
        layer += 3 * self.tokens * queries  # QK and PV, and back; half of the keys
        decoder = self.tokens * llm.num_hidden_layers * layer
        head = self.learned * passes * llm.vocab_size * width
        size, seen = vision.hidden_size, vision.num_positions
        block = 4 * size**2 + 2 * size * vision.intermediate_size + 2 * seen * size
        patches = vision.num_patches * 3 * vision.patch_size**2 * size
        tower = seen * self.model.used_vision_layers * block + patches
        projector = self.model.image_tokens * (2 * size * width + 3 * width**2)
        return 2.0 * self.samples * (decoder + head + tower + projector)

    def save(self, directory: Path) -> None:
        (directory / CASE_FILE).write_bytes(pickle.dumps(self))


def load_case(directory: Path) -> Case:
    """What `Case.save` wrote."""
    return pickle.loads((directory / CASE_FILE).read_bytes())
