"""Writes the log probabilities of tokens in the format of OpenAI's API."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llava_jax.disk import Json
from llava_jax.generation.engine import Likely

LOWEST = -9999.0
"""Log probability of a token whose probability is 0, as in OpenAI's API. JSON has no infinity."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # the names of SentencePiece's byte tokens


class TokenWriter:
    """Writes tokens with their log probabilities.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Tokenizers remove the space before the first token of a text. A token is decoded after
        # this token, so that its space stays.
        self._lead: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        self._length = len(self._decode([]))
        self._known: dict[int, Json] = {}

    def content(self, tokens: Sequence[int], scores: Sequence[Likely], count: int) -> list[Json]:
        """Returns the items of `logprobs.content`.

        Args:
            tokens: Ids of the tokens.
            scores: Log probabilities of the tokens.
            count: Number of the most likely tokens to add to each token.
        """
        return [
            self._item(token, score.logprob)
            | {"top_logprobs": [self._item(*pair) for pair in score.alternatives[:count]]}
            for token, score in zip(tokens, scores, strict=True)
        ]

    def _item(self, token: int, logprob: float) -> Json:
        if token not in self._known:
            self._known[token] = self._describe(token)
        return self._known[token] | {"logprob": max(logprob, LOWEST)}

    def _describe(self, token: int) -> Json:
        """Returns the text and the bytes of a token; the bytes are None if they are not known."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := _BYTE.fullmatch(name):
            byte = int(found[1], 16)
            return {"token": chr(byte) if byte < 128 else name, "bytes": [byte]}
        text = self._decode([token])[self._length :]
        is_part = "\ufffd" in text  # of a character, whose bytes a byte-level tokenizer hides
        return {"token": text, "bytes": None if is_part else list(text.encode())}

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([*self._lead, *tokens], skip_special_tokens=False))
