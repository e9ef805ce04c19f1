"""Encodes records as samples: token ids, the mask of the tokens that are learned, and pixels."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ModelConfig
from llava_jax.config.data import TrainOn
from llava_jax.data.conversation import Encoded, SampleError, count_placeholders, encode
from llava_jax.data.image_tokens import Expanded, expand_images
from llava_jax.data.images import ImageKind, ImageTransform
from llava_jax.data.records import Record
from llava_jax.data.templates import Template
from llava_jax.data.tiles import image_sources, is_tiled, video_sources
from llava_jax.data.video_file import Video, count_frames, iterate_frames


@dataclasses.dataclass(frozen=True)
class Sample:
    """An encoded record before padding, with T tokens and M image slots.

    Attributes:
        input_ids: int32 [T]. Token ids.
        loss_mask: bool [T]. True for tokens that are training targets.
        feature_index: int32 [T, K]. Features that replace the tokens; see `Expanded`.
        feature_weights: float32 [T, K]. Weights of the features.
        pixel_values: uint8 [M, 3, H, W]. Pixels of the image slots, not normalized.
        kinds: What was changed in each image file before it was resized.
    """

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    feature_index: Int32[np.ndarray, "T K"]
    feature_weights: Float32[np.ndarray, "T K"]
    pixel_values: UInt8[np.ndarray, "M 3 H W"]
    kinds: tuple[ImageKind, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleEncoder:
    """Encodes the text of a record as token ids and its images as pixels. Can be pickled.

    Attributes:
        tokenizer: Fast tokenizer of transformers.
        template: Conversation template: the text around the turns.
        transform: Transform that resizes and crops the images.
        frame_transform: Transform of the frames of videos; None if the model reads no videos.
        model: Sizes and token ids of the model.
        max_length: Maximum number of tokens in a sample; longer samples are truncated.
        max_images: Maximum number of images in a sample.
        max_frames: Maximum number of frames of a video that the model sees.
        max_text_length: Maximum number of tokens in a sample, counting each image as one token;
            longer samples are truncated. None sets no such limit.
        train_on: Which answers are learned; see `DataConfig.train_on`.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    transform: ImageTransform
    model: ModelConfig
    max_length: int
    max_images: int
    max_text_length: int | None = None
    train_on: TrainOn = "answers"
    frame_transform: ImageTransform | None = None
    max_frames: int = 32

    def __call__(self, record: Record) -> Sample:
        """Encodes the text, the images and the videos of a record.

        Raises:
            SampleError: The record cannot be used for training.
            ConfigError: The tokenizer lacks a control token of the template.
        """
        return self.add_images(record, self.encode_text(record))

    def encode_text(self, record: Record) -> Expanded:
        """Encodes the text of a record without decoding its images and videos.

        If images are cut into tiles, their headers are read, because the number of tokens depends
        on the size of an image. The number of frames of a video is read too.

        Raises:
            SampleError: The record cannot be used for training.
            ConfigError: The tokenizer lacks a control token of the template.
        """
        self._check_media(record)
        encoded = encode(
            record.turns,
            self.template,
            self.tokenizer,
            self.model.image_token_id,
            video_token_id=self.video_token_id,
            last_answer_only=self.train_on == "last_answer",
        )
        return self.expand(record, encoded, self.max_length, self.max_text_length)

    def expand(
        self,
        record: Record,
        encoded: Encoded,
        max_length: int | None = None,
        max_text_length: int | None = None,
    ) -> Expanded:
        """Replaces the token of each image or video of a record by the tokens of its features.

        Args:
            record: Record that was encoded.
            encoded: Its text, or the beginning of it, with one token for each image or video.
            max_length: Maximum number of tokens; see `expand_images`.
            max_text_length: Maximum number of tokens before the repetition.

        Raises:
            SampleError: The header of an image or video cannot be read, or truncation removed all
                learned tokens.
        """
        is_media = np.isin(encoded.input_ids, self.model.media_token_ids)
        tiled = is_tiled(self.model, len(record.images))
        sources = []
        for medium in self._in_order(record, encoded.input_ids[is_media].tolist()):
            if isinstance(medium, Video):
                frames = count_frames(medium, self.max_frames)
                sources.append(video_sources(self.model, frames))
            else:
                size = self.transform.find_size(medium) if tiled else None
                sources.append(image_sources(self.model, size))
        return expand_images(encoded, self.model, sources, max_length, max_text_length)

    @property
    def video_token_id(self) -> int | None:
        """Id of the token that represents a video; None if the model reads no videos."""
        return None if self.model.video is None else self.model.video.token_id

    def _in_order(self, record: Record, token_ids: Sequence[int]) -> list[str | bytes | Video]:
        """Returns the images and videos of a record in the order of their tokens."""
        images, videos = iter(record.images), iter(record.videos)
        return [next(videos if one == self.video_token_id else images) for one in token_ids]

    def add_images(self, record: Record, encoded: Expanded) -> Sample:
        """Returns the complete sample: the encoded text of a record, and the pixels.

        Raises:
            SampleError: An image or a video cannot be read.
        """
        size = self.transform.height, self.transform.width
        pixels = np.empty((sum(encoded.slots), 3, *size), np.uint8)
        slots = np.split(pixels, np.cumsum(encoded.slots)[:-1]) if encoded.slots else []
        kinds = []
        for medium, own in zip(self._in_order(record, encoded.media_ids), slots, strict=True):
            if isinstance(medium, Video):
                self._read_frames(medium, own)
            else:
                kinds.append(self.transform.read(medium, own))
        return Sample(
            encoded.input_ids,
            encoded.loss_mask,
            encoded.feature_index,
            encoded.feature_weights,
            pixels,
            tuple(kinds),
        )

    def _read_frames(self, video: Video, levels: UInt8[np.ndarray, "F 3 H W"]) -> None:
        """Decodes and resizes the frames of a video, and writes their pixels to an array."""
        transform = self.frame_transform
        assert transform is not None
        upright = transform.exif_orientation
        frames = iterate_frames(video, self.max_frames, exif_orientation=upright)
        for slot, frame in zip(levels, frames, strict=True):
            transform.write(frame, slot)

    def _check_media(self, record: Record) -> None:
        count = len(record.images)
        if count > self.max_images:
            raise SampleError(
                f"the sample has {count} images, but data.max_images is {self.max_images}; "
                "increase data.max_images",
                "number of images",
            )
        for name, media in (("image", record.images), ("video", record.videos)):
            placeholders = count_placeholders(record.turns, f"<{name}>")
            if placeholders != len(media):
                raise SampleError(
                    f"the human turns contain <{name}> {placeholders} times, but the sample has "
                    f"{len(media)} {name}s; write <{name}> once for each {name}",
                    f"number of {name}s",
                )
