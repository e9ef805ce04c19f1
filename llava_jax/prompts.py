"""Conversations as a model's inputs, as its checkpoint's own files say."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jinja2
import jinja2.sandbox
import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ConfigError, ModelConfig, Parts
from llava_jax.data.conversation import (
    IMAGE_PLACEHOLDER,
    Encoded,
    SampleError,
    Turn,
    count_placeholders,
    end_token,
    expand_images,
)
from llava_jax.data.images import ImageTransform, open_image
from llava_jax.hf.processor import (
    end_tokens,
    load_fitting_transform,
    read_chat_template,
)
from llava_jax.hf.tokenizer import load_tokenizer

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        turns: The last is human. Every image is an `<image>` in a human turn.
        images: Image files (paths, or what is in them) or pictures, in their order.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | bytes | Image.Image, ...] = ()


class PromptReader:
    """Turns prompts into tokens and pixels, as the checkpoint's own files say.

    Args:
        tokenizer: The checkpoint's.
        transform: What happens to an image.
        chat_template: Jinja that renders a conversation.
        config: Of the model.
        ends: Tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        transform: ImageTransform,
        chat_template: str,
        config: ModelConfig,
        ends: frozenset[int],
    ):
        self.tokenizer, self.transform, self.ends = tokenizer, transform, ends
        self._config = config
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
        try:
            self._template = environment.from_string(chat_template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the checkpoint's chat template is amiss: {error}") from error
        self._image_token = image_token_of(tokenizer, config)
        special = sorted({*tokenizer.all_special_tokens, self._image_token}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    @classmethod
    def open(cls, place: Path | Parts, config: ModelConfig) -> "PromptReader":
        """That of a checkpoint.

        Raises:
            CheckpointError: Its tokenizer or image processor cannot be used.
        """
        tokenizer = load_tokenizer(place)
        transform = load_fitting_transform(place, config)
        text, template = read_chat_template(place, tokenizer, image_token_of(tokenizer, config))
        ends = end_tokens(place)
        end = None if template is None else end_token(template, tokenizer)
        return cls(tokenizer, transform, text, config, ends if end is None else ends | {end})

    def __call__(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [T], images expanded, and pixels float32 [I, 3, H, W].

        Raises:
            SampleError: The prompt cannot be used.
        """
        asked = count_placeholders(prompt.turns)
        if asked != len(prompt.images):
            raise SampleError(
                f"the turns say <image> {asked} times, and there are {len(prompt.images)} images",
                "number of images",
            )
        text = self._render(prompt.turns)
        bos = cast("str | None", self.tokenizer.bos_token)
        has_bos = bool(bos) and text.startswith(bos)
        ids = np.array(self.tokenizer(text, add_special_tokens=not has_bos).input_ids, np.int32)
        image = self._config.image_token_id
        if (ids == image).sum() != asked:
            raise SampleError("the chat template does not give every image a token", "template")
        encoded = Encoded(ids, np.zeros(len(ids), bool))
        ids = expand_images(encoded, image, self._config.image_tokens).input_ids
        opened = [x if isinstance(x, Image.Image) else open_image(x) for x in prompt.images]
        size = self._config.vision.image_size
        pixels = np.zeros((len(opened), 3, size, size), np.float32)
        for slot, picture in zip(pixels, opened, strict=True):
            slot[:] = self.transform(picture)
        return ids, pixels

    def _render(self, turns: Sequence[Turn]) -> str:
        """The conversation as text; what in its turns looks like a control token is taken out."""
        if not turns or turns[-1].role != "human":
            raise SampleError("a prompt ends with a human turn", "order of turns")
        messages = [{"role": _ROLES[turn.role], "content": self._parts(turn)} for turn in turns]

        def refuse(message: str) -> None:
            raise SampleError(f"the chat template refuses the conversation: {message}", "template")

        tokenizer = self.tokenizer
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                raise_exception=refuse,
                bos_token=tokenizer.bos_token or "",
                eos_token=tokenizer.eos_token or "",
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise SampleError(f"the chat template cannot render it: {error}", "template") from error

    def _parts(self, turn: Turn) -> list[dict[str, str]]:
        text, images = turn.text, 0
        if turn.role == "human" and (images := text.count(IMAGE_PLACEHOLDER)):
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        # What is left may join to another; the space keeps that apart.
        text = self._special.sub(" ", self._special.sub("", text))
        return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def image_token_of(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> str:
    """What stands for an image in a conversation's text."""
    return cast("str", tokenizer.convert_ids_to_tokens(config.image_token_id))
