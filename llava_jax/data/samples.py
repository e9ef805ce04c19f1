"""Encodes records as samples: token ids, the mask of the tokens that are learned, and pixels."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from transformers import PreTrainedTokenizerBase

from llava_jax.config.data import TrainOn
from llava_jax.data.conversation import Encoded, SampleError, count_placeholders, encode
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import ImageKind, ImageTransform
from llava_jax.data.records import Record
from llava_jax.data.templates import Template


@dataclasses.dataclass(frozen=True)
class Sample:
    """An encoded record before padding, with T tokens and I images.

    Attributes:
        input_ids: int32 [T]. Token ids.
        loss_mask: bool [T]. True for tokens that are training targets.
        pixel_values: uint8 [I, 3, H, W]. Pixels of the images, not normalized.
        kinds: What was changed in each image file before it was resized.
    """

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    pixel_values: UInt8[np.ndarray, "I 3 H W"]
    kinds: tuple[ImageKind, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleEncoder:
    """Encodes the text of a record as token ids and its images as pixels. Can be pickled.

    Attributes:
        tokenizer: Fast tokenizer of transformers.
        template: Conversation template: the text around the turns.
        transform: Transform that resizes and crops the images.
        image_token_id: Id of the token that represents an image.
        image_tokens: Number of tokens of one image.
        max_length: Maximum number of tokens in a sample; longer samples are truncated.
        max_images: Maximum number of images in a sample.
        max_text_length: Maximum number of tokens in a sample, counting each image as one token;
            longer samples are truncated. None sets no such limit.
        train_on: Which answers are learned; see `DataConfig.train_on`.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    transform: ImageTransform
    image_token_id: int
    image_tokens: int
    max_length: int
    max_images: int
    max_text_length: int | None = None
    train_on: TrainOn = "answers"

    def __call__(self, record: Record) -> Sample:
        """Encodes the text and the images of a record.

        Raises:
            SampleError: The record cannot be used for training.
            ConfigError: The tokenizer lacks a control token of the template.
        """
        return self.add_images(record, self.encode_text(record))

    def encode_text(self, record: Record) -> Encoded:
        """Encodes the text of a record without reading its images.

        Raises:
            SampleError: The record cannot be used for training.
            ConfigError: The tokenizer lacks a control token of the template.
        """
        self._check_images(record)
        encoded = encode(
            record.turns,
            self.template,
            self.tokenizer,
            self.image_token_id,
            last_answer_only=self.train_on == "last_answer",
        )
        return expand_images(
            encoded, self.image_token_id, self.image_tokens, self.max_length, self.max_text_length
        )

    def add_images(self, record: Record, encoded: Encoded) -> Sample:
        """Returns the complete sample: the encoded text of a record, and the pixels of its images.

        Raises:
            SampleError: An image cannot be read.
        """
        images = record.images[: self.count_images(encoded)]
        pixels = np.empty((len(images), 3, self.transform.height, self.transform.width), np.uint8)
        kinds = [self.transform.read(*pair) for pair in zip(images, pixels, strict=True)]
        return Sample(encoded.input_ids, encoded.loss_mask, pixels, tuple(kinds))

    def count_images(self, encoded: Encoded) -> int:
        """Returns the number of images in an encoded text; truncation may have removed some."""
        return int((encoded.input_ids == self.image_token_id).sum()) // self.image_tokens

    def _check_images(self, record: Record) -> None:
        count = len(record.images)
        if count > self.max_images:
            raise SampleError(
                f"the sample has {count} images, but data.max_images is {self.max_images}; "
                "increase data.max_images",
                "number of images",
            )
        placeholders = count_placeholders(record.turns)
        if placeholders != count:
            raise SampleError(
                f"the human turns contain <image> {placeholders} times, but the sample has "
                f"{count} images; write <image> once for each image",
                "number of images",
            )
