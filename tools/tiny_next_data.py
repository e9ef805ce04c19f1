"""Writes the data of the tiny LLaVA-NeXT: fine patterns that only the tiles of an image show.

    python tools/tiny_next_data.py data/tiny_next

An image has 64 x 64 pixels of one color, and one quarter of it has a pattern: lines or a
checkerboard whose period is two pixels. The vision tower of the model sees 32 x 32 pixels. When the
image is resized to this size, the pattern vanishes completely: all pixels have the same color. Each
tile shows a quarter of the image with all of its pixels, so only a model that uses the tiles can
see the pattern and its place.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, TILE = 64, 32
"""Width and height in pixels of an image, and of the input of the vision tower."""

COLOURS = {
    "blue": (105, 105, 145),
    "gray": (125, 125, 125),
    "green": (105, 145, 105),
    "orange": (145, 125, 105),
    "purple": (145, 105, 145),
    "red": (145, 105, 105),
    "teal": (105, 145, 145),
    "yellow": (145, 145, 105),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
ROWS, COLUMNS = np.indices((SIDE, SIDE))
PATTERNS = {"horizontal": ROWS % 2, "vertical": COLUMNS % 2, "checkered": (ROWS + COLUMNS) % 2}
"""1 for each light pixel of a pattern, and 0 for each dark pixel."""
QUESTIONS = {
    "pattern": "which pattern is in {}?",
    "place": "where is the pattern in {}?",
    "color": "what color is {}?",
}
"""A question of each category about an image. Only the last one can be answered without tiles."""
NAMES = (("the image",), ("the first image", "the second image"))
"""Names of the images in the questions of a record with one image, and with two images."""


def draw(pattern: str, place: int, colour: str, rng: random.Random) -> Image.Image:
    """Returns an image with a pattern that vanishes when the image is resized to half its size.

    Args:
        pattern: Name of the pattern.
        place: Index of the quarter with the pattern; see `PLACES`.
        colour: Name of the color.
        rng: Source of the shade of the color, and of the contrast of the pattern.
    """
    shade = np.array([level + rng.randint(-4, 4) for level in COLOURS[colour]])
    row, column = divmod(place, 2)
    is_inside = (row == ROWS // TILE) & (column == COLUMNS // TILE)
    light = rng.randint(30, 80) * is_inside * (2 * PATTERNS[pattern] - 1)
    pixels = shade + light[..., None]
    while True:
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        trace = shade - np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC), int)
        if not trace.any():
            return image
        # This removes what is still visible at the edges of the quarter, in a few repetitions.
        pixels = pixels + trace.repeat(2, axis=0).repeat(2, axis=1)


def write_data(folder: Path, name: str, records: int, seed: int, turns: int) -> Path:
    """Writes images, and a LLaVA JSON file with conversations about one or two images.

    Args:
        folder: Directory of the file, which is also the image root.
        name: Name of the file without ".json", and of the directory of the images.
        records: Number of conversations. Every third one has two images.
        seed: Seed of all random choices.
        turns: Number of questions in a conversation, at most 3. The category of a conversation is
            that of its first question.

    Returns:
        The path of the JSON file.
    """
    rng, written = random.Random(seed), []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(records):
        names, images, answers = NAMES[number % 3 == 2], [], {}
        for which in names:
            pattern, colour = rng.choice(sorted(PATTERNS)), rng.choice(sorted(COLOURS))
            place = rng.randrange(len(PLACES))
            images.append(f"{name}/{number}-{len(images)}.png")
            draw(pattern, place, colour, rng).save(folder / images[-1])
            answers[which] = {"pattern": pattern, "place": PLACES[place], "color": colour}
        pairs = [(which, category) for which in names for category in QUESTIONS]
        asked, conversation = rng.sample(pairs, turns), []
        for which, category in asked:
            lead = "" if conversation else "<image>\n" * len(images)
            question = lead + QUESTIONS[category].format(which)
            conversation.append({"from": "human", "value": question})
            conversation.append({"from": "gpt", "value": answers[which][category]})
        record = {"id": str(number), "image": images, "category": asked[0][1]}
        written.append(record | {"conversations": conversation})
    file = folder / f"{name}.json"
    file.write_text(json.dumps(written, indent=1) + "\n")
    return file


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python tools/tiny_next_data.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directory", type=Path, help="directory to write train.json, test.json to")
    directory = parser.parse_args().directory
    print(f"wrote {write_data(directory, 'train', 6000, seed=0, turns=3)}")
    print(f"wrote {write_data(directory, 'test', 300, seed=1, turns=1)}")


if __name__ == "__main__":
    main()
