"""Samples that are bad in every way we know of, mixed with good ones, as files on disk.

Encode them with the embedded tiny LLaVA, whose images take 64 tokens each, and with OPTIONS.
"""

import dataclasses
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OPTIONS = ("--data.max-length", "256", "--data.max-images", "4", "--data.template", "vicuna_v1")

Raw = dict[str, Any]


def talk(*texts: str) -> list[Raw]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def say(*turns: tuple[str, Any]) -> Raw:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def show(*images: Any, marks: int | None = None) -> Raw:
    count = len(images) if marks is None else marks
    return {"image": list(images), "conversations": talk("<image>\n" * count + "what?", "that")}


WHOLE = {"conversations": talk("what?", "that")}
TEXT = json.dumps(WHOLE)
LONG = "a word " * 300

GOOD: tuple[Raw, ...] = (
    WHOLE,
    {"conversations": talk("", "é🐱 日本", "<>[]{},", '"')},
    {"conversations": talk("what?", LONG)},  # cut, but learned from
    say(("system", "Be brief."), ("human", "what?"), ("gpt", "that")),
    say(("gpt", "Hello!"), ("human", "what?"), ("gpt", "that <image>")),
    say(("gpt", "Hi!"), ("gpt", "Hello!"), ("human", "what?"), ("gpt", "that"), ("human", "why?")),
    show("good.png"),
    show("good.png", marks=0),
    {"image": ["good.png", "nothing.png"], "conversations": talk("<image>", "that", "<image>")},
    {"prompt": "what?", "completion": "that", "images": ["good.jpg"], "category": 3},
    show("good.jpg", "sub/good.png"),
    show("inside.png"),
    show("palette.gif") | {"category": "drawn", "other": {"is": [1.5, None]}},
    {"images": ["good.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "that"}]},
)  # fmt: skip

BAD: dict[str, dict[str, Raw | str | bytes | list | int | None]] = {
    "not JSON": {
        "cut off": TEXT[:-20],
        "no brace at the end": TEXT[:-1],
        "no bracket": TEXT.replace("]", ""),
        "no quotes": TEXT.replace('"gpt"', "gpt"),
        "an open quote": TEXT.replace('"gpt"', '"gpt'),
        "Python": str(WHOLE),
        "a word": "nonsense",
        "deep": "{" * 100_000,
        "not UTF-8": TEXT.encode().replace(b"that", b"th\xff\xfet"),
        "Latin-1": '{"conversations": [{"from": "human", "value": "é"}]}'.encode("latin-1"),
        "half a character": TEXT.replace("that", "\\ud83d"),
        "half a character in a path": json.dumps(show("\ud83d.png")),
        "a large number": '{"id": ' + "9" * 5000 + ', "conversations": []}',
    },
    "form": {
        "a number": 7,
        "a list": [],
        "nothing": None,
        "no conversation": {"id": 3, "image": "good.png"},
        "no turns": {"conversations": []},
        "a conversation that is text": {"conversations": "what? that"},
        "turns that are texts": {"conversations": ["what?", "that"]},
        "unknown role": say(("human", "what?"), ("robot", "that")),
        "no role": {"conversations": [{"value": "what?"}]},
        "a list of roles": say((["human"], "what?")),  # pyright: ignore[reportArgumentType]
        "an answer that is a number": say(("human", "what?"), ("gpt", 3)),
        "no value": {"conversations": [{"from": "human"}]},
        "category": {**WHOLE, "category": ["drawn"]},
        "sound": {**WHOLE, "audio": "good.mp3"},
        "video in the text": {"conversations": talk("<video>\nwhat?", "that")},
        "tools": {**WHOLE, "tools": [{"name": "search"}]},
        "half a weight": {"messages": [
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": "that", "weight": 0.5}]},
        "a question without an answer": {"prompt": "what?"},
        "two questions of two forms": {"prompt": "what?", "query": "who?", "response": "that"},
        "an image that is a number": {**show("good.png"), "image": 3},
        "an image that is no path": show({"file": "good.png"}),
        "an image without a path": show({"bytes": None, "path": None}),
        "image and images": {**show("good.png"), "images": ["good.png"]},
        "an unknown part": {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "an image of the assistant": {
            "messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "an image that is not there": {
            "messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}]},
    },
    "order of turns": {
        "two answers": say(("human", "what?"), ("gpt", "this"), ("gpt", "that")),
        "two questions": say(("human", "what?"), ("human", "who?"), ("gpt", "that")),
        "system in the middle": say(("human", "what?"), ("system", "Hm."), ("gpt", "that")),
    },
    "empty answer": {
        "the only one": {"conversations": talk("what?", "")},
        "spaces": {"conversations": talk("what?", " \n\t")},
        "the second": {"conversations": talk("what?", "that", "who?", "")},
    },
    "no answer": {
        "a question": say(("human", "what?")),
        "only system": say(("system", "Be brief.")),
        "only a greeting": say(("gpt", "Hello!")),
        "two greetings": say(("gpt", "Hi!"), ("gpt", "Hello!"), ("human", "what?")),
        "an answer that is not learned": {"conversations": [
            {"from": "human", "value": "what?"}, {"from": "gpt", "value": "that", "loss": False}]},
    },
    "no answer after the cut": {
        "a long question": {"conversations": talk(LONG, "that")},
        "images take it all": show(*["good.png"] * 4),
    },
    "number of images": {
        "no image": show(marks=1),
        "one too few": show("good.png", marks=2),
        "one too many": show("good.png", "good.png", marks=1),
        "more than max_images": show(*["good.png"] * 5),
    },
    "image path": {
        "absolute": show("/etc/hostname"),
        "up": show("../outside.png"),
        "up from below": show("sub/../../outside.png"),
        "NUL": show("good.png\0.jpg"),
        "a link": show("link.png"),
        "a linked folder": show("linked/outside.png"),
    },
    "image missing": {
        "no file": show("nothing.png"),
        "no folder": show("nowhere/good.png"),
        "a link to nothing": show("dangling.png"),
        "the second": show("good.png", "nothing.png"),
    },
    "image": {
        "a long name": show("x" * 3000),
        "damaged base64": show("data:image/png;base64,iVBORw0KGgo!"),
        "base64 of a text": show("data:image/png;base64,dGV4dA=="),
        "a folder": show("sub"),
        "a file as a folder": show("good.png/x.png"),
        "a circle of links": show("circle.png"),
        "empty": show("empty.png"),
        "text": show("text.jpg"),
        "a PNG cut short": show("cut.png"),
        "a JPEG cut short": show("cut.jpg"),
        "a GIF cut short": show("cut.gif"),
        "half a header": show("header.png"),
        "PostScript": show("program.eps"),
        "damaged": show("damaged.png"),
        "zero width": show("zero-width.png"),
        "zero height": show("zero-height.png"),
        "wrong palette": show("palette.png"),
    },
    "video": {
        "a model that reads no videos": {**WHOLE, "video": "good.mp4"},
    },
    "image size": {
        "a bomb": show("bomb.png"),
        "a large bomb": show("large-bomb.png"),
        "a thread": show("thread.png"),
    },
}  # fmt: skip

KINDS = [(kind, name) for kind, samples in BAD.items() for name in samples]


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 0, extra=()):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_images(folder: Path) -> None:
    """All images that the samples name, in folder/images, and one outside of it."""
    root = folder / "images"
    (root / "sub").mkdir(parents=True)
    (folder / "outside").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    picture = Image.fromarray(noise)
    for name in ("outside.png", "outside/outside.png", "images/sub/good.png"):
        picture.save(folder / name)
    picture.convert("P").save(root / "palette.gif")
    for name in ("good.png", "good.jpg", "whole.gif"):
        picture.save(root / name)
        whole = (root / name).read_bytes()
        (root / f"cut.{name[-3:]}").write_bytes(whole[: len(whole) // 2])
    whole = (root / "good.png").read_bytes()
    links = {"inside": "sub/good", "link": "../outside", "dangling": "none", "circle": "circle"}
    for name, to in links.items():
        (root / f"{name}.png").symlink_to(f"{to}.png")
    (root / "linked").symlink_to("../outside")
    colours = ((b"PLTE", b"\0" * 6), (b"tRNS", b"\0" * 300))
    for name, content in {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "header.png": whole[:20],
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "damaged.png": whole[:500] + bytes(20) + whole[520:],
        "zero-width.png": png(0, 4, b"\0" * 4),
        "zero-height.png": png(4, 0, b""),
        "palette.png": png(2, 2, b"\0\1\1" * 2, colour=3, extra=colours),
        "bomb.png": png(9500, 9500, bytes(9500 * 1189), depth=1),
        "large-bomb.png": png(60_000, 60_000, b""),
        "thread.png": png(1, 20_000, bytes(40_000)),
    }.items():
        (root / name).write_bytes(content)


@dataclasses.dataclass(frozen=True)
class Written:
    """A data file and its images.

    Attributes:
        path: The file.
        root: Folder of the images.
        bad: Number of each bad sample -> what is wrong, in the words of SampleError.
        places: Where each sample stands.
    """

    path: Path
    root: Path
    bad: dict[int, str]
    places: list[str]


def write_list(path: Path, samples: list[bytes]) -> list[str]:
    path.write_bytes(b"[" + b",\n".join(samples) + b"]")
    return [f"{path}, record {number}" for number in range(len(samples))]


def write_lines(path: Path, samples: list[bytes]) -> list[str]:
    """With an empty line before every seventh."""
    places, lines = [], []
    for number, sample in enumerate(samples):
        lines += [b""] * (number % 7 == 0)
        lines.append(sample)
        places.append(f"{path}, line {len(lines)}")
    path.write_bytes(b"\n".join(lines))
    return places


FORMS: dict[str, Callable[[Path, list[bytes]], list[str]]] = {
    "list.json": write_list,
    "lines.jsonl": write_lines,
}


def write_data(folder: Path, form: str, bad: int, seed: int = 0) -> Written:
    """Writes so many bad samples, of every kind, and more good ones; one follows each bad one.

    Between two whole samples of a list, all that is damaged is one sample.
    """
    rng = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(bad)]
    rng.shuffle(kinds)
    samples, wrong = [as_bytes(GOOD[0])], {}
    for kind, name in kinds:
        wrong[len(samples)] = kind
        samples.append(as_bytes(BAD[kind][name]))
        goods = rng.choices(GOOD, k=rng.choice((1, 1, 2)))
        samples += [as_bytes({"id": f"good {len(samples)}", **raw}) for raw in goods]
    if not (folder / "images").exists():
        make_images(folder)
    places = FORMS[form](folder / form, samples)
    return Written(folder / form, folder / "images", wrong, places)


def as_bytes(sample: Any) -> bytes:
    """JSON, unless it is written out already."""
    if isinstance(sample, bytes):
        return sample
    return sample.encode() if isinstance(sample, str) else json.dumps(sample).encode()
