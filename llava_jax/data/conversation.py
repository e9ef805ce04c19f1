"""Conversations as token ids, with a mask of the tokens to learn.

A template is data: the text around the turns. A conversation is rendered to pieces, each a stretch
of text or one control token (an image, an end of sequence). The text between two control tokens is
tokenised as one string, and character offsets tell which of its tokens belong to an answer, so the
mask cannot drift from the ids.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llava_jax.data.templates import SYSTEM_SLOT, TEMPLATES, Template
from llava_jax.errors import ConfigError
from llava_jax.errors import SampleError as SampleError

IMAGE_PLACEHOLDER = "<image>"


@contextmanager
def tokenizing() -> Iterator[None]:
    """Makes a fault inside the tokenizers library an error of the sample, as others are.

    It is no `Exception` there: a pattern of a hostile tokenizer, for example, that gives up on a
    text.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise SampleError(f"the tokenizer fails at the text: {error}", "tokenizer") from error


class Turn(NamedTuple):
    """What one side says; `system` may speak once, before all others."""

    role: Literal["system", "human", "gpt"]
    text: str


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: Token ids.
        loss_mask: True where the token is to be learned: answers and what ends them.
        cut: Tokens that followed and were cut off.
    """

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    cut: int = 0


class _Piece(NamedTuple):
    """A stretch of text, or one control token when `token` is set."""

    text: str
    token: int | None
    learned: bool


def encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
) -> Encoded:
    """Encodes a conversation to learn from, one token for each image.

    Every `<image>` in a human turn stands for an image. The images of a turn move to its front, in
    their order, each followed by the template's `image_suffix`. A leading gpt turn is dropped.
    Nothing else in the turns is read as a control token.

    Args:
        turns: The conversation; human and gpt speak in turn, perhaps after a system turn, which
            replaces the template's own system text.
        template: The text around the turns.
        tokenizer: A fast tokenizer.
        image_token_id: The token that stands for an image.

    Raises:
        SampleError: The turns do not alternate, an answer is empty, or there is none.
        ConfigError: The tokenizer lacks a control token of the template.
    """
    pieces = _render(turns, template, tokenizer, image_token_id)
    encoded = _tokenize(pieces, tokenizer, image_token_id)
    if not encoded.loss_mask.any():
        raise SampleError("the conversation has no answer to learn from", "no answer")
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
) -> Encoded:
    """Encodes a conversation that ends with a human turn, up to where its answer starts.

    The ids are those that `encode` gives before its answer's first learned token.

    Raises:
        SampleError: The turns do not alternate, or the last is not human.
        ConfigError: The tokenizer lacks a control token of the template.
    """
    if not turns or turns[-1].role != "human":
        raise SampleError("a prompt ends with a human turn")
    pieces = _render(turns, template, tokenizer, image_token_id)
    pieces += _parse(template.answer_prefix.rstrip(" "), tokenizer)
    return _tokenize(pieces, tokenizer, image_token_id)


def expand_images(
    encoded: Encoded,
    image_token_id: int,
    image_tokens: int,
    max_length: int | None = None,
    max_text_length: int | None = None,
) -> Encoded:
    """Repeats each image token as often as the image has features, and cuts what is too long.

    An image that would be cut in two is left out, with all that follows it.

    Args:
        encoded: One token for each image.
        image_token_id: The token that stands for an image.
        image_tokens: Features of an image.
        max_length: Most tokens to keep; None keeps all.
        max_text_length: Most tokens to keep of those before the repetition, where an image is one;
            None keeps all.

    Raises:
        SampleError: The cut leaves nothing to learn of what there was.
    """
    is_image = encoded.input_ids == image_token_id
    widths = np.where(is_image, image_tokens, 1)
    ends = np.cumsum(widths)
    length = int(widths.sum())
    if max_length is not None:
        widths = widths[: np.searchsorted(ends, max_length, side="right")]
    widths = widths[:max_text_length]
    input_ids = np.repeat(encoded.input_ids[: len(widths)], widths)
    loss_mask = np.repeat(encoded.loss_mask[: len(widths)], widths)
    if encoded.loss_mask.any() and not loss_mask.any():
        limit = "data.max_length" + ("" if max_text_length is None else " or max_text_length")
        raise SampleError(
            f"its {length} tokens are cut to {len(input_ids)}, and no answer is left to learn "
            f"from; raise {limit}",
            "no answer after the cut",
        )
    return Encoded(input_ids, loss_mask, length - len(input_ids))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts a `bos` before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and cast("list[int]", tokenizer("").input_ids)[:1] == [bos]


def end_token(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that ends an answer; None where text does.

    Raises:
        ConfigError: The tokenizer lacks it.
    """
    pieces = _parse(template.answer_suffix, tokenizer)
    return next((piece.token for piece in pieces if piece.token is not None), None)


def count_placeholders(turns: Sequence[Turn]) -> int:
    """Counts the images that the human turns ask for."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")


def _render(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, image_id: int
) -> list[_Piece]:
    system, turns = _split_system(turns, template)
    pieces = _parse(template.begin, tokenizer)
    for index, turn in enumerate(turns):
        if turn.role == "human":
            pieces += _render_human_prefix("" if index else system, template, tokenizer)
            pieces += _render_question(turn.text, template, tokenizer, image_id)
        else:
            if not turn.text.strip():
                raise SampleError(f"answer {index // 2 + 1} is empty", "empty answer")
            prefix = template.answer_prefix.rstrip(" ")
            space = template.answer_prefix[len(prefix) :]
            pieces += _parse(prefix, tokenizer)
            pieces.append(_Piece(space + turn.text, None, learned=True))
            pieces += _parse(template.answer_suffix, tokenizer, learned=True)
            pieces += _parse(template.separator, tokenizer)
    return pieces


def _render_human_prefix(
    system: str, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[_Piece]:
    before, slot, after = template.human_prefix.partition(SYSTEM_SLOT)
    pieces = _parse(before, tokenizer)
    if slot and system:
        pieces += _parse(template.system_prefix, tokenizer)
        pieces.append(_Piece(system, None, learned=False))
        pieces += _parse(template.system_suffix, tokenizer)
    return pieces + _parse(after, tokenizer)


def _render_question(
    text: str, template: Template, tokenizer: PreTrainedTokenizerBase, image_id: int
) -> list[_Piece]:
    images = text.count(IMAGE_PLACEHOLDER)
    if images:
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    if not template.keeps_questions:
        text = ""
    suffix = _parse(template.image_suffix, tokenizer) if text else []
    image = [_Piece("", image_id, learned=False), *suffix]
    return image * images + [_Piece(text, None, learned=False)]


def _split_system(turns: Sequence[Turn], template: Template) -> tuple[str, Sequence[Turn]]:
    """What the system says, and the turns of human and gpt, which begin with a human's."""
    system = template.system
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if turns and turns[0].role == "gpt":
        turns = turns[1:]
    for index, turn in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            raise SampleError(
                f"human and gpt do not speak in turn: expected {expected}, found {turn.role} "
                f"saying {turn.text[:40]!r}",
                "order of turns",
            )
    return system, turns


def _parse(text: str, tokenizer: PreTrainedTokenizerBase, *, learned: bool = False) -> list[_Piece]:
    """Splits the text of a template at its control tokens."""
    pieces = []
    for index, part in enumerate(re.split(r"\{([^{}]+)\}", text)):
        if index % 2 == 0:
            pieces.append(_Piece(part, None, learned))
        elif (token := _control_token(part, tokenizer)) is not None:
            pieces.append(_Piece("", token, learned))
    return [piece for piece in pieces if piece.text or piece.token is not None]


def _control_token(name: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    if name in ("bos", "bos?"):
        token = cast("int | None", tokenizer.bos_token_id)
        return token if name == "bos" or adds_bos(tokenizer) else None
    if name == "eos":
        token = tokenizer.eos_token_id
    else:
        token = tokenizer.convert_tokens_to_ids(name)
        token = None if token == tokenizer.unk_token_id else token
    if token is None:
        raise ConfigError(
            f"data.template needs the control token {name!r}, which the tokenizer lacks; "
            f"choose another of {', '.join(TEMPLATES)}"
        )
    return cast("int", token)


def _tokenize(
    pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerBase, image_id: int
) -> Encoded:
    """Tokenises what lies between two control tokens as one string."""
    # The core itself: a call of transformers' takes as long again around it. It keeps the settings
    # of other calls.
    core = cast("Tokenizer", tokenizer.backend_tokenizer)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # a control token's name in a text is only text
    ids: list[int] = []
    mask: list[bool] = []
    for is_text, pieces_alike in itertools.groupby(pieces, key=lambda piece: piece.token is None):
        group = [*pieces_alike]
        if is_text:
            run_ids, run_mask = _tokenize_run(group, core)
            if image_id in run_ids:
                raise SampleError(f"text other than a placeholder gives the image token {image_id}")
            ids += run_ids
            mask += run_mask
        else:
            ids += [cast("int", piece.token) for piece in group]
            mask += [piece.learned for piece in group]
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


def _tokenize_run(run: Sequence[_Piece], core: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokenises it as one string; a token with a learned character is learned."""
    with tokenizing():
        found = core.encode("".join(piece.text for piece in run), add_special_tokens=False)
    learned_characters = b"".join(bytes([piece.learned]) * len(piece.text) for piece in run)
    # A token may cover no character (a leading-space token, for one): it goes with the next.
    spans = (slice(start, max(end, start + 1)) for start, end in found.offsets)
    return found.ids, [any(learned_characters[span]) for span in spans]
