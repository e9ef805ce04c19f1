"""Scores of made-up answers, ugly ones among them, beside those of the original scorers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_jax.evals import parse_answers, scoring
from llava_jax.evals.benchmarks.registry import TASKS
from llava_jax.evals.questions import Answered, Files

MADE = json.loads((Path(__file__).parent / "fixtures" / "benchmarks.json").read_text())
LLAVA = "llava-torch 1.2.2.post1"
ORIGINALS = {
    "pope": LLAVA,
    "textvqa": LLAVA,
    "scienceqa": LLAVA,
    "mme": "MME's calculation.py",
    "gqa": "GQA's eval.py",
}

Open = Callable[[str], tuple[Files, list[Answered]]]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Benchmark -> its files, and its questions as they were answered."""

    def read(name: str) -> tuple[Files, list[Answered]]:
        for place, text in MADE[name]["files"].items():
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        files = Files(data=tmp_path, image_root=tmp_path)
        given = MADE[name]["answers"]
        questions = TASKS[name].read(files)
        assert len(questions) == len(given)
        return files, [Answered(q, given[f"{q.id}|{q.prompt}"]) for q in questions]

    return read


def flat(scores: Any, lead: str = "") -> dict[str, float]:
    if not isinstance(scores, dict):
        return {lead: scores}
    return {k: v for name, x in scores.items() for k, v in flat(x, f"{lead}/{name}").items()}


def count_different(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    assert ours.keys() == theirs.keys()
    return sum(ours[name] != theirs[name] for name in theirs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.parity("benchmarks", by)) for n, by in ORIGINALS.items()],
)
def test_scores(name: str, opened: Open, assert_parity: Callable[..., None]):
    scores = TASKS[name].score(opened(name)[1])
    assert scores is not None
    if name == "pope":
        scores = scores["sets"]
    if name == "gqa":  # in per cent, theirs
        scores = {kind: 100 * score for kind, score in scores.items()}
    ours, theirs = flat(scores), flat(MADE[name]["scores"])
    assert_parity(f"scores that differ, of {len(theirs)}", count_different(ours, theirs), 0)


@pytest.mark.parity("benchmarks", LLAVA)
def test_normal_form_of_answers(assert_parity: Callable[..., None]):
    theirs = MADE["textvqa"]["normal"]
    ours = {text: parse_answers.normalise(text) for text in theirs}
    assert len(theirs) > 300
    assert_parity(f"answers that differ, of {len(theirs)}", count_different(ours, theirs), 0)


@pytest.mark.parity("benchmarks", "lmms-eval 0.7.3")
def test_relaxed_match(assert_parity: Callable[..., None]):
    theirs = {(given, expected): right for given, expected, right in MADE["relaxed"]}
    ours = {pair: bool(scoring.relaxed(pair[0], [pair[1]])) for pair in theirs}
    assert_parity(f"pairs that differ, of {len(theirs)}", count_different(ours, theirs), 0)


def test_what_mme_reads_is_what_it_was_made_of(opened: Open, tmp_path: Path):
    """calculation.py reads the results folder line by line, two of an image."""
    files, answered = opened("mme")
    submit = TASKS["mme"].submit
    assert submit is not None
    folder = submit(tmp_path, answered, files)
    lines = [line for path in folder.glob("*.txt") for line in path.read_text().splitlines()]
    assert sorted(line.split("\t")[-1] for line in lines) == sorted(MADE["mme"]["answers"].values())
    assert {line.count("\t") for line in lines} == {3}
    assert (folder / "OCR.txt").read_text().startswith("0000.jpg\tIs it OCR 0? Please answer yes")


def test_what_gqa_reads(opened: Open, tmp_path: Path):
    files, answered = opened("gqa")
    submit = TASKS["gqa"].submit
    assert submit is not None
    assert json.loads(submit(tmp_path, answered, files).read_text()) == MADE["gqa"]["submitted"]


def test_what_scienceqa_leaves(opened: Open, tmp_path: Path):
    files, answered = opened("scienceqa")
    submit = TASKS["scienceqa"].submit
    assert submit is not None
    assert json.loads(submit(tmp_path, answered, files).read_text()) == MADE["scienceqa"]["result"]
