"""Sends a run's metrics to TensorBoard and to Weights & Biases, in addition to the run's own files.

Events for TensorBoard are written with TensorBoard's `EventFileWriter`, which needs neither
TensorFlow nor PyTorch. The package tensorboardX has a simpler interface, but is not used (version
2.6.5) for two reasons. It imports PyTorch if PyTorch is installed, which takes seconds and may load
other CUDA libraries than JAX needs. And it names event files by the time in seconds, so a restart
within one second would overwrite a file.
"""

import importlib.metadata
import json
import math
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from llava_jax.config import LogConfig, TrainConfig, to_json
from llava_jax.disk import replace_text
from llava_jax.distributed.multihost import say
from llava_jax.errors import ConfigError
from llava_jax.report.measures import f1_of, perplexity
from llava_jax.report.rows import Row, parse_object

GROUPS = ("train", "eval")
STEP_SCALARS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
EVAL_SCALARS = ("loss", "accuracy", "perplexity", "token_f1")


@runtime_checkable
class Tracker(Protocol):
    """Service to which a run's metrics are logged."""

    def log_step(self, row: Row) -> None:
        """Logs a row of metrics.jsonl, with the additional field tokens_per_second."""

    def log_eval(self, row: Row, images: Sequence[Sequence[Path]]) -> None:
        """Logs a row of evaluations.jsonl, and the image files of each example in the row."""


def check_packages(log: LogConfig) -> None:
    """Checks that the packages that `open_trackers` imports are installed.

    Args:
        log: Log settings.

    Raises:
        ConfigError: A package is missing.
    """
    needed = {"tensorboard": log.tensorboard, "wandb": log.wandb is not None}
    for package in (name for name, is_needed in needed.items() if is_needed):
        try:
            # An import would not be a valid test, because it also succeeds if the working
            # directory contains a folder `wandb` or `tensorboard`.
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"log.{package} needs the package {package}: pip install 'llava_jax[log]'"
            ) from None


@contextmanager
def open_trackers(config: TrainConfig, first_step: int, *, write: bool) -> Iterator[list[Tracker]]:
    """Opens the trackers that `config.log` turns on; closes them at the end of the context.

    Args:
        config: Config of the run.
        first_step: Number of steps done before this start of the run.
        write: Whether this process logs; only one process should log.

    Raises:
        ConfigError: Weights & Biases cannot be reached, or this user is not logged in.
    """
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if write and config.log.tensorboard:
            directory = config.run_dir / "tensorboard"
            trackers.append(stack.enter_context(open_tensorboard(directory, first_step)))
        if write and config.log.wandb is not None:
            trackers.append(stack.enter_context(open_wandb(config)))
        yield trackers


def _scalars(row: Row, group: str, names: Sequence[str]) -> dict[str, float]:
    """Returns the finite values of the fields `names`, under the names that trackers show."""
    found = {name: row[name] for name in names if row[name] is not None}
    return {f"{group}/{name}": n for name, n in found.items() if math.isfinite(n)}


def _with_measures(row: Row) -> Row:
    """Returns a row of evaluations.jsonl with the measures that follow from it."""
    return row | {"perplexity": perplexity(row["loss"]), "token_f1": f1_of(row)}


def _caption(example: Row) -> str:
    """Returns the text of an example: question, expected answer and the model's answer."""
    return "\n".join(f"{name}: {example[name]}" for name in ("question", "expected", "given"))


@contextmanager
def open_tensorboard(directory: Path, first_step: int) -> Iterator["TensorBoard"]:
    """Starts a new event file, and closes the file at the end of the context.

    Args:
        directory: Directory of the event files, which may contain files of earlier starts.
        first_step: Number of steps done before this start of the run.
    """
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(directory), flush_secs=30)
    try:
        yield TensorBoard(writer, first_step)
    finally:
        writer.close()


class TensorBoard:
    """Tracker that writes events for TensorBoard.

    Args:
        writer: Writer of one event file.
        first_step: Number of steps done before this start of the run. TensorBoard ignores events of
            later steps in older event files.
    """

    def __init__(self, writer: Any, first_step: int):
        from tensorboard.compat.proto import event_pb2

        # protobuf creates its classes at run time, so type checkers do not know their names.
        self._event: Any = vars(event_pb2)["Event"]
        self._session: Any = vars(event_pb2)["SessionLog"]
        self._writer = writer
        self._write(first_step + 1, session_log={"status": self._session.START})

    def log_step(self, row: Row) -> None:
        """Writes the scalars of a step."""
        self._write(row["step"], summary={"value": _numbers(row, "train", STEP_SCALARS)})

    def log_eval(self, row: Row, images: Sequence[Sequence[Path]]) -> None:
        """Writes the scalars of an evaluation, and the images and texts of its examples."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        values = _numbers(_with_measures(row), "eval", EVAL_SCALARS)
        for example, files in zip(row["examples"], images, strict=True):
            tag = f"eval/record {example['index']}"
            if turn := example.get("turn"):
                tag += f", question {turn + 1}"
            values += [_image(f"{tag}/image {n}", file) for n, file in enumerate(files)]
            # TensorBoard renders texts as Markdown. The text is indented, because Markdown shows
            # indented lines unchanged, as code.
            values += text_pb(tag, textwrap.indent(_caption(example), " " * 4)).value
        self._write(row["step"], summary={"value": values})

    def _write(self, step: int, **content: Row) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


def _numbers(row: Row, group: str, names: Sequence[str]) -> list[Row]:
    """Returns the scalars of a row as values of a TensorBoard summary."""
    found = _scalars(row, group, names)
    return [{"tag": tag, "simple_value": number} for tag, number in found.items()]


def _image(tag: str, file: Path) -> Row:
    """Returns an image file as a value of a TensorBoard summary."""
    with Image.open(file) as image:
        width, height = image.size
    size = {"width": width, "height": height, "colorspace": 3}
    return {"tag": tag, "image": size | {"encoded_image_string": file.read_bytes()}}


@contextmanager
def open_wandb(config: TrainConfig) -> Iterator["Wandb"]:
    """Starts a run at Weights & Biases, or resumes the run of an earlier start.

    The file wandb.json in the run's directory contains the id of the run at Weights & Biases.

    Args:
        config: Config of the run.

    Raises:
        ConfigError: Weights & Biases cannot be reached, or this user is not logged in.
    """
    import wandb

    file = config.run_dir / "wandb.json"
    run_id = (parse_object(file.read_bytes()) or {}).get("id") if file.is_file() else None
    if not isinstance(run_id, str):
        file.parent.mkdir(parents=True, exist_ok=True)
        run_id = uuid.uuid4().hex[:12]
        replace_text(file, json.dumps({"id": run_id}) + "\n")
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=config.run_dir,
            config=to_json(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb {config.log.wandb}: {error}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    # The run is not used as a context manager, because it would print a traceback for every
    # exception, also for a mistake of the user and for Ctrl-C.
    status = 1
    try:
        yield Wandb(wandb, run)
        status = 0
    finally:
        try:
            run.finish(exit_code=status)
        except Exception as error:
            say(f"Weights & Biases could not finish the run: {type(error).__name__}: {error}")


class Wandb:
    """Tracker that logs to Weights & Biases.

    A run that was killed repeats some steps, with exactly the same results. Steps that Weights &
    Biases has already received are not sent again. In offline mode, it is unknown which steps were
    received, so repeated steps are logged again.

    Args:
        wandb: The module `wandb`.
        run: Run that `wandb.init` returned.
    """

    def __init__(self, wandb: Any, run: Any):
        self._wandb, self._run = wandb, run
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._last_step = {group: run.summary.get(f"{group}/step", -1) for group in GROUPS}

    def log_step(self, row: Row) -> None:
        """Sends the scalars of a step."""
        self._log("train", row["step"], _scalars(row, "train", STEP_SCALARS))

    def log_eval(self, row: Row, images: Sequence[Sequence[Path]]) -> None:
        """Sends the scalars of an evaluation, and the images of its examples with captions.

        The examples are not sent as a table, because wandb copies the images of tables to places
        outside of the run's directory.
        """
        values: Row = dict(_scalars(_with_measures(row), "eval", EVAL_SCALARS))
        captioned = [
            self._wandb.Image(str(file), caption=_caption(example))
            for example, files in zip(row["examples"], images, strict=True)
            for file in files
        ]
        values |= {"eval/examples": captioned} if captioned else {}
        self._log("eval", row["step"], values)

    def _log(self, group: str, step: int, values: Row) -> None:
        if step > self._last_step[group]:
            self._run.log({f"{group}/step": step} | values)
