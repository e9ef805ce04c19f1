"""Renders conversations with chat templates, in the form of content that each template takes."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.data.templates import Template
from llava_jax.pretrained.limited_process import LimitedProcess, LimitError, ProgramError


class Message(NamedTuple):
    """A message for a chat template.

    Attributes:
        role: "system", "user" or "assistant".
        pieces: Texts of the message in order; None stands for an image.
    """

    role: str
    pieces: Sequence[str | None]


class ChatTemplate:
    """A chat template that renders conversations in a separate process with limits.

    Chat templates differ in the form of a message's content: some take a list of image parts and
    text parts, others take a text that contains image tokens. Some write the images of a message
    before its text, others write them in their places. The template itself shows what it does, by
    rendering short conversations.

    Args:
        text: Jinja source of the template.
        tokenizer: Tokenizer whose special tokens are variables of the template.
        image_token: Text of the image token.
        made_from: Template from which `text` was made; None for a template of a checkpoint.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        made_from: Template | None = None,
    ):
        self.text, self.made_from = text, made_from
        self._image, self._variables = image_token, {**tokenizer.special_tokens_map}
        self._process = LimitedProcess()

    def render(self, messages: Sequence[Message], *, continues: bool = False) -> str:
        """Renders a conversation as the text of a prompt.

        Args:
            messages: Messages of the conversation.
            continues: Whether the prompt ends with the text of the last message, so that the model
                continues this message. Otherwise, the prompt ends with the start of an answer.

        Raises:
            ProgramError: The template fails or exceeds a limit.
        """
        contents = [
            self._content(message.pieces, parts=not self._takes_text) for message in messages
        ]
        return self._render([message.role for message in messages], contents, continues=continues)

    @property
    def takes_images(self) -> bool:
        """Whether the template writes an image token for the image of a message."""
        try:
            return self._takes_parts or self._takes_text
        except LimitError:
            return False

    @cached_property
    def takes_system_anywhere(self) -> bool:
        """Whether the template writes a later system message in its place."""
        roles = ("user", "assistant", "system", "user")
        return self._writes(roles, [["Zqa"], ["Zqb"], ["Zqc"], ["Zqd"]], parts=not self._takes_text)

    @cached_property
    def _takes_parts(self) -> bool:
        return self._writes(["user"], [[None, "Zqa"]], parts=True)

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template takes only texts with image tokens as the content of a message."""
        return not self._takes_parts and self._writes(["user"], [[None, "Zqa"]], parts=False)

    @cached_property
    def _keeps_order(self) -> bool:
        pieces = ["Zqa", None, "Zqb", None]
        return self._render_order(["user"], [self._as_parts(pieces)]) == pieces

    def _writes(
        self, roles: Sequence[str], messages: Sequence[Sequence[str | None]], *, parts: bool
    ) -> bool:
        """Returns True if the template writes all texts in order, and all images.

        Args:
            roles: Role of each message.
            messages: Pieces of each message; the texts are among Zqa, Zqb, Zqc and Zqd.
            parts: Whether the content of a message is a list of parts.
        """
        order = self._render_order(roles, [self._content(m, parts=parts) for m in messages])
        pieces = [piece for message in messages for piece in message]
        without = lambda found: [piece for piece in found if piece is not None]
        return without(order) == without(pieces) and order.count(None) == pieces.count(None)

    def _render_order(
        self, roles: Sequence[str], contents: Sequence[str | list[dict[str, str]]]
    ) -> list[str | None]:
        """Renders messages, and returns their texts and images in the order of the result.

        Raises:
            LimitError: The template exceeds a limit.
        """
        try:
            text = self._render(roles, contents, continues=False)
        except LimitError:
            raise
        except ProgramError:
            return []
        found = re.findall(rf"Zq[abcd]|{re.escape(self._image)}", text)
        return [None if piece == self._image else piece for piece in found]

    def _content(self, pieces: Sequence[str | None], *, parts: bool) -> str | list[dict[str, str]]:
        """Returns the content of a message in the form that the template takes.

        One image, and images before all texts, are placed by the template. Several images among the
        texts stay in their places, so they become image tokens in the text if the template would
        move them.
        """
        images = pieces.count(None)
        texts = "".join(piece for piece in pieces if piece is not None)
        moves = images < 2 or all(piece is None for piece in pieces[:images])
        in_place = "".join(self._image if piece is None else piece for piece in pieces)
        if not parts:
            return self._image_lines(images, texts) if moves else in_place
        if not moves and not self._keeps_order:
            return self._as_parts([in_place])
        return self._as_parts(pieces if texts else [*pieces, ""])

    def _image_lines(self, images: int, text: str) -> str:
        return "\n".join([*[self._image] * images, *([text] if text or not images else [])])

    def _as_parts(self, pieces: Sequence[str | None]) -> list[dict[str, str]]:
        part = lambda piece: {"type": "text", "text": piece}
        return [{"type": "image"} if piece is None else part(piece) for piece in pieces]

    def _render(
        self,
        roles: Sequence[str],
        contents: Sequence[str | list[dict[str, str]]],
        *,
        continues: bool,
    ) -> str:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        return self._process(
            "render",
            template=self.text,
            messages=messages,
            variables=self._variables,
            continues=continues,
        )
