"""Makes the comparison of `tools/train_speed.py`."""

import argparse
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from llava_jax.config import MemoryConfig, ModelConfig, load_config
from llava_jax.pretrained.processor import save_processor
from llava_jax.report.rows import read_rows
from llava_jax.speed.case import BASE, Case
from llava_jax.speed.run import write_start

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
RECORDS, PHOTOS = 512, 32
SIZE = (640, 480)
TRAINED = 1000
"""Number of steps of the run of `llava_jax.train`, which is stopped after the measured steps."""

CONFIG = """
from llava_jax.config import BatchConfig, DataConfig, TrainConfig
config = TrainConfig(
    name="ours", output_dir={output!r}, init_from={base!r}, steps={steps},
    data=DataConfig(path={data!r}, image_root={root!r}),
    batch=BatchConfig(global_size={batch}),
)
"""


class Speeds(NamedTuple):
    """Results of a comparison.

    Attributes:
        ours: Tokens per second of `llava_jax.train`.
        theirs: Tokens per second of transformers and PEFT.
        buckets: Bucket lengths that `llava_jax.train` chose, as it printed them.
    """

    ours: float
    theirs: float
    buckets: str

    @property
    def ratio(self) -> float:
        """Returns our speed divided by their speed."""
        return self.ours / self.theirs


def compare(
    model: ModelConfig, words: tuple[int, int], given: argparse.Namespace, options: list[str]
) -> Speeds:
    """Runs both programs in turn, and returns their speeds.

    Args:
        model: Sizes of the model.
        words: Smallest and largest number of words in a conversation.
        given: Arguments of the command.
        options: Options for `llava_jax.train`.

    Raises:
        SystemExit: A program has failed.
    """
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        prepare(directory, model, words, given.batch, given.peer_dtype)
        ours, theirs, buckets = [], [], ""
        for number in range(given.rounds):
            rows, buckets = run_ours(directory, number, given, options)
            ours += rows[given.warmup :]
            theirs += run_theirs(directory, given)[given.warmup :]
    return Speeds(median_speed(ours), median_speed(theirs), buckets)


def median_speed(rows: list[dict[str, Any]]) -> float:
    """Returns the median of the tokens per second of all steps."""
    return statistics.median(row["tokens"] / row["seconds"] for row in rows)


def prepare(
    directory: Path, model: ModelConfig, words: tuple[int, int], batch: int, peer_dtype: Any
) -> None:
    """Writes the model, the first adapter, the data and the config.

    The words and the tokens are those of the package's tiny LLaVA.
    """
    config = directory / "config.py"
    paths = {"output": directory / "runs", "base": directory / BASE, "root": directory}
    paths = {name: str(path) for name, path in {**paths, "data": directory / "data.json"}.items()}
    config.write_text(CONFIG.format(**paths, steps=TRAINED, batch=batch))
    write_data(directory, words)
    model = dataclasses.replace(model, image_token_id=3, pad_token_id=4)
    loaded = load_config(config)  # transformers recomputes nothing by default
    memory = MemoryConfig(remat="none")
    theirs = dataclasses.replace(loaded, memory=memory, dtype=peer_dtype)
    write_start(Case(theirs, model, 0), directory, with_adapter=True)
    save_processor(TINY, directory / BASE, model)
    side = model.vision.image_size
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = directory / BASE / name
        settings = json.loads(file.read_text())
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        settings |= {key: value for key, value in sizes.items() if key in settings}
        file.write_text(json.dumps(settings))


def write_data(directory: Path, words: tuple[int, int]) -> None:
    """Writes random JPEGs, and conversations with one image and random words."""
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        coarse = rng.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
        photo = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        photo.save(directory / f"{number}.jpg", quality=90)
    text = lambda count: " ".join(rng.choice(["red", "blue", "circle", "shape", "is"], count))
    records = []
    for number in range(RECORDS):
        half = int(rng.integers(words[0], words[1] + 1)) // 2
        turns = [("human", "<image>\n" + text(half)), ("gpt", text(half))]
        said = [{"from": role, "value": value} for role, value in turns]
        records.append({"image": f"{number % PHOTOS}.jpg", "conversations": said})
    (directory / "data.json").write_text(json.dumps(records))


def run_ours(
    directory: Path, number: int, given: argparse.Namespace, options: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Runs `llava_jax.train` until the last measured step.

    Returns:
        The rows of the steps in metrics.jsonl, and the line about the bucket lengths.
    """
    name, count = f"ours-{number}", given.warmup + given.steps
    command = [sys.executable, "-m", "llava_jax.train", "--config", directory / "config.py"]
    command += ["--name", name, *options]
    log, metrics = directory / f"{name}.log", directory / "runs" / name / "metrics.jsonl"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and len(read_rows(metrics).rows) < count:
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait()
    rows = read_rows(metrics).rows
    if len(rows) < count:
        raise SystemExit(f"llava_jax.train has failed:\n{log.read_text()}")
    found = re.search(r"^buckets: (.*)$", log.read_text(), re.MULTILINE)
    return rows[:count], found[1] if found else "-"


def run_theirs(directory: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the loop in transformers and PEFT, and returns the rows of its steps."""
    command = [sys.executable, Path(__file__).with_name("peer_loop.py"), directory]
    command += [str(given.warmup + given.steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit("the loop in transformers has failed; its error is printed above")
    return json.loads(done.stdout.splitlines()[-1])
