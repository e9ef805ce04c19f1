"""Converts records of many programs' data formats to images and turns.

Every form is first converted to a list of messages, and only these messages are checked and read.
Therefore the same conversation gives the same turns in every form:

- a list of turns in "conversations", "messages", "conversation" or "texts". A turn has a speaker
  ("from" or "role") and a text ("value" or "content"). An item of the list may also be a round,
  with a question and its answer.
- a question and its answer in fields of the record, such as "prompt" and "completion".
"""

import itertools
import re
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from llava_jax.data.content_parts import (
    images_beside,
    images_of_parts,
    is_list_of,
    join_parts,
    limit,
    put_images_first,
)
from llava_jax.data.conversation import Turn, count_placeholders, join_system_turns, select_turns
from llava_jax.disk import Json
from llava_jax.errors import SampleError

CONVERSATIONS = ("conversations", "messages", "conversation", "texts")
"""Fields that may contain the whole conversation: LLaVA and ShareGPT; chat templates and ms-swift;
XTuner; The Cauldron."""

QUESTIONS = ("instruction", "input", "prompt", "query", "question", "user", "human")
"""Fields that may contain a question. Alpaca divides a question into "instruction" and "input"."""

ANSWERS = ("completion", "output", "response", "answer", "assistant", "gpt")
"""Fields that may contain the answer to a question."""

_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_ALWAYS_READ = ("id", "image", "images", "category", "system", "tools", *_OTHER_MEDIA)
_ONLY_IN_ROUNDS = ("input", "user", "human")
_CONVERSES, _ASKS, _ANSWERS = map(frozenset, (CONVERSATIONS, QUESTIONS, ANSWERS))
_ASKS_IN_LIST = _ASKS.difference(_ONLY_IN_ROUNDS)

# These limits prevent a single record from delaying a run for long or filling its memory.
MAX_IMAGES = 256
"""Maximum number of images in a record."""
MAX_TURNS = 2000
"""Maximum number of turns in a record."""
MAX_CHARACTERS = 2**20
"""Maximum number of characters in all turns of a record together."""

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "prompter": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "model": "gpt",
    "bot": "gpt",
    "chatbot": "gpt",
    "chatgpt": "gpt",
    "bard": "gpt",
    "bing": "gpt",
}
"""Maps the names of speakers, in lower case, to roles."""

LOSS_FIELDS = ("loss", "train", "training", "weight")
"""Fields of a turn that say whether its answer is learned: ms-swift, axolotl and OpenAI."""

ANSWER_FIRST, QUESTION_LAST, NO_PLACEHOLDER = 1, 2, 4
NOTES = {
    ANSWER_FIRST: "begin with an answer without a question; these turns are left out",
    QUESTION_LAST: "end with a question without an answer; these turns are left out",
    NO_PLACEHOLDER: "have images, but no <image> in a question; these images come first",
}
"""Texts for the flags in `Parsed.notes`."""


class Parsed(NamedTuple):
    """The images and the turns of a record.

    Attributes:
        images: Images as they are in the record.
        turns: Turns that are used; see `conversation.select_turns`.
        notes: Sum of flags in `NOTES`, which say how the record was changed.
    """

    images: list[object]
    turns: list[Turn]
    notes: int = 0


def columns(names: Collection[str]) -> list[str]:
    """Returns the names of the fields that are read if all records have the fields `names`."""
    whole = [name for name in names if name in CONVERSATIONS]
    flat = () if whole else (*QUESTIONS, *ANSWERS, "history")
    return [name for name in names if name in (*CONVERSATIONS, *_ALWAYS_READ, *flat)]


def is_record(names: Iterable[str], *, in_list: bool = False) -> bool:
    """Returns True if an object with the fields `names` contains a conversation.

    Args:
        names: Names of the fields.
        in_list: Whether the object is in a list, and may therefore also be a round of another
            record. Fields of such rounds are then not sufficient.
    """
    asks = not (_ASKS_IN_LIST if in_list else _ASKS).isdisjoint(names)
    return not _CONVERSES.isdisjoint(names) or (asks and not _ANSWERS.isdisjoint(names))


def no_conversation(where: str, names: Collection[str]) -> str:
    """Returns the error message for a table that has no conversations.

    Args:
        where: Location of the table.
        names: Names of the columns.
    """
    return (
        f'{where} has no column "conversations" or "messages"; its columns are '
        f"{', '.join(names):.500}. A question and its answer may also be in two columns, such as "
        '"prompt" and "completion"'
    )


def parse(raw: object) -> Parsed:
    """Returns the images and the turns of a record.

    Args:
        raw: Record as it is in its file; `records.read_record` describes it.

    Raises:
        SampleError: The record has an unknown form, or a part of it is not supported.
    """
    if not isinstance(raw, dict):
        raise SampleError(f"expected an object, found {raw!r:.60}")
    _refuse_unsupported(raw)
    messages = _messages(raw)
    limit("turns", len(messages), MAX_TURNS)
    turns: list[Turn] = []
    parts: list[Json] = []
    for index, message in enumerate(messages):
        turn, images = _read_message(message, index)
        turns.append(turn)
        parts += images
    limit("characters", sum(len(turn.text) for turn in turns), MAX_CHARACTERS)
    images = images_of_parts(parts, images_beside(raw))
    limit("images", len(images), MAX_IMAGES, "number of images")
    return _arrange(images, turns)


def _arrange(images: list[object], turns: list[Turn]) -> Parsed:
    """Adds missing placeholders, and leaves out turns that cannot be used, with their images."""
    notes, placeholders = 0, count_placeholders(turns)
    asked = None
    if images and not placeholders:
        asked = next((i for i, turn in enumerate(turns) if turn.role == "human"), None)
    if asked is not None:
        text = put_images_first(len(images), turns[asked].text)
        turns[asked] = turns[asked]._replace(text=text)
        placeholders, notes = len(images), NO_PLACEHOLDER
    used = select_turns(turns)
    if len(used) == len(turns):
        return Parsed(images, used, notes)
    if not any(turn.role == "gpt" for turn in used):
        return Parsed(images, join_system_turns(turns), notes)  # a bad sample
    spoken = [turn.role for turn in turns if turn.role != "system"]
    notes += ANSWER_FIRST * (spoken[0] == "gpt") + QUESTION_LAST * (spoken[-1] == "human")
    if placeholders == len(images):  # otherwise the sample is bad, which its encoder reports
        images = images[: count_placeholders(used)]
    return Parsed(images, used, notes)


def _refuse_unsupported(raw: Json) -> None:
    if raw.keys().isdisjoint(("tools", *_OTHER_MEDIA)):
        return
    for name in _OTHER_MEDIA:
        if raw.get(name):
            raise SampleError(
                f'the record has "{name}", but LLaVA-1.5 reads only text and images; remove the '
                "record, or replace the video by images of some frames"
            )
    if raw.get("tools") not in (None, [], "", "[]"):
        raise SampleError(
            'the record has "tools", but no chat template of LLaVA-1.5 shows tools to the model; '
            "write them into the system text, or remove them"
        )


def _messages(raw: Json) -> list[Json]:
    """Returns the turns of a record, of any form, as messages with a speaker and a text."""
    name = next((name for name in CONVERSATIONS if raw.get(name)), None)
    if name is None:
        return _round(raw)
    found = raw[name]
    if isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
        # `datasets` stores a list of turns as one list for each of their fields.
        values = itertools.zip_longest(*found.values())
        found = [dict(zip(found, turn, strict=True)) for turn in values]
    if not found or not is_list_of(found, dict):
        raise SampleError(
            f'"conversations" or "messages" must be a list of turns, found {raw[name]!r:.60}'
        )
    before = _system(raw)
    if found[0].get("from") or found[0].get("role") or not is_record(found[0]):
        return before + found
    return [*before, *(message for item in found for message in _round(item))]


def _round(raw: Json) -> list[Json]:
    """Returns a question and its answer, which are fields of an object, as messages."""
    asked = [name for name in QUESTIONS if raw.get(name)]
    asked = asked or [name for name in QUESTIONS if raw.get(name) is not None][:1]
    if len(asked) > 1:  # "user" may also be the name of a user
        asked = [name for name in asked if name not in ("user", "human")]
    answered = [name for name in ANSWERS if raw.get(name) is not None]
    if not asked or not answered:
        raise SampleError(
            '"conversations" or "messages" must be a list of turns, or there must be a question '
            f'and an answer, such as "prompt" and "completion", found only {[*raw]!r:.200}'
        )
    if len(answered) > 1 or (len(asked) > 1 and asked != ["instruction", "input"]):
        names = asked if len(asked) > 1 else answered
        raise SampleError(
            f"it is not clear which field to use of {names!r:.200}; remove the others"
        )
    if isinstance(raw[asked[0]], list):
        question = _check_list(raw, asked[0])
        # As in TRL, only the completion is learned.
        question = [_unlearned(message) for message in question]
    else:
        texts = [_check_text(raw, name) for name in asked]
        question = [{"role": "user", "content": "\n".join(filter(None, texts))}]
    if isinstance(raw[answered[0]], list):
        answer = _check_list(raw, answered[0])
    else:
        # A plain completion may begin with the space between it and its prompt.
        answer = [{"role": "assistant", "content": _check_text(raw, answered[0]).lstrip()}]
    return [*_system(raw), *_history(raw), *question, *answer]


def _system(raw: Json) -> list[Json]:
    system = raw.get("system")
    return [{"role": "system", "content": system}] if system else []


def _history(raw: Json) -> list[Json]:
    """Returns the earlier rounds of a record, which are pairs of a question and an answer."""
    history = raw.get("history") or []
    pairs = [pair for pair in history if is_list_of(pair, str) and len(pair) == 2]
    if not isinstance(history, list) or len(pairs) != len(history):
        raise SampleError(
            f'"history" must be a list of pairs of a question and an answer, found {history!r:.60}'
        )
    names = ("user", "assistant")
    return [
        {"role": name, "content": text}
        for pair in pairs
        for name, text in zip(names, pair, strict=True)
    ]


def _unlearned(message: Json) -> Json:
    name = message.get("role")
    is_answer = isinstance(name, str) and ROLES.get(name.lower()) == "gpt"
    kept = {key: value for key, value in message.items() if key not in LOSS_FIELDS}
    return kept | {"loss": False} if is_answer else kept


def _check_text(raw: Json, name: str) -> str:
    if not isinstance(raw[name], str):
        raise SampleError(f'"{name}" must be a text or a list of messages, found {raw[name]!r:.60}')
    return raw[name]


def _check_list(raw: Json, name: str) -> list[Json]:
    if not is_list_of(raw[name], dict):
        raise SampleError(f'"{name}" must be a text or a list of messages, found {raw[name]!r:.60}')
    return raw[name]


def _read_message(message: Json, index: int) -> tuple[Turn, list[Json]]:
    """Returns a message as a turn, and the image parts of its content."""
    name, said = message.get("from") or message.get("role"), message.get("value")
    if said is None:  # in Parquet, a missing field is None
        said = message.get("content")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None or not (isinstance(said, str) or is_list_of(said, dict)):
        raise SampleError(
            f'turn {index}: expected {{"from": "human" or "gpt", "value": text}} or '
            f'{{"role": "user" or "assistant", "content": text or parts}}, found {message!r:.80}'
        )
    images: list[Json] = []
    if not isinstance(said, str):
        said, images = join_parts(said, role, index)
    if role == "human":
        _refuse_marks(said, index)
    return Turn(role, said, _is_learned(message, role, index)), images


def _refuse_marks(text: str, index: int) -> None:
    """Raises SampleError if a question has marks of media that would be learned as plain text."""
    for mark in ("<video>", "<audio>"):
        if mark in text:
            raise SampleError(
                f"turn {index} contains {mark}, but LLaVA-1.5 reads only text and images; remove "
                "the record, or replace the video by images of some frames"
            )
    if "<img>" in text and (found := re.search("<img>[^<]+</img>", text)):
        raise SampleError(
            f"turn {index} contains {found[0]!r:.80}, as in Qwen-VL's data; write <image> there, "
            'and write the path into the field "images"'
        )


def _is_learned(message: Json, role: str, index: int) -> bool:
    """Returns whether an answer is learned, which a field of its turn may say."""
    if message.keys().isdisjoint(LOSS_FIELDS):
        return True
    given = {name: message[name] for name in LOSS_FIELDS if message.get(name) is not None}
    values = list(given.values())
    if not all(isinstance(value, bool | int | float) and value in (0, 1) for value in values):
        raise SampleError(
            f"turn {index}: {' and '.join(LOSS_FIELDS)} must be true or false, or 0 or 1, found "
            f"{given!r:.80}"
        )
    if len(set(values)) > 1:
        raise SampleError(f"turn {index}: these fields contradict each other: {given!r:.80}")
    if role != "gpt" and any(values):
        raise SampleError(
            f"turn {index}: {given!r:.80} would learn a turn of a user, but only answers can be "
            "learned; set the field to false or remove it"
        )
    return role != "gpt" or all(values)
