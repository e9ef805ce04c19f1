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
    join_system_turns,
    split_at_images,
    tokenizing,
)
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import ImageTransform, Prepared
from llava_jax.data.tiles import image_sources, is_tiled
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.chat_templates import read_chat_template
from llava_jax.pretrained.image_processor import load_fitting_transform
from llava_jax.pretrained.limited_process import ProgramError
from llava_jax.pretrained.model_inputs import RowInputs
from llava_jax.pretrained.processor import end_tokens
from llava_jax.pretrained.rendering import ChatTemplate, Message
from llava_jax.pretrained.tokenizer import image_token_of, load_tokenizer

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        turns: Turns of the conversation; the last turn is human. Each `<image>` in a human turn
            stands for an image. System turns before the first human turn are joined with a blank
            line; the chat template must have a place for later system turns.
        images: Images in the order of the turns: paths or contents of image files, PIL images, or
            `Prepared` images from the reader's transform.
        continues: Whether the last turn is the beginning of the answer, which the model continues;
            the last turn is then a gpt turn.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | bytes | Image.Image | Prepared, ...] = ()
    continues: bool = False


class PromptReader:
    """Turns prompts into token ids and pixels.

    Args:
        tokenizer: Tokenizer of the model.
        transform: Transform that turns an image into pixels.
        chat_template: Chat template that renders a conversation.
        config: Sizes and token ids of the model.
        ends: Ids of the tokens that end an answer.

    Attributes:
        source: Directory or parts that the reader was opened for; None if it was not opened.
    """

    source: Path | Parts | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        transform: ImageTransform,
        chat_template: ChatTemplate,
        config: ModelConfig,
        ends: frozenset[int],
    ):
        self.tokenizer, self.transform, self.ends = tokenizer, transform, ends
        self._config, self._template = config, chat_template
        words = special_tokens(tokenizer).values()
        media = cast("list[str]", tokenizer.convert_ids_to_tokens([*config.media_token_ids]))
        special = sorted({*words, *media}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    @classmethod
    def open(
        cls, source: Path | Parts, config: ModelConfig, template: str | None = None
    ) -> "PromptReader":
        """Returns the reader for a checkpoint.

        Args:
            source: Directory or parts of the checkpoint.
            config: Sizes and token ids of the model.
            template: Name or file of the chat template, as in `read_chat_template`.

        Raises:
            CheckpointError: The tokenizer, the image processor or the chat template of the
                checkpoint cannot be used.
            ConfigError: There is no chat template with the given name.
        """
        tokenizer = load_tokenizer(source)
        transform = load_fitting_transform(source, config)
        image_token = image_token_of(tokenizer, config, source)
        found = read_chat_template(source, tokenizer, image_token, template)
        ends = end_tokens(source)
        end = None if found.made_from is None else end_token(found.made_from, tokenizer)
        reader = cls(tokenizer, transform, found, config, ends if end is None else ends | {end})
        reader.source = source
        try:
            reader(Prompt((Turn("human", "a"),)))
        except SampleError as error:
            raise CheckpointError(f"{format_source(source)}: {error}") from error
        return reader

    def __call__(self, prompt: Prompt, check: Callable[[int], None] | None = None) -> RowInputs:
        """Returns the token ids with images expanded, and the pixels of the images.

        Args:
            prompt: Conversation that waits for an answer.
            check: Function that is called with the number of tokens before any image is decoded.
                The function may raise an error.

        Raises:
            SampleError: The prompt cannot be used: for example, an image is broken, or the last
                turn has the wrong role.
        """
        image_count = count_placeholders(prompt.turns)
        if image_count != len(prompt.images):
            raise SampleError(
                f"the turns contain <image> {image_count} times, but the prompt has "
                f"{len(prompt.images)} images",
                "number of images",
            )
        text = self._render(prompt)
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
        if (ids == image).sum() != image_count:
            text = "the chat template does not write exactly one image token per image"
            raise SampleError(text, "template")
        tiled = self.is_tiled(prompt)
        sizes = [self._find_size(one) if tiled else None for one in prompt.images]
        sources = [image_sources(self._config, size) for size in sizes]
        encoded = Encoded(ids, np.zeros(len(ids), bool))
        text = expand_images(encoded, self._config, sources)
        if check is not None:
            check(len(text.input_ids))
        size = self._config.vision.image_size
        pixels = np.zeros((sum(text.slots), 3, size, size), np.float32)
        first = 0
        for picture, slots in zip(prompt.images, text.slots, strict=True):  # one at a time
            if not isinstance(picture, Prepared):
                picture = self.transform.prepare(picture, tiled=tiled)
            pixels[first : first + slots] = picture.pixels
            first += slots
        return RowInputs(text.input_ids, pixels, text.feature_index, text.feature_weights)

    def is_tiled(self, prompt: Prompt) -> bool:
        """Returns True if the images of a prompt are cut into tiles."""
        return is_tiled(self._config, len(prompt.images))

    def _find_size(self, image: str | bytes | Image.Image | Prepared) -> tuple[int, int]:
        """Returns the height and width of an image in pixels before it is resized."""
        if isinstance(image, Prepared):
            assert image.size is not None
            return image.size
        if isinstance(image, Image.Image):
            return self.transform.upright_size(image)
        return self.transform.find_size(image)

    def _render(self, prompt: Prompt) -> str:
        """Renders a conversation as text; removes text in turns that looks like a control token."""
        turns, wanted = prompt.turns, "gpt" if prompt.continues else "human"
        if not turns or turns[-1].role != wanted:
            raise SampleError(
                f"the last turn of a prompt must be a {wanted} turn", "order of turns"
            )
        try:
            "".join(turn.text for turn in turns).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            text = f"a turn is not valid Unicode: {half} is only half of a surrogate pair"
            raise SampleError(text, "text") from None
        try:
            messages = [Message(_ROLES[t.role], self._pieces(t)) for t in self._join_system(turns)]
            text = self._template.render(messages, continues=prompt.continues)
        except ProgramError as error:
            reason = f"the chat template cannot render the conversation: {error}"
            raise SampleError(reason, "template") from error
        # A template for stage 1 writes only images: it leaves out the question as well.
        has_question = _contains(text, messages[-1].pieces)
        is_lost = lambda one: one.role == "system" and not _contains(text, one.pieces)
        if has_question and any(map(is_lost, messages)):
            raise SampleError(
                "the chat template leaves out the system message; put its text into the first user "
                "message",
                "template",
            )
        return text

    def _join_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns, with all system turns before the first human turn as one turn.

        Raises:
            SampleError: There is a later system turn, and the chat template has no place for it.
        """
        if not self._template.takes_system_anywhere:
            return join_system_turns(turns)
        roles = [turn.role for turn in turns]
        first = roles.index("human") if "human" in roles else len(turns)
        return [*join_system_turns(turns[:first]), *turns[first:]]

    def _pieces(self, turn: Turn) -> list[str | None]:
        """Returns the texts of a turn in order, with None for each image.

        The template places one image, and images before all texts.
        """
        texts = [turn.text]
        if turn.role == "human":
            texts = turn.text.split(IMAGE_PLACEHOLDER)
            texts = _strip(texts) if len(texts) == 2 else split_at_images(turn.text)
        # When a control token is removed, the text around it may form a second control token. The
        # second token is replaced by a space, so that the text around it cannot form a third token.
        texts = [self._special.sub(" ", self._special.sub("", text)) for text in texts]
        if self._special.search("".join(texts)):  # the template may move the images between them
            texts = [f"{text} " for text in texts]
        pieces: list[str | None] = []
        for index, text in enumerate(texts):
            pieces += [*([None] if index else []), *([text] if text else [])]
        return pieces


def _strip(texts: list[str]) -> list[str]:
    """Removes white space at the start and the end of a turn, given its texts around one image."""
    before, after = texts[0].lstrip(), texts[1].rstrip()
    return [before if after else before.rstrip(), after if before else after.lstrip()]


def _contains(text: str, pieces: Sequence[str | None]) -> bool:
    """Returns True if a text contains the texts of a message, except white space around them."""
    return all(piece.strip() in text for piece in pieces if piece)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the control tokens by id: tokens with a role, such as BOS, and special tokens."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {number: str(token) for number, token in added if token.special}
