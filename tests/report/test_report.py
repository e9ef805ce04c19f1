"""report.html of made-up runs: all of it is there, text stays text, and nothing is fetched."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_jax.config import DataConfig, TrainConfig, to_json
from llava_jax.errors import ConfigError
from llava_jax.report import report
from llava_jax.report.report import Report, write_report
from llava_jax.report.run_files import RunReader
from llava_jax.report.thumbnails import MAX_IMAGES, find_thumbnails, keep_thumbnails

EVIL = "<script>alert(1)</script> & \"'"
GIB = 2**30


def example(index: int, given: str, **fields: Any) -> dict[str, Any]:
    found = {"question": f"{EVIL} {index}", "expected": "yes", "given": given}
    return found | {"index": index, "images": 1, "right": given == "yes"} | fields


def evaluation(step: int, examples: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    row = {"step": step, "accuracy": 0.5, "loss": 1.5, "exact": {"all": 1}, "samples": {"all": 2}}
    return row | {"examples": examples, "skipped": []} | fields


def step_row(step: int, **fields: Any) -> dict[str, Any]:
    row = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
    return row | {"tokens": 1000, "samples": 8, "seconds": 0.5} | fields


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has just begun."""
    directory = tmp_path / "run"
    directory.mkdir()
    config = TrainConfig(name="run", steps=4, data=DataConfig(path="d.json", eval_path="e.json"))
    written = to_json(config) | {"name": EVIL}
    described = {"config": written, "base_fingerprint": "abc", "versions": {"jax": "0.10"}}
    (directory / "config.json").write_text(json.dumps(described | {"devices": ["cpu", "cpu"]}))
    return directory


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\u00a0", " ") + "\n"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(directory: Path) -> Page:
    text = write_report(directory).read_text()
    page = Page(text)
    assert page.count("script") == 0
    places = [a[name] or "" for _, a in page.tags for name in ("src", "href") if name in a]
    assert all(place.startswith("data:") for place in places)
    assert "url(" not in text
    assert re.search(r"\bnan\b", page.text) is None
    return page


def test_a_run_that_just_began_has_a_report(run: Path):
    page = read(run)
    assert "0 of 4 steps" in page.text
    assert EVIL in page.text
    assert "Nothing was measured yet." in page.text
    assert "2 × cpu" in page.text
    assert page.count("svg") == 0


def test_a_whole_run_is_all_there(run: Path):
    write_rows(run / "metrics.jsonl", [step_row(step) for step in range(1, 5)])
    before = [example(3, "no"), example(5, "yes")]
    after = [example(3, "yes"), example(5, EVIL)]
    by_kind = {"exact": {"color": 1, "shape": 0}, "samples": {"color": 2, "shape": 2}}
    rows = [evaluation(0, before), evaluation(4, after, accuracy=0.25, skipped=[7], **by_kind)]
    write_rows(run / "evaluations.jsonl", rows)
    write_rows(run / "skipped.jsonl", [{"step": 1, "sample": 9, "place": "d, 9", "reason": EVIL}])
    Image.new("RGB", (900, 30), "red").save(run / "wide.png")
    keep_thumbnails(run / "examples", 3, [str(run / "wide.png")])
    page = read(run)
    assert "all steps done" in page.text
    assert page.count("svg") == 7  # that of the loss also has a logarithmic axis
    for text in ("25.0 %", "50.0 % before", "color", "After 4 steps", "1 eval sample cannot"):
        assert text in page.text
    assert page.text.count("✓ right") == 2
    assert page.text.count("✗ wrong") == 2
    assert page.text.count(EVIL) >= 5
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    data = (picture["src"] or "").partition("base64,")[2]
    assert base64.b64decode(data) == (run / "examples" / "3-0.jpg").read_bytes()
    assert "The image cannot be read." in page.text  # that of example 5
    assert "d, 9" in page.text
    assert "learning_rate" in page.text.replace("_\n", "_")
    assert "The peak was not measured: cpu devices" in page.text


def test_long_answers_are_judged_by_perplexity_and_f1(run: Path):
    expected = "a dog runs on the beach"
    texts = {"expected": expected, "right": False}
    before = [example(3, "a cat", f1=0.25, is_cut=True, **texts), example(4, "", f1=0.0, **texts)]
    after = [example(3, "a dog on the sea", f1=0.75, **texts), example(4, expected, f1=1.0)]
    after[1] |= texts | {"right": True}
    measures = {"accuracy": 0.0, "tokens": 40}
    rows = [evaluation(0, before, loss=2.0, **measures), evaluation(4, after, loss=1.0, **measures)]
    write_rows(run / "evaluations.jsonl", rows)
    text = read(run).text
    for found in ("Eval perplexity", "2.718", "7.389 before", "Token F1, 2 examples", "87.5 %"):
        assert found in text
    assert "12.5 % before" in text
    assert "Eval accuracy" not in text
    assert "a cat …" in text
    assert "F1 25.0 %" in text
    assert (text.count("✓ right"), text.count("✗ wrong")) == (1, 1)
    short = [row | {"tokens": 4} for row in rows]
    write_rows(run / "evaluations.jsonl", short)
    text = read(run).text
    assert "Eval accuracy" in text
    assert "token F1 of the examples" in text


def test_two_questions_of_a_record_have_two_cards(run: Path):
    same = {"question": "And this?", "turn": 0}
    rows = [example(3, "no", **same), example(3, "yes", **same | {"turn": 1})]
    write_rows(run / "evaluations.jsonl", [evaluation(0, rows), evaluation(4, rows)])
    page = read(run)
    assert page.count("article") == 2
    assert page.text.count("✓ right") == page.text.count("✗ wrong") == 2


def test_the_start_the_command_and_the_use_of_the_result_are_told(run: Path):
    text = read(run).text
    assert "Use the result" not in text
    assert "The command" not in text
    described = json.loads((run / "config.json").read_text())
    described |= {
        "started": "2026-02-03T04:05:06+01:00",
        "command": "llava-jax train --config '<b>'",
        "parameters": {"trainable": 25, "total": 1000},
    }
    (run / "config.json").write_text(json.dumps(described))
    (run / "adapter").mkdir()
    text = read(run).text
    for found in ("started 3 February 2026, 03:05 UTC", "llava-jax train --config '<b>'"):
        assert found in text
    assert "25 of 1,000 (2.50 %)" in text
    assert f"llava-jax chat {run}" in text
    assert f"llava-jax convert {run} {run}-merged --to hf --merge" in text
    settings = {"base_model_name_or_path": "org/base"}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    code = "PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained('org/base'), "
    assert f"model = {code}'{run}/adapter')" in read(run).text
    (run / "adapter").rename(run / "model")
    assert f"LlavaForConditionalGeneration.from_pretrained('{run}/model')" in read(run).text
    (run / "config.json").write_text(json.dumps(described | {"started": "soon", "command": None}))
    assert "started " in read(run).text  # the time of the file


def test_numbers_that_are_not_finite_are_told_of(run: Path):
    rows = [step_row(1), step_row(2, loss=None, grad_norm=None), step_row(3, loss=None)]
    write_rows(run / "metrics.jsonl", rows)
    write_rows(run / "evaluations.jsonl", [evaluation(0, [], loss=None)])
    write_rows(run / "nonfinite.jsonl", [{"step": 2, "samples": ["d, 1", EVIL]}])
    page = read(run)
    assert "▲ 2 not finite" in page.text
    assert "1 step had a loss or gradients that were not finite" in page.text
    assert "No value was finite." in page.text  # of the eval loss
    assert "not finished" in page.text


def test_a_line_that_a_kill_cut_short_is_left_out(run: Path):
    write_rows(run / "metrics.jsonl", [step_row(1), step_row(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (run / "evaluations.jsonl").write_text('{"step": 0, "acc')
    assert "2 of 4 steps" in read(run).text


def damaged(content: bytes) -> bytes:
    lines = [b"null", b'{"step": "x"}', b'{"step": -1}', b"[" * 10**5, b"\xff\xfe", bytes(100)]
    return b"\n".join([*lines, content])


def test_damaged_files_have_a_report_that_says_so(run: Path, caplog: pytest.LogCaptureFixture):
    write_rows(run / "metrics.jsonl", [step_row(step) for step in (2, 1, 3, 2)])
    write_rows(run / "evaluations.jsonl", [evaluation(4, []), evaluation(0, [example(3, "no")])])
    write_rows(run / "skipped.jsonl", [{"step": 1, "sample": 9, "place": "d", "reason": "x"}])
    write_rows(run / "nonfinite.jsonl", [{"step": 2, "samples": ["d, 1"]}])
    names = [f"{name}.jsonl" for name in ("metrics", "evaluations", "skipped", "nonfinite")]
    for name in names:
        (run / name).write_bytes(damaged((run / name).read_bytes()))
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(5, [{"question": 1}])) + "\n")
        file.write(json.dumps(evaluation(6, [], samples={"all": "2"})) + "\n")
    (run / "plan.json").write_bytes(b"{}")
    page = read(run)
    assert "3 of 4 steps" in page.text
    assert "After 4 steps" in page.text
    assert "1 sample cannot be used" in page.text
    for name in names:
        count = 8 if name.startswith("evaluations") else 6
        assert f"{name}: {count} damaged lines skipped" in page.text
    assert "plan.json: 1 damaged line skipped" in caplog.text
    for content in (b"", b"[]", b"\xff", b'{"usage": {"total": "many"}, "plan": "x"}'):
        (run / "plan.json").write_bytes(content)
        assert "plan.json" in read(run).text


def test_half_of_a_character_is_escaped(run: Path):
    half = "\ud800"
    write_rows(run / "metrics.jsonl", [step_row(1)])
    questions = [example(3, "no", question=half, expected=half), example(4, half)]
    write_rows(run / "evaluations.jsonl", [evaluation(0, questions)])
    row = {"step": 1, "sample": 9, "place": half, "reason": half}
    write_rows(run / "skipped.jsonl", [row])
    assert read(run).text.count("\\ud800") == 5


@pytest.mark.parametrize("field", ["steps", "data", "batch", "memory", "tune", "optimizer"])
def test_a_config_that_lacks_a_field_is_no_traceback(run: Path, field: str):
    described = json.loads((run / "config.json").read_text())
    for value in (None, "text"):
        described["config"][field] = value
        (run / "config.json").write_text(json.dumps(described))
        with pytest.raises(ConfigError, match="does not have the content that llava_jax writes"):
            write_report(run)


def test_a_reader_goes_on_where_it_ended(run: Path):
    reader = RunReader(run)
    assert reader.read().step == 0
    for step in (1, 2):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_row(step, device_bytes=step * GIB)) + "\n")
        found = reader.read()
        assert found.columns["step"].tolist() == list(range(1, step + 1))
        assert found.device_bytes == step * GIB


def test_runs_without_eval_data_or_of_older_versions(run: Path):
    old = {"question": "what?", "expected": "yes", "given": "no"}
    other = old | {"question": "why?"}  # the data changed while the run was stopped
    rows = [evaluation(2, [old, old | {"question": "who?"}]), evaluation(3, [old, other])]
    write_rows(run / "evaluations.jsonl", rows)
    page = read(run)
    assert page.count("article") == 1
    assert "The image was not kept." in page.text
    assert "After 2 steps" in page.text
    (run / "evaluations.jsonl").unlink()
    described = json.loads((run / "config.json").read_text())
    described["config"]["data"]["eval_path"] = None
    (run / "config.json").write_text(json.dumps(described))
    assert read(run).text.count("This run has no eval data.") == 3


def test_planned_memory_is_drawn_beside_what_was_measured(run: Path):
    terms = {"frozen weights": 6 * GIB, "optimizer": 0, "rest": 2 * GIB}
    host = {"frozen weights": 0, "optimizer": 3 * GIB, "rest": 0}
    usage = {"device": terms, "host": host, "total": 8 * GIB, "host_total": 3 * GIB}
    usage |= {"capacity": 16 * GIB, "host_capacity": None, "reserve": GIB}
    (run / "plan.json").write_text(json.dumps({"plan": "micro-batch 2", "usage": usage}))
    write_rows(run / "metrics.jsonl", [step_row(1, device_bytes=12 * GIB)])
    page = read(run)
    for text in ("Plan: micro-batch 2.", "8.00 GiB of 16.00 GiB", "12.00 GiB of 16.00 GiB"):
        assert text in page.text
    widths = [a["style"] for tag, a in page.tags if tag == "i" and "style" in a]
    assert widths[1:] == [f"width:{w}%" for w in ("37.50", "12.50", "6.25", "75.00", "100.00")]


def test_pictures_are_small_copies_and_broken_images_have_none(tmp_path: Path):
    Image.new("RGBA", (1000, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    folder = tmp_path / "examples"
    images = [str(tmp_path / name) for name in ("a.png", "b.png", "missing.png", "a.png", "a.png")]
    keep_thumbnails(folder, 7, images)
    assert [file.name for file in find_thumbnails(folder, 7)] == ["7-0.jpg", "7-3.jpg"]
    assert len(images) > MAX_IMAGES
    keep_thumbnails(folder, 7, [str(tmp_path / "b.png"), *images[1:]])
    assert [file.name for file in find_thumbnails(folder, 7)] == ["7-3.jpg"]
    keep_thumbnails(folder, 7, images)
    with Image.open(folder / "7-0.jpg") as copy:
        assert copy.size == (320, 3)
        assert copy.getpixel((0, 0)) == (255, 255, 255)


def test_a_report_is_written_now_and_then_and_at_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    written = []
    monkeypatch.setattr(report, "write_report", lambda *_: written.append(1))
    with Report(run) as kept:
        kept.update()
        kept.update()
        assert len(written) == 1
    assert len(written) == 2
    with Report(run, write=False) as other:
        other.update()
    assert len(written) == 2


def test_a_report_that_cannot_be_written_ends_nothing(run: Path, caplog: pytest.LogCaptureFixture):
    (run / "config.json").write_text("{")
    with Report(run) as kept:
        kept.update()
    assert "report.html was not written" in caplog.text
    with pytest.raises(ConfigError, match="is not the directory of a run"):
        write_report(run)
