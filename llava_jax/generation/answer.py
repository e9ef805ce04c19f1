"""Turns the generated tokens of an answer into text, while the answer is generated."""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import Literal

from transformers import PreTrainedTokenizerBase

from llava_jax.generation.engine import Request
from llava_jax.generation.prompts import special_tokens

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # the names of SentencePiece's byte tokens
_CONTEXT = 8  # tokens of the prompt that are decoded together with an answer that continues it


@dataclasses.dataclass(frozen=True)
class Reply:
    """A complete answer.

    Attributes:
        text: Text of the answer, without white space at its start and end. If the answer continues
            a text, white space at its start is kept.
        ending: "stop" if the model or a stop string ended the answer, "length" if the answer
            reached its largest length.
        prompt_tokens: Number of tokens of the prompt, with images expanded.
        new_tokens: Number of tokens of the answer.
    """

    text: str
    ending: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


class Answer:
    """An answer that is being generated.

    Args:
        request: Request for which the tokens are generated.
        tokenizer: Tokenizer of the model.
        stop: Texts that end the answer and are not part of it.
        continues: Whether the answer continues the text at the end of the prompt. Otherwise, white
            space at the start of the answer is removed.

    Attributes:
        request: Request for which the tokens are generated.
        text: Text generated so far, without the part at its end that may still change: an
            incomplete character, or the beginning of a stop string.
        shown: Number of tokens whose text is in `text`, without the token that ends the answer.
        ending: "stop" or "length", as in `Reply`; None while the answer is being generated.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        continues: bool = False,
    ):
        self.request = request
        self.text, self.shown = "", 0
        self.ending: Literal["stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._stop = tuple(filter(None, stop))
        # Tokenizers remove a space before the first token of a text. The tokens before the answer
        # show whether there is a space between them and the answer.
        self._before = request.input_ids[-_CONTEXT:].tolist() if continues else []

    def update(self) -> None:
        """Sets `text`, `shown` and `ending` from the tokens that were generated so far."""
        tokens = self.request.tokens
        text = self._decode(len(tokens))
        # The text of the last call contains no complete stop string, but its end may be the
        # beginning of a stop string. So the search for a stop string starts before the end of the
        # old text, by the length of the stop string.
        found = [
            position
            for word in self._stop
            if (position := text.find(word, max(0, len(self.text) - len(word)))) >= 0
        ]
        self.ending = "stop" if found else self.request.ending
        if found:
            self.text = text[: min(found)]
        elif self.ending:
            self.text = text
        else:
            self.text = text[: len(text) - self._uncertain(text)]
        if self.ending or len(self.text) == len(text):
            self.shown = self._count_shown(is_cut=bool(found))

    def _decode(self, count: int) -> str:
        """Returns the text of the first `count` tokens."""
        decode = partial(self._tokenizer.decode, skip_special_tokens=True)
        text = str(decode([*self._before, *self.request.tokens[:count]]))
        return text[len(str(decode(self._before))) :] if self._before else text.lstrip()

    def _count_shown(self, *, is_cut: bool) -> int:
        """Counts the tokens of `text`; if a stop string cut it, those that begin before its end."""
        tokens = self.request.tokens
        count = len(tokens) - (bool(tokens) and tokens[-1] in self.request.ends)
        while is_cut and count and len(self._decode(count - 1)) >= len(self.text):
            count -= 1
        return count

    def _uncertain(self, text: str) -> int:
        """Counts the last characters of a text that may still change or begin a stop string."""
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        # SentencePiece decodes adjacent byte tokens together: one invalid byte turns the characters
        # of all these tokens into replacement characters.
        if count := self._newest_bytes():
            before = self._decode(len(self.request.tokens) - count)
            unfinished = max(unfinished, len(text) - len(before))
        begun = [
            size
            for word in self._stop
            for size in range(1, min(len(word), len(text) + 1))
            if text.endswith(word[:size])
        ]
        return max([unfinished, *begun])

    def _newest_bytes(self) -> int:
        """Counts the byte tokens, and special tokens without text, at the end of the answer."""
        for count, token in enumerate(reversed(self.request.tokens)):
            name = self._tokenizer.convert_ids_to_tokens(token)  # None if unknown
            if name and token not in self._special and not _BYTE.fullmatch(str(name)):
                return count
        return len(self.request.tokens)

    @property
    def reply(self) -> Reply:
        """Returns the complete answer. The answer must have ended."""
        return Reply(
            self.text.rstrip(),
            self.ending or "length",
            len(self.request.input_ids),
            len(self.request.tokens),
        )
