"""Converts records of many programs' data formats to images, videos and turns.

Every form is first converted to a list of messages, and only these messages are checked and read.
Therefore the same conversation gives the same turns in every form:

- a list of turns in "conversations", "messages", "conversation" or "texts". A turn has a speaker
  ("from" or "role") and a text ("value" or "content"). An item of the list may also be a round,
  with a question and its answer.
- a question and its answer in fields of the record, such as "prompt" and "completion".
"""

import enum
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from llava_jax.data.content_parts import (
    IMAGE_LIKE,
    VIDEO_FIELDS,
    Media,
    images_beside,
    is_empty,
    is_list_of,
    limit,
    media_of_parts,
    name_videos,
    put_missing_media,
    read_parts,
    refuse_images,
    videos_beside,
)
from llava_jax.data.conversation import (
    VIDEO_PLACEHOLDER,
    Turn,
    count_placeholders,
    join_system_turns,
    select_turns,
)
from llava_jax.disk import Json
from llava_jax.errors import SampleError

CONVERSATIONS = ("conversations", "messages", "conversation", "texts")
"""Fields that may contain the whole conversation: LLaVA and ShareGPT; chat templates and ms-swift;
XTuner; The Cauldron."""

QUESTIONS = ("instruction", "input", "prompt", "query", "question", "user", "human")
"""Fields that may contain a question. Alpaca divides a question into "instruction" and "input"."""

ANSWERS = ("completion", "output", "response", "answer", "assistant", "gpt")
"""Fields that may contain the answer to a question."""

_SOUNDS = ("audio", "audios")
_ALWAYS_READ = (
    *("id", "category", "system", "tools", "label", "objects", "answers"),
    *VIDEO_FIELDS,
    *_SOUNDS,
)
_CHANGES_QUESTION = ("context", "contexts", "passage", "choices", "options")
"""Fields that belong to a question, but have no place in a prompt that all programs agree on."""
_ONLY_IN_ROUNDS = ("input", "user", "human")
_CONVERSES, _ASKS, _ANSWERS = map(frozenset, (CONVERSATIONS, QUESTIONS, ANSWERS))
_ASKS_IN_LIST = _ASKS.difference(_ONLY_IN_ROUNDS)

# These limits prevent a single record from delaying a run for long or filling its memory.
MAX_IMAGES = 256
"""Maximum number of images, and also of videos, in a record."""
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


class Note(enum.IntFlag):
    """How a record was changed. The numbers are a part of `records.Sizes`."""

    ANSWER_FIRST = 1
    QUESTION_LAST = 2
    NO_PLACEHOLDER = 4
    NO_VIDEO_PLACEHOLDER = 8


NOTES = {
    Note.ANSWER_FIRST: "with an answer before the first question; these turns are left out",
    Note.QUESTION_LAST: "with a question after the last answer; these turns are left out",
    Note.NO_PLACEHOLDER: "with images, but without <image> in a question; these images come first",
    Note.NO_VIDEO_PLACEHOLDER: (
        "with videos, but without <video> in a question; these videos come first"
    ),
}
"""Texts for the flags in `Parsed.notes`, which follow a number of records."""


class Parsed(NamedTuple):
    """The images, the videos and the turns of a record.

    Attributes:
        images: Images as they are in the record.
        turns: Turns that are used; see `conversation.select_turns`.
        notes: Flags that say how the record was changed.
        videos: Videos as they are in the record. A list contains the frames of a video.
    """

    images: list[object]
    turns: list[Turn]
    notes: Note = Note(0)
    videos: Sequence[object] = ()


def columns(names: Collection[str]) -> list[str]:
    """Returns the names of the fields that are read if all records have the fields `names`."""
    whole = [name for name in names if name in CONVERSATIONS]
    flat = () if whole else (*QUESTIONS, *ANSWERS, "history", *_CHANGES_QUESTION)
    read = (*CONVERSATIONS, *_ALWAYS_READ, *flat)
    return [name for name in names if name in read or IMAGE_LIKE.match(name)]


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
    """Returns the images, the videos and the turns of a record.

    Args:
        raw: Record as it is in its file; `records.read_record` describes it.

    Raises:
        SampleError: The record has an unknown form, or a part of it is not supported.
    """
    if not isinstance(raw, dict):
        raise SampleError(f"expected an object, found {raw!r:.60}")
    _refuse_unsupported(raw)
    parsed = read_messages(_messages(raw), images_beside(raw), videos_beside(raw))
    if not parsed.images and not parsed.videos:
        refuse_images(raw, "the record")
    for index, turn in enumerate(parsed.turns):
        _refuse_marks(turn, index, raw, has_videos=bool(parsed.videos))
    return _arrange(parsed)


def read_messages(
    messages: list[Json], beside: Sequence[object], videos: Sequence[object] | None = None
) -> Parsed:
    """Returns the images, the videos and the turns of a conversation.

    Args:
        messages: Messages with a speaker and a content, which is a text or a list of parts.
        beside: Images that are given beside the messages.
        videos: Videos that are given beside the messages; None to refuse video parts.

    Raises:
        SampleError: A message has an unknown form, or there are too many messages, characters,
            images or videos.
    """
    limit("turns", len(messages), MAX_TURNS)
    turns: list[Turn] = []
    parts: dict[Media, list[Json]] = {medium: [] for medium in Media}
    for index, message in enumerate(messages):
        turn, found = _read_message(message, index, reads_videos=videos is not None)
        turns.append(turn)
        for medium in found:
            parts[medium] += found[medium]
    limit("characters", sum(len(turn.text) for turn in turns), MAX_CHARACTERS)
    images = media_of_parts(parts[Media.IMAGE], beside)
    limit("images", len(images), MAX_IMAGES, "number of images")
    shown = media_of_parts(parts[Media.VIDEO], videos or (), Media.VIDEO)
    limit("videos", len(shown), MAX_IMAGES, "number of videos")
    return Parsed(images, turns, videos=shown)


def _arrange(parsed: Parsed) -> Parsed:
    """Adds missing placeholders, and leaves out turns that cannot be used, with their images."""
    images, turns, notes, videos = parsed
    if videos and not images:
        name_videos(turns)
    if put_missing_media(turns, len(videos), Media.VIDEO):
        notes |= Note.NO_VIDEO_PLACEHOLDER
    if put_missing_media(turns, len(images)):
        notes |= Note.NO_PLACEHOLDER
    used = select_turns(turns)
    if len(used) == len(turns):
        return Parsed(images, used, notes, videos)
    if not any(turn.role == "gpt" for turn in used):
        return Parsed(images, join_system_turns(turns), notes, videos)  # a bad sample
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[0] == "gpt":
        notes |= Note.ANSWER_FIRST
    if spoken[-1] == "human":
        notes |= Note.QUESTION_LAST
    if count_placeholders(turns) == len(images):  # otherwise, the encoder reports a bad sample
        images = images[: count_placeholders(used)]
    if count_placeholders(turns, VIDEO_PLACEHOLDER) == len(videos):
        videos = videos[: count_placeholders(used, VIDEO_PLACEHOLDER)]
    return Parsed(images, used, notes, videos)


def _refuse_unsupported(raw: Json) -> None:
    """Raises SampleError if a field changes what the model should learn, but cannot be used."""
    if raw.keys().isdisjoint(("tools", "label", *_SOUNDS)):
        return
    for name in _SOUNDS:
        if raw.get(name):
            raise SampleError(
                f'the record has "{name}", but only text, images and videos can be read; remove '
                "the record"
            )
    if raw.get("tools") not in (None, [], "", "[]"):
        raise SampleError(
            'the record has "tools", but no chat template of a LLaVA shows tools to the model; '
            "write them into the system text, or remove them"
        )
    if raw.get("label") is False:
        raise SampleError(
            'the record has "label": false, which marks a bad answer, as in data for KTO; remove '
            "the record, because the model would learn this answer"
        )


def _messages(raw: Json) -> list[Json]:
    """Returns the turns of a record, of any form, as messages with a speaker and a text."""
    name = next((name for name in CONVERSATIONS if raw.get(name)), None)
    if name is None:
        return _round(raw)
    found = raw[name]
    for other in CONVERSATIONS:
        has_turns = isinstance(raw.get(other), dict) or is_list_of(raw.get(other), dict)
        if has_turns and raw[other] and raw[other] != found:
            raise SampleError(f'the record has both "{name}" and "{other}"; remove one of them')
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
    for index, item in enumerate(found):
        refuse_images(item, f"round {index}")
    return [*before, *(message for item in found for message in _round(item))]


def _round(raw: Json) -> list[Json]:
    """Returns a question and its answer, which are fields of an object, as messages."""
    names = [name for name in QUESTIONS if raw.get(name)]
    names = names or [name for name in QUESTIONS if raw.get(name) is not None][:1]
    if len(names) > 1:  # "user" may also be the name of a user
        names = [name for name in names if name not in ("user", "human")]
    answers = [name for name in ANSWERS if raw.get(name) is not None]
    if not names or not answers:
        raise SampleError(
            '"conversations" or "messages" must be a list of turns, or there must be a question '
            f'and an answer, such as "prompt" and "completion", found only {[*raw]!r:.200}'
        )
    if len(answers) > 1 or (len(names) > 1 and names != ["instruction", "input"]):
        several = names if len(names) > 1 else answers
        raise SampleError(
            f"it is not clear which field to use of {several!r:.200}; remove the others"
        )
    for name in _CHANGES_QUESTION:
        if not is_empty(raw.get(name)):
            raise SampleError(
                f'the record has "{name}", which would not be a part of the question; write it '
                f'into "{names[0]}", and remove the field'
            )
    if isinstance(raw[names[0]], list):
        question = _check_list(raw, names[0])
        # As in TRL, only the completion is learned.
        question = [_unlearned(message) for message in question]
    else:
        texts = [_check_text(raw, name) for name in names]
        question = [{"role": "user", "content": "\n".join(filter(None, texts))}]
    if isinstance(raw[answers[0]], list):
        answer = _check_list(raw, answers[0])
    else:
        # A plain completion may begin with the space between it and its prompt.
        answer = [{"role": "assistant", "content": _check_text(raw, answers[0]).lstrip()}]
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


_TOOL_CALLS = ("tool_calls", "function_call")


def _read_message(
    message: Json, index: int, *, reads_videos: bool
) -> tuple[Turn, dict[Media, list[Json]]]:
    """Returns a message as a turn, and the image parts and video parts of its content."""
    name, said = message.get("from") or message.get("role"), message.get("value")
    if said is None:  # in Parquet, a missing field is None
        said = message.get("content")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None or not (isinstance(said, str) or is_list_of(said, dict)):
        raise SampleError(
            f'turn {index}: expected {{"from": "human" or "gpt", "value": text}} or '
            f'{{"role": "user" or "assistant", "content": text or parts}}, found {message!r:.80}'
        )
    if not message.keys().isdisjoint(_TOOL_CALLS):
        for field in _TOOL_CALLS:
            if not is_empty(message.get(field)):
                raise SampleError(f'turn {index} has "{field}", but LLaVA models cannot call tools')
    refuse_images(message, f"turn {index}")
    media: dict[Media, list[Json]] = {}
    if not isinstance(said, str):
        said, media = read_parts(said, role, index, reads_videos=reads_videos)
    return Turn(role, said, _is_learned(message, role, index)), media


_MARKS = re.compile(
    r"<audio>|<\|(?:image|img|vision|video|audio)\w*\|>|<image_?\d+>|\[IMG\]|"
    "<(?:ImageHere|IMG_CONTEXT|start_of_image|image_soft_token|image_placeholder)>"
)
"""Marks of other models and of other media, which would be read as plain text."""


def _refuse_marks(turn: Turn, index: int, raw: Json, *, has_videos: bool) -> None:
    """Raises SampleError if a turn has marks that would be learned as plain text."""
    if raw.get("objects") and (found := re.search("<(?:bbox|ref-object)>", turn.text)):
        raise SampleError(
            f'turn {index} contains {found[0]}, which stands for one of the "objects" of the '
            "record, as in ms-swift; write the name or the box of the object instead"
        )
    if turn.role != "human":
        return
    if found := _MARKS.search(turn.text):
        raise SampleError(
            f"turn {index} contains {found[0]}, which would be read as plain text; write <image> "
            "for an image and <video> for a video"
        )
    if VIDEO_PLACEHOLDER in turn.text and not has_videos:
        raise SampleError(
            f"turn {index} contains {VIDEO_PLACEHOLDER}, but the record has no video; write its "
            f'path into the field "video", or remove {VIDEO_PLACEHOLDER}'
        )
    if "<img>" in turn.text and (found := re.search("<img>[^<]+</img>", turn.text)):
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
            f"turn {index}: {' and '.join(given)} must be true or false, or 0 or 1, found "
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
