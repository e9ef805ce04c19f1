"""Turns conversations into model inputs, with the tokenizer and the templates of a checkpoint."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.data.conversation import (
    IMAGE_PLACEHOLDER,
    Encoded,
    SampleError,
    Turn,
    count_placeholders,
    end_token,
    tokenizing,
)
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import ImageTransform, open_image
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.image_processor import load_fitting_transform
from llava_jax.pretrained.limited_process import LimitedProcess, ProgramError
from llava_jax.pretrained.processor import end_tokens, read_chat_template
from llava_jax.pretrained.tokenizer import image_token_of, load_tokenizer

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        turns: Turns of the conversation; the last turn is human. Each `<image>` in a human turn
            stands for an image.
        images: Images in the order of the turns: paths or contents of image files, PIL images, or
            pixels float32 [3, H, W] from the reader's transform.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | bytes | Image.Image | np.ndarray, ...] = ()


class PromptReader:
    """Turns prompts into token ids and pixels.

    Args:
        tokenizer: Tokenizer of the model.
        transform: Transform that turns an image into pixels.
        chat_template: Jinja template that renders a conversation.
        config: Sizes and token ids of the model.
        ends: Ids of the tokens that end an answer.
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
        self._chat_template, self._process = chat_template, LimitedProcess()
        words = special_tokens(tokenizer).values()
        image_token = cast("str", tokenizer.convert_ids_to_tokens(config.image_token_id))
        special = sorted({*words, image_token}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    @classmethod
    def open(cls, source: Path | Parts, config: ModelConfig) -> "PromptReader":
        """Returns the reader for a checkpoint.

        Args:
            source: Directory or parts of the checkpoint.
            config: Sizes and token ids of the model.

        Raises:
            CheckpointError: The tokenizer, the image processor or the chat template of the
                checkpoint cannot be used.
        """
        tokenizer = load_tokenizer(source)
        transform = load_fitting_transform(source, config)
        image_token = image_token_of(tokenizer, config, source)
        text, template = read_chat_template(source, tokenizer, image_token)
        ends = end_tokens(source)
        end = None if template is None else end_token(template, tokenizer)
        reader = cls(tokenizer, transform, text, config, ends if end is None else ends | {end})
        try:
            reader(Prompt((Turn("human", "a"),)))
        except SampleError as error:
            raise CheckpointError(f"{format_source(source)}: {error}") from error
        return reader

    def __call__(
        self, prompt: Prompt, check: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids int32 [T] with images expanded, and pixels float32 [I, 3, H, W].

        Args:
            prompt: Conversation that waits for an answer.
            check: Function that is called with the number of tokens before any image is opened. The
                function may raise an error.

        Raises:
            SampleError: The prompt cannot be used: for example, an image is broken, or the last
                turn is not human.
        """
        asked = count_placeholders(prompt.turns)
        if asked != len(prompt.images):
            raise SampleError(
                f"the turns contain <image> {asked} times, but the prompt has "
                f"{len(prompt.images)} images",
                "number of images",
            )
        text = self._render(prompt.turns)
        bos = cast("str | None", self.tokenizer.bos_token)
        has_bos = bool(bos) and text.startswith(bos)
        with tokenizing():
            found = self.tokenizer(text, add_special_tokens=not has_bos).input_ids
        if max(found, default=0) >= self._config.llm.vocab_size:
            raise SampleError(
                "the tokenizer returns token ids that the model does not have", "tokenizer"
            )
        ids = np.array(found, np.int32)
        image = self._config.image_token_id
        if (ids == image).sum() != asked:
            text = "the chat template does not write exactly one image token per image"
            raise SampleError(text, "template")
        encoded = Encoded(ids, np.zeros(len(ids), bool))
        ids = expand_images(encoded, image, self._config.image_tokens).input_ids
        if check is not None:
            check(len(ids))
        size = self._config.vision.image_size
        pixels = np.zeros((asked, 3, size, size), np.float32)
        for slot, picture in zip(pixels, prompt.images, strict=True):  # one at a time saves memory
            if isinstance(picture, str | bytes):
                picture = open_image(picture, exif_orientation=self.transform.exif_orientation)
            slot[:] = picture if isinstance(picture, np.ndarray) else self.transform(picture)
        return ids, pixels

    def _render(self, turns: Sequence[Turn]) -> str:
        """Renders a conversation as text; removes text in turns that looks like a control token."""
        if not turns or turns[-1].role != "human":
            raise SampleError("the last turn of a prompt must be a human turn", "order of turns")
        try:
            "".join(turn.text for turn in turns).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            text = f"a turn is not valid Unicode: {half} is only half of a surrogate pair"
            raise SampleError(text, "text") from None
        messages = [{"role": _ROLES[turn.role], "content": self._parts(turn)} for turn in turns]
        try:
            return self._process(
                "render",
                template=self._chat_template,
                messages=messages,
                variables={**self.tokenizer.special_tokens_map},
            )
        except ProgramError as error:
            reason = f"the chat template cannot render the conversation: {error}"
            raise SampleError(reason, "template") from error

    def _parts(self, turn: Turn) -> list[dict[str, str]]:
        """Returns the content of a turn in the form for chat templates: images first, then text."""
        text, images = turn.text, 0
        if turn.role == "human" and (images := text.count(IMAGE_PLACEHOLDER)):
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        # When a control token is removed, the text around it may form a second control token. The
        # second token is replaced by a space, so that the text around it cannot form a third token.
        text = self._special.sub(" ", self._special.sub("", text))
        return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the control tokens by id: tokens with a role, such as BOS, and special tokens."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {number: str(token) for number, token in added if token.special}
