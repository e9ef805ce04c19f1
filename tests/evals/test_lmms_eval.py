"""lmms-eval runs on a checkpoint, and comes to the score of `llava-jax evaluate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.cli import evaluate
from llava_jax.evals.benchmarks.custom import read_easy_vqa
from llava_jax.evals.questions import Files

pytest.importorskip("lmms_eval.api")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny-llava"
COUNT = 60


def test_its_score_is_that_of_evaluate(tmp_path: Path):
    questions = read_easy_vqa(Files())[:COUNT]
    rows = [{"question": q.prompt, "answer": q.answers[0], "image": q.images[0]} for q in questions]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "easy_vqa.jsonl").write_text(lines)
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "llava_jax"),
        *("--model_args", f"pretrained={TINY}", "--batch_size", "4"),
        *("--tasks", "easy_vqa", "--include_path", str(ROOT / "tests" / "evals" / "lmms_task")),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = sorted((tmp_path / "out").rglob("*results.json"))
    assert found, done.stdout + done.stderr
    theirs = json.loads(found[0].read_text())["results"]["easy_vqa"]["exact,none"]

    ours = ["--task", "easy_vqa", "--limit", str(COUNT), "--output", str(tmp_path / "ours")]
    assert evaluate.main([str(TINY), *ours]) == 0
    scores = json.loads((tmp_path / "ours" / "scores.json").read_text())["scores"]
    assert theirs == scores["accuracy"]
    assert 0.5 < theirs < 0.8
