"""A run on a tiny checkpoint and a LLaVA JSON file of ten pictures, and what is left of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from xla_flags import XLA_FLAGS

CONFIG = """
from llava_jax.config import *
config = TrainConfig(
    name="run", output_dir={output!r}, init_from={base!r}, steps=4, dtype="float32",
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout={dropout}),
    data=DataConfig(path={data!r}, image_root={root!r}, eval_path={data!r}, max_length=96,
                    buckets=(64,), workers=0, max_skipped=0.1),
    batch=BatchConfig(global_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, projector_learning_rate=1e-3),
    checkpoint=CheckpointConfig(every=2), memory=MemoryConfig(plan="manual"),
    eval=EvalConfig(examples=3),  # a random model never ends its answers, so each takes 17 passes
)
"""


def write_config(file: Path, base: Path, data: Path, dropout: float = 0.0) -> Path:
    """Writes a config for runs beside it; a step with dropout takes twice as long to compile."""
    paths = {"output": file.parent, "base": base, "data": data / "data.json", "root": data}
    names = {name: str(path) for name, path in paths.items()}
    file.write_text(CONFIG.format(**names, dropout=dropout))
    return file


def rows(file: Path) -> list[dict[str, object]]:
    """What a file of JSON lines holds, but for what it took."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def metrics(directory: Path) -> list[dict[str, object]]:
    return rows(directory / "metrics.jsonl")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, metrics, measurements, and what was skipped."""
    for name in ("metrics.jsonl", "evaluations.jsonl", "skipped.jsonl"):
        assert rows(one / name) == rows(other / name), name
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


ROOT = Path(__file__).parents[1]


def environment(**variables: object) -> dict[str, str]:
    """Of a program in a process of its own, on one device unless variables say more."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | own | {name: str(value) for name, value in variables.items()}


def popen(config: Path, *arguments: str, **variables: object) -> subprocess.Popen[str]:
    """Starts the program in a process of its own."""
    command = [sys.executable, "-m", "llava_jax.train", "--config", str(config), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(**variables),
    )
