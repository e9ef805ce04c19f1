"""Where a run can be watched besides its own files: TensorBoard, and Weights & Biases."""

import importlib.metadata
import json
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llava_jax.config import LogConfig, TrainConfig, to_json
from llava_jax.disk import replace_text
from llava_jax.errors import ConfigError
from llava_jax.report.rows import parse_object

GROUPS = ("train", "held_out")
STEP_SCALARS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
HELD_OUT_SCALARS = ("loss", "accuracy")


@runtime_checkable
class Tracker(Protocol):
    """Is told what a run finds."""

    def log_step(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics.jsonl, with its tokens_per_second."""

    def log_held_out(self, row: dict[str, Any], pictures: Sequence[Sequence[Path]]) -> None:
        """Takes a row of evaluations.jsonl, and the files with the images of each example."""


def check_packages(log: LogConfig) -> None:
    """Looks for what `open_trackers` will need.

    Raises:
        ConfigError: It is not installed.
    """
    wanted = {"tensorboard": log.tensorboard, "wandb": log.wandb is not None}
    for package in (name for name, asked in wanted.items() if asked):
        try:
            importlib.metadata.version(package)  # a folder here may be called so too
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"log.{package} needs {package}: pip install -e '.[log]'") from None


@contextmanager
def open_trackers(config: TrainConfig, first_step: int, *, write: bool) -> Iterator[list[Tracker]]:
    """Opens what `config.train.log` asks for, until the run ends.

    Args:
        config: The run.
        first_step: Steps done before; what was told of later ones is replaced.
        write: Whether this process is the one that tells.

    Raises:
        ConfigError: Weights & Biases does not answer.
    """
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if write and config.log.tensorboard:
            directory = config.run_dir / "tensorboard"
            trackers.append(stack.enter_context(open_tensorboard(directory, first_step)))
        if write and config.log.wandb is not None:
            trackers.append(stack.enter_context(open_wandb(config)))
        yield trackers


def _scalars(row: dict[str, Any], group: str, names: Sequence[str]) -> dict[str, float]:
    """Those of a row that are finite, under their public names."""
    return {f"{group}/{name}": row[name] for name in names if row[name] is not None}


def _caption(example: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {example[name]}" for name in ("question", "expected", "given"))


@contextmanager
def open_tensorboard(directory: Path, first_step: int) -> Iterator["TensorBoard"]:
    """Begins an event file. TensorBoard forgets what older ones say of steps that come again."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    tracker = TensorBoard(EventFileWriter(str(directory), flush_secs=30), first_step)
    try:
        yield tracker
    finally:
        tracker.close()


class TensorBoard:
    """Writes events for TensorBoard.

    Args:
        writer: Of one event file.
        first_step: Steps done before.
    """

    def __init__(self, writer: Any, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event: Any = vars(event_pb2)["Event"]  # made when it is imported, unknown before
        self._summary: Any = vars(summary_pb2)["Summary"]
        self._writer = writer
        session: Any = vars(event_pb2)["SessionLog"]
        again = session(status=session.START)
        self._writer.add_event(
            self._event(wall_time=time.time(), step=first_step + 1, session_log=again)
        )

    def log_step(self, row: dict[str, Any]) -> None:
        """Writes its scalars."""
        self._add(row["step"], self._numbers(row, "train", STEP_SCALARS))

    def log_held_out(self, row: dict[str, Any], pictures: Sequence[Sequence[Path]]) -> None:
        """Writes scalars, and of each example the images and a table of texts."""
        values = self._numbers(row, "held_out", HELD_OUT_SCALARS)
        for example, files in zip(row["examples"], pictures, strict=True):
            tag = f"held_out/record {example['index']}"
            values += [self._image(f"{tag}/image {n}", file) for n, file in enumerate(files)]
            values.append(self._text(tag, example))
        self._add(row["step"], values)

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def _numbers(self, row: dict[str, Any], group: str, names: Sequence[str]) -> list[Any]:
        value = self._summary.Value
        found = _scalars(row, group, names)
        return [value(tag=tag, simple_value=number) for tag, number in found.items()]

    def _image(self, tag: str, file: Path) -> Any:
        from PIL import Image

        with Image.open(file) as image:
            width, height = image.size
        image = self._summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=file.read_bytes()
        )
        return self._summary.Value(tag=tag, image=image)

    def _text(self, tag: str, example: dict[str, Any]) -> Any:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        text = textwrap.indent(_caption(example), " " * 4)  # as code: nothing in it is markup
        metadata = create_summary_metadata(display_name=tag, description="")
        return self._summary.Value(tag=tag, tensor=make_tensor_proto(text), metadata=metadata)


@contextmanager
def open_wandb(config: TrainConfig) -> Iterator["Wandb"]:
    """Begins a run at Weights & Biases, or goes on with the one that this run began there.

    Raises:
        ConfigError: It cannot be reached, or has no account for this user.
    """
    import wandb

    file = config.run_dir / "wandb.json"
    known = (parse_object(file.read_bytes()) or {}).get("id") if file.is_file() else None
    if not isinstance(known, str):
        file.parent.mkdir(parents=True, exist_ok=True)
        known = uuid.uuid4().hex[:12]
        replace_text(file, json.dumps({"id": known}) + "\n")
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=config.name,
            id=known,
            resume="allow",
            dir=config.run_dir,
            config=to_json(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb {config.log.wandb}: {error}; see `wandb login`, or set WANDB_MODE=offline"
        ) from error
    with run:  # tells how it ended
        yield Wandb(wandb, run)


class Wandb:
    """Tells Weights & Biases.

    What comes again after a kill is the same to the bit, so it is left out where it is known. Only
    without a connection can that not be seen.

    Args:
        wandb: The module.
        run: Of it.
    """

    def __init__(self, wandb: Any, run: Any):
        self._wandb, self._run = wandb, run
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._known = {group: run.summary.get(f"{group}/step", -1) for group in GROUPS}

    def log_step(self, row: dict[str, Any]) -> None:
        """Sends its scalars."""
        self._log("train", row["step"], _scalars(row, "train", STEP_SCALARS))

    def log_held_out(self, row: dict[str, Any], pictures: Sequence[Sequence[Path]]) -> None:
        """Sends scalars, and the images of the examples with their texts.

        Not as a table, of which images are kept outside of the run's directory.
        """
        values: dict[str, Any] = dict(_scalars(row, "held_out", HELD_OUT_SCALARS))
        images = [
            self._wandb.Image(str(file), caption=_caption(example))
            for example, files in zip(row["examples"], pictures, strict=True)
            for file in files
        ]
        values |= {"held_out/examples": images} if images else {}
        self._log("held_out", row["step"], values)

    def _log(self, group: str, step: int, values: dict[str, Any]) -> None:
        if step > self._known[group]:
            self._run.log({f"{group}/step": step} | values)
