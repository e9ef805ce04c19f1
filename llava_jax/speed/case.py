"""Defines the models and batches of `llava-jax benchmark`, without importing JAX."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np

from llava_jax.config import LlmConfig, ModelConfig, TrainConfig, VisionConfig
from llava_jax.data.tiles import index_whole_images
from llava_jax.planning.model_flops import Row, model_flops

CASE_FILE, BASE, ADAPTER = "case.pickle", "base", "adapter"
SCALE = ((1 / 70,) * 3, (-1.7,) * 3)  # factors and offsets, similar to CLIP's processor


def _shape(
    vision: tuple[int, int, int], llm: tuple[int, int, int], feed_forward: int, head_dim: int
) -> ModelConfig:
    """Returns the sizes of a LLaVA model for images of 336 x 336 pixels.

    Args:
        vision: Width, depth and number of heads of the vision tower.
        llm: Width, depth and number of heads of the decoder.
        feed_forward: Width of the feed-forward layers of the decoder.
        head_dim: Size of a head of the decoder.
    """
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
"""Sizes of models, by their number of parameters. All models have LLaVA's vocabulary, so most
parameters of the smallest model are embeddings."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Training run that both sides of the benchmark execute.

    Attributes:
        config: Config of the run, with a constant learning rate and without dropout.
        model: Sizes of the model.
        text_tokens: Number of text tokens per sample; the last half of these tokens have a loss.
    """

    config: TrainConfig
    model: ModelConfig
    text_tokens: int

    @property
    def samples(self) -> int:
        """Returns the number of samples per step."""
        return self.config.batch.global_size

    @property
    def tokens(self) -> int:
        """Returns the number of tokens per sample, including the image tokens."""
        return self.model.image_tokens + self.text_tokens

    @property
    def learned(self) -> int:
        """Returns the number of tokens per sample that have a loss."""
        return self.text_tokens // 2

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns the random batch of a step: arrays by field of `llava_jax.data.batch.Batch`."""
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
            **index_whole_images(ids, self.model, 1),
            "pixel_values": rng.integers(0, 256, (self.samples, 1, 3, side, side), np.uint8),
            "pixel_scale": np.tile(np.array(SCALE, np.float32), (self.samples, 1, 1)),
        }

    @property
    def model_flops(self) -> float:
        """Returns the number of floating-point operations in the matrix products of a step.

        docs/performance.md explains the formula. Recomputed products, keys that the causal mask
        hides, and logits without a loss are not counted.
        """
        memory = dataclasses.replace(self.config.memory, remat="none")
        config = dataclasses.replace(self.config, memory=memory)
        row = Row(self.tokens, self.learned, seen=self.tokens / 2, slots=1)
        return self.samples * model_flops(config, self.model, row)

    def save(self, directory: Path) -> None:
        """Writes the case to a file in a directory."""
        (directory / CASE_FILE).write_bytes(pickle.dumps(self))


def load_case(directory: Path) -> Case:
    """Reads the case that `Case.save` wrote to a directory."""
    return pickle.loads((directory / CASE_FILE).read_bytes())
