"""A run's own files, damaged in every way, and what is read of them or restored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_jax.report import rows as rows_module
from llava_jax.report.rows import FORMS, read_rows
from llava_jax.training.repair_logs import copy_files, repair_objects, repair_rows

STEP = 6


def metrics_row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "grad_norm": None} | {
        "tokens": 10, "samples": 8, "skipped": 0, "seconds": 0.25
    }  # fmt: skip


def evaluation_row(step: int) -> dict[str, Any]:
    texts = {"question": "what?", "expected": "red", "given": "blue"}
    return {"step": step, "accuracy": 0.5, "loss": 1.0, "exact": {"all": 1}} | {
        "samples": {"all": 2}, "examples": [texts], "skipped": []
    }  # fmt: skip


def skipped_row(step: int) -> dict[str, Any]:
    return {"step": step, "sample": 10 + step, "place": f"d.json, {step}", "reason": "none"}


def rows_up_to(name: str, step: int) -> list[dict[str, Any]]:
    if name == "evaluations.jsonl":
        return [evaluation_row(at) for at in (0, 3, 6) if at <= step]
    if name == "nonfinite.jsonl":
        return [{"step": at, "samples": ["d.json, 1"]} for at in range(2, step + 1, 2)]
    row = metrics_row if name == "metrics.jsonl" else skipped_row
    return [row(at) for at in range(1, step + 1)]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that was killed in step 9; its newest checkpoint is of step 6."""
    for name in FORMS:
        write(tmp_path / name, rows_up_to(name, STEP + 2))
    (tmp_path / "config.json").write_text('{"config": {"name": "run"}, "base_fingerprint": null}')
    (tmp_path / "data.json").write_text('{"train": [], "eval": []}')
    (tmp_path / "wandb.json").write_text('{"id": "abc"}')
    return tmp_path


@pytest.fixture
def kept(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What was copied when the checkpoint was saved; its step was measured after that."""
    before = tmp_path_factory.mktemp("before")
    for name in FORMS:
        write(before / name, rows_up_to(name, STEP - (name == "evaluations.jsonl")))
    for name in ("config.json", "data.json", "wandb.json"):
        (before / name).write_bytes((run_dir / name).read_bytes())
    return copy_files(before)


def cut_last_line(content: bytes) -> bytes:
    return content[:-7]


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def nulls_at_the_end(content: bytes) -> bytes:
    return content[:-200] + bytes(200)


def not_utf8(content: bytes) -> bytes:
    return content + b'{"step": 9, "\xff\xfe": 1}\n'


def nulls_in_the_middle(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes(50) + content[half + 50 :]


def no_rows(content: bytes) -> bytes:
    odd = [
        "null",
        "[1]",
        "7",
        "{}",
        '{"step": "x"}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1e3}',
    ]
    odd += [
        '{"step": 3, "sample": "a"}',
        '{"step": ' + "9" * 5000 + "}",
        "[" * 10**5,
        '{"step": 2}',
    ]
    return "\n".join(odd).encode() + b"\n" + content


def huge_line(content: bytes) -> bytes:
    return b"x" * 300_000 + b"\n" + content


def reversed_rows(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[::-1])


def repeated(content: bytes) -> bytes:
    return content + content


def others(content: bytes) -> bytes:
    """As another run of the same name would have written in between."""
    return (
        content.replace(b"0.25", b"0.75").replace(b"what?", b"who?").replace(b"none", b"many")
        + content
    )


def surrogates(content: bytes) -> bytes:
    return content.replace(b"d.json", b"\\ud800.json")


DAMAGES = [
    *(cut_last_line, cut_in_half, empty, nulls_at_the_end, not_utf8, nulls_in_the_middle, no_rows),
    *(huge_line, reversed_rows, repeated, others),
]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_row_is_lost_that_a_checkpoint_has(
    run_dir: Path,
    kept: dict[str, str],
    name: str,
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100_000)
    file = run_dir / name
    file.write_bytes(damage(file.read_bytes()))
    said = list(repair_rows(run_dir, kept, STEP))
    wanted = rows_up_to(name, STEP)
    if name == "evaluations.jsonl":  # the last is in no checkpoint, and is measured again
        assert read_rows(file).rows in (wanted, wanted[:-1])
        assert damage is not others or read_rows(file).rows[0] == wanted[0]
    else:
        assert file.read_text() == "".join(json.dumps(row) + "\n" for row in wanted)
    assert len(said) <= 1
    if damage in (not_utf8, no_rows, huge_line, reversed_rows, nulls_in_the_middle):
        assert str(file) in said[0]
        assert "was damaged" in said[0]
    assert list(repair_rows(run_dir, kept, STEP)) == []


def test_rows_after_the_checkpoint_come_again_and_nothing_is_said(
    run_dir: Path, kept: dict[str, str]
):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # the kill's
    assert list(repair_rows(run_dir, kept, STEP)) == []
    for name in FORMS:
        assert read_rows(run_dir / name)[:2] == (rows_up_to(name, STEP), 0)


def test_a_file_that_is_gone_is_there_again(run_dir: Path, kept: dict[str, str]):
    (run_dir / "metrics.jsonl").unlink()
    (said,) = repair_rows(run_dir, kept, STEP)
    assert "(6 missing rows)" in said
    assert read_rows(run_dir / "metrics.jsonl").rows == rows_up_to("metrics.jsonl", STEP)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_without_a_copy_what_can_be_read_is_kept(
    run_dir: Path, name: str, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100_000)
    file = run_dir / name
    file.write_bytes(damage(file.read_bytes()))
    said = list(repair_rows(run_dir, {}, STEP))
    steps = [row["step"] for row in read_rows(file).rows]
    assert steps == sorted({*steps})
    assert all(step <= STEP for step in steps)
    if damage in (not_utf8, no_rows, huge_line, reversed_rows, repeated, others):
        assert steps == [row["step"] for row in rows_up_to(name, STEP)]
        assert "no checkpoint has the lost rows" in said[0]


OBJECTS = ("config.json", "data.json", "wandb.json")
CONTENTS = [b"", b"{", bytes(100), b"\xff\xfe", b"[]", b"null", b"{}", b"[" * 10**5, None]


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_other_files_are_restored(
    run_dir: Path, kept: dict[str, str], name: str, content: bytes | None
):
    file = run_dir / name
    before = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    (said,) = repair_objects(run_dir, kept)
    assert f"{file} was missing or damaged; it was restored" in said
    assert file.read_bytes() == before
    assert list(repair_objects(run_dir, kept)) == []


def test_of_an_older_checkpoint_what_is_not_needed_is_removed(run_dir: Path):
    for name in OBJECTS:
        (run_dir / name).write_bytes(b"{")
    said = list(repair_objects(run_dir, {}))
    assert len(said) == 2
    assert not (run_dir / "wandb.json").exists()
    assert not (run_dir / "data.json").exists()
    assert (run_dir / "config.json").exists()


def test_a_last_row_without_its_newline_is_a_row(run_dir: Path):
    file = run_dir / "metrics.jsonl"
    write(file, rows_up_to("metrics.jsonl", STEP))
    file.write_bytes(file.read_bytes()[:-1])
    assert list(repair_rows(run_dir, {}, STEP)) == []
    assert read_rows(file).rows == rows_up_to("metrics.jsonl", STEP)
    file.write_bytes(file.read_bytes()[:-5])
    (said,) = repair_rows(run_dir, {}, STEP)
    assert "(1 invalid lines)" in said
    with file.open("a") as opened:
        opened.write('{"step": 6, "lo')  # behind step 5, and of a step that comes again
    assert list(repair_rows(run_dir, {}, STEP - 1)) == []


def test_before_the_first_step_nothing_is_lost(run_dir: Path):
    (run_dir / "metrics.jsonl").write_text("{}\n")
    (said,) = repair_rows(run_dir, {}, 0)
    assert "what was lost" not in said


def test_a_damaged_copy_restores_nothing(run_dir: Path, kept: dict[str, str]):
    (run_dir / "wandb.json").write_text("{")
    (said,) = repair_objects(run_dir, kept | {"wandb.json": "{}"})
    assert "was removed" in said
    assert not (run_dir / "wandb.json").exists()
