"""Encodes conversations as token ids, with a mask of the tokens that are learned.

A template contains only the texts around the turns, and no code. A conversation is rendered to a
list of pieces. Each piece is a text or one control token, such as an image token or an
end-of-sequence token. The text between two control tokens is tokenized as one string. The character
offsets of the tokens then show which tokens belong to an answer, so that the mask always matches
the token ids.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llava_jax.data.templates import SYSTEM_SLOT, TEMPLATES, Template
from llava_jax.errors import ConfigError, SampleError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@contextmanager
def tokenizing() -> Iterator[None]:
    """Converts a panic of the tokenizers library into a SampleError.

    The panic, an error of the library's Rust code, is a BaseException but not an Exception. It
    occurs, for example, if a regular expression of a malicious tokenizer exceeds its limits.

    Raises:
        SampleError: The code inside the context panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise SampleError(f"the tokenizer cannot process the text: {error}", "tokenizer") from error


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: Speaker of the turn.
        text: Text that the speaker says.
        learned: Whether the text is learned if it is an answer.
    """

    role: Literal["system", "human", "gpt"]
    text: str
    learned: bool = True

    def __repr__(self) -> str:
        # Digests of data and of questions contain this text, so that it must not change.
        learned = "" if self.learned else ", learned=False"
        return f"Turn(role={self.role!r}, text={self.text!r}{learned})"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation of T tokens.

    Attributes:
        input_ids: int32 [T]. Token ids.
        loss_mask: bool [T]. True for tokens that are learned: the tokens of the answers, and the
            tokens that end the answers.
        cut: Number of tokens that truncation removed from the end.
    """

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    cut: int = 0


class _Piece(NamedTuple):
    """A text, or one control token if `token` is not None."""

    text: str
    token: int | None
    learned: bool


def encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    *,
    video_token_id: int | None = None,
    last_answer_only: bool = False,
) -> Encoded:
    """Encodes a conversation for training, with one token for each image and each video.

    Each `<image>` in a human turn is the placeholder of an image, and each `<video>` that of a
    video; `split_at_media` says where they are. All other text in the turns is encoded as plain
    text, even if it looks like a control token.

    Args:
        turns: Conversation in which human and gpt turns alternate. System turns before the first
            human turn replace the system text of the template. Turns without a question or
            without an answer are left out; see `select_turns`.
        template: Conversation template: the text around the turns.
        tokenizer: Fast tokenizer of transformers.
        image_token_id: Id of the token that represents an image.
        video_token_id: Id of the token that represents a video; None if the model reads no videos.
        last_answer_only: Whether only the last answer is learned, and not the earlier ones.

    Raises:
        SampleError: The turns do not alternate, a system turn follows a human turn, an answer is
            empty, there is no answer to learn, or the model cannot read a video.
        ConfigError: The tokenizer lacks a control token of the template.
    """
    turns = select_turns(turns)
    if last_answer_only:
        turns = [turn._replace(learned=turn.learned and turn is turns[-1]) for turn in turns]
    tokens = _media_tokens(turns, image_token_id, video_token_id)
    encoded = _tokenize(_render(turns, template, tokenizer, tokens), tokenizer, tokens)
    if not encoded.loss_mask.any():
        raise SampleError("the conversation has no answer to learn from", "no answer")
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    *,
    video_token_id: int | None = None,
) -> Encoded:
    """Encodes a conversation that ends with a human turn, up to the start of the next answer.

    The token ids are the same as the ids that `encode` returns before the first learned token of
    this answer.

    Args:
        turns: Conversation in which human and gpt turns alternate, as in `encode`.
        template: Conversation template: the text around the turns.
        tokenizer: Fast tokenizer of transformers.
        image_token_id: Id of the token that represents an image.
        video_token_id: Id of the token that represents a video; None if the model reads no videos.

    Raises:
        SampleError: The turns do not alternate, the last turn is not a human turn, or the model
            cannot read a video.
        ConfigError: The tokenizer lacks a control token of the template.
    """
    if not turns or turns[-1].role != "human":
        raise SampleError("a prompt must be a conversation that ends with a human turn")
    turns = select_turns(turns, keep_question=True)
    tokens = _media_tokens(turns, image_token_id, video_token_id)
    pieces = _render(turns, template, tokenizer, tokens)
    pieces += _parse(template.answer_prefix.rstrip(" "), tokenizer)
    return _tokenize(pieces, tokenizer, tokens)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns True if the tokenizer itself puts a BOS token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and cast("list[int]", tokenizer("").input_ids)[:1] == [bos]


def end_token(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of the control token that ends an answer; None if plain text ends it.

    Raises:
        ConfigError: The tokenizer lacks a control token of the template.
    """
    pieces = _parse(template.answer_suffix, tokenizer)
    return next((piece.token for piece in pieces if piece.token is not None), None)


def join_system_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Joins all system turns into one turn, which comes first.

    Training and serving use the same rule. The texts are separated by blank lines.

    Args:
        turns: Turns of a conversation.

    Raises:
        SampleError: A system turn follows a human turn, where the templates have no place for it.
    """
    systems = [turn.text for turn in turns if turn.role == "system"]
    if not systems or (len(systems) == 1 and turns[0].role == "system"):
        return [*turns]
    others = [turn for turn in turns if turn.role != "system"]
    first = next((index for index, turn in enumerate(turns) if turn.role == "human"), len(turns))
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > first:
            raise SampleError(
                f"turn {index} is a system message after the first question: {turn.text[:40]!r}; "
                "only system messages before the first question are supported, so move or remove "
                "it",
                "order of turns",
            )
    return [Turn("system", "\n\n".join(filter(None, systems))), *others]


def select_turns(turns: Sequence[Turn], *, keep_question: bool = False) -> list[Turn]:
    """Returns the turns of a conversation that are used, with one system turn at most.

    Answers at the start, which have no question, are left out, as in LLaVA's own code. Questions at
    the end, which have no answer, are left out too.

    Args:
        turns: Turns of a conversation.
        keep_question: Whether to keep questions at the end, which is right for a prompt.

    Raises:
        SampleError: A system turn follows a human turn.
    """
    turns = join_system_turns(turns)
    system = [turn for turn in turns[:1] if turn.role == "system"]
    spoken = turns[len(system) :]
    while spoken and spoken[0].role == "gpt":
        spoken.pop(0)
    while spoken and spoken[-1].role == "human" and not keep_question:
        spoken.pop()
    return system + spoken


def split_at_images(text: str) -> list[str]:
    """Splits the text of a human turn at its images; see `split_at_media`."""
    return split_at_media(text, (IMAGE_PLACEHOLDER,))[0]


def split_at_media(text: str, placeholders: Collection[str]) -> tuple[list[str], list[str]]:
    """Splits the text of a human turn at its images, and at its videos, which count as images.

    A single image comes first, whatever its place in the text, as in LLaVA-1.5. If there is only
    white space before the last of several images, these images come first too. In both cases, the
    other text has no white space at its start and its end, all texts before it are empty, and the
    renderer writes `Template.image_suffix` after each image if there is a text. Otherwise, several
    images and all white space stay in their places, as in LLaVA-NeXT.

    Args:
        text: Text with a placeholder for each image and each video.
        placeholders: Placeholders to split at: IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER or both.

    Returns:
        The texts before, between and after the images, and the placeholders, in order.
    """
    pieces = re.split(f"({'|'.join(placeholders)})", text)
    texts, found = pieces[::2], pieces[1::2]
    if len(found) == 1 or (found and not "".join(texts[:-1]).strip()):
        texts = [*[""] * len(found), "".join(texts).strip()]
    return texts, found


def count_placeholders(turns: Sequence[Turn], placeholder: str = IMAGE_PLACEHOLDER) -> int:
    """Counts the placeholders of images, or others, in the human turns."""
    return sum(turn.text.count(placeholder) for turn in turns if turn.role == "human")


def _media_tokens(
    turns: Sequence[Turn], image_token_id: int, video_token_id: int | None
) -> dict[str, int]:
    """Returns the token of each placeholder."""
    if video_token_id is not None:
        return {IMAGE_PLACEHOLDER: image_token_id, VIDEO_PLACEHOLDER: video_token_id}
    if count_placeholders(turns, VIDEO_PLACEHOLDER):
        raise SampleError(
            f"a human turn contains {VIDEO_PLACEHOLDER}, but this model reads no videos; remove "
            "the record, or replace the video by images of some frames",
            "video",
        )
    return {IMAGE_PLACEHOLDER: image_token_id}


def _render(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, int],
) -> list[_Piece]:
    system, turns = _split_system(turns, template)
    pieces = _parse(template.begin, tokenizer)
    for index, turn in enumerate(turns):
        if turn.role == "human":
            pieces += _render_human_prefix("" if index else system, template, tokenizer)
            pieces += _render_question(turn.text, template, tokenizer, tokens)
        else:
            if not turn.text.strip():
                raise SampleError(f"answer {index // 2 + 1} is empty", "empty answer")
            prefix = template.answer_prefix.rstrip(" ")
            space = template.answer_prefix[len(prefix) :]
            pieces += _parse(prefix, tokenizer)
            pieces.append(_Piece(space + turn.text, None, learned=turn.learned))
            pieces += _parse(template.answer_suffix, tokenizer, learned=turn.learned)
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
    text: str, template: Template, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]
) -> list[_Piece]:
    texts, found = split_at_media(text, tokens)
    media = [_Piece("", tokens[placeholder], learned=False) for placeholder in found]
    if not template.keeps_questions:
        return media
    has_suffix = texts[-1] and not any(texts[:-1])
    suffix = _parse(template.image_suffix, tokenizer) if has_suffix else []
    pieces = [_Piece(texts[0], None, learned=False)]
    for medium, text in zip(media, texts[1:], strict=True):
        pieces += [medium, *suffix, _Piece(text, None, learned=False)]
    return pieces


def _split_system(turns: Sequence[Turn], template: Template) -> tuple[str, Sequence[Turn]]:
    """Returns the system text, and the other turns, of which the first is a human turn."""
    system = template.system
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    for index, turn in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            raise SampleError(
                f"human and gpt turns do not alternate: expected {expected}, found {turn.role} "
                f"with the text {turn.text[:40]!r}",
                "order of turns",
            )
    return system, turns


def _parse(text: str, tokenizer: PreTrainedTokenizerBase, *, learned: bool = False) -> list[_Piece]:
    """Splits a text of a template into plain texts and control tokens."""
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
            f"choose another template: {', '.join(TEMPLATES)}"
        )
    return cast("int", token)


def _tokenize(
    pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]
) -> Encoded:
    """Encodes pieces as token ids; adjacent texts are tokenized as one string."""
    # The Rust tokenizer is called directly, because the wrapper of transformers doubles the time.
    # Its settings are set here, because it keeps the settings of earlier calls.
    core = cast("Tokenizer", tokenizer.backend_tokenizer)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # the name of a control token in a text stays plain text
    ids: list[int] = []
    mask: list[bool] = []
    for is_text, pieces_alike in itertools.groupby(pieces, key=lambda piece: piece.token is None):
        group = [*pieces_alike]
        if is_text:
            run_ids, run_mask = _tokenize_run(group, core)
            for placeholder, token in tokens.items():
                if token in run_ids:
                    raise SampleError(
                        "a text of the conversation is tokenized as the "
                        f"{placeholder.strip('<>')} token (id {token}); remove this text"
                    )
            ids += run_ids
            mask += run_mask
        else:
            ids += [cast("int", piece.token) for piece in group]
            mask += [piece.learned for piece in group]
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


def _tokenize_run(run: Sequence[_Piece], core: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokenizes adjacent texts as one string; a token with a learned character is learned."""
    with tokenizing():
        found = core.encode("".join(piece.text for piece in run), add_special_tokens=False)
    learned_characters = b"".join(bytes([piece.learned]) * len(piece.text) for piece in run)
    # A token may cover no character, such as a leading-space token. The next character then decides
    # whether the token is learned.
    spans = (slice(start, max(end, start + 1)) for start, end in found.offsets)
    return found.ids, [any(learned_characters[span]) for span in spans]
