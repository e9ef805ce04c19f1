"""A whole data set read: every bad sample named, no good one, and so in a run."""

import itertools
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import bad_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_images import ODD

from llava_jax.cli.check_data import main
from llava_jax.config import parse_config
from llava_jax.data.batch import Batch
from llava_jax.data.check import check, only_json
from llava_jax.data.conversation import Turn
from llava_jax.data.order import NO_RECORD, EpochOrder, Grouping
from llava_jax.data.padding import Padding, measure_padding
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.records import Record
from llava_jax.data.sources import JoinedRecords, ListRecords
from llava_jax.errors import ConfigError, RunError
from llava_jax.training.inputs import Inputs, find_model, open_inputs

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny_lora.py")
MANY = pytest.param(10_000, 2, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def options(path: object, root: object, *more: str) -> list[str]:
    data = ["--data.path", str(path), "--data.image-root", str(root), "--data.eval-path", "None"]
    return ["--config", CONFIG, *data, "--data.buckets", *bad_data.OPTIONS, *more]


def open_data(written: bad_data.Written, *more: str) -> Inputs:
    config = parse_config(options(written.path, written.root, *more))
    return open_inputs(config, *find_model(config, Path(str(config.init_from))))


def test_there_are_many_kinds():
    assert len(bad_data.KINDS) >= 70


@pytest.mark.parametrize(("count", "workers"), [(300, 0), MANY])
@pytest.mark.parametrize("form", bad_data.FORMS)
def test_every_bad_sample_is_named_and_no_good_one(folder, form, count, workers):
    written = bad_data.write_data(folder, form, count)
    inputs = open_data(written)
    assert len(inputs.records) == len(written.places)
    counted: list[int] = []
    found = check(inputs.records, inputs.encoder, workers=workers, advance=counted.append)
    assert {problem.sample: problem.kind for problem in found.problems} == written.bad
    assert all(problem.where == written.places[problem.sample] for problem in found.problems)
    assert sum(counted) == len(written.places)
    assert np.flatnonzero(~found.good).tolist() == sorted(written.bad)
    assert (found.learned[found.good] > 0).all()
    assert (found.tokens[found.good] <= 256).all()
    cut = found.cut[found.good] > 0
    assert 0 < cut.sum() < 0.3 * len(cut)
    assert (found.tokens[found.good][cut] == 256).all()


def test_embedded_images_are_named_by_their_rows(folder):
    root = bad_data.write_data(folder, "list.json", 1).root
    named = {raw["image"][0]: kind for kind in ("image", "image size") for raw in
             bad_data.BAD[kind].values() if (root / raw["image"][0][:99]).is_file()}  # fmt: skip
    names = [name for bad in sorted(named) for name in (bad, "good.jpg")]
    rows = [bad_data.show({"bytes": (root / name).read_bytes(), "path": name}) for name in names]
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    inputs = open_data(bad_data.Written(path, root, {}, []))
    found = check(inputs.records, inputs.encoder)
    expected = [(f"{path}, row {2 * n}", named[name]) for n, name in enumerate(sorted(named))]
    assert [(problem.where, problem.kind) for problem in found.problems] == expected
    assert len(expected) >= 14


@pytest.mark.parametrize(("count", "workers"), [(150, 0), MANY])
@pytest.mark.parametrize("form", bad_data.FORMS)
def test_an_epoch_skips_the_bad_and_has_each_good_one_once(folder, form, count, workers):
    written = bad_data.write_data(folder, form, count)
    inputs = open_data(written, "--data.workers", str(workers), "--data.group-by-modality-length")
    batches = inputs.train_batches()
    learned, skipped = Counter(), Counter()
    for number, batch in enumerate(itertools.islice(batches, inputs.order.batches)):
        numbers = inputs.order.batch(number)
        is_learned = batch.loss_mask.any(axis=1)
        learned.update(numbers[is_learned].tolist())
        is_empty = ~(batch.segment_ids > 0).any(axis=1)
        skipped.update(numbers[is_empty & (numbers != NO_RECORD)].tolist())
    batches.close()
    assert skipped == Counter(dict.fromkeys(written.bad, 1))
    good = set(range(len(written.places))) - set(written.bad)
    assert learned == Counter(dict.fromkeys(good, 1))


def test_held_out_records_are_not_trained_on(folder, capsys):
    written = bad_data.write_data(folder, "list.json", 40)
    inputs = open_data(written, "--data.eval-fraction", "0.25", "--steps", "None")
    count = len(written.places)
    held = len(inputs.eval_records)
    assert 0.15 * count < held < 0.3 * count
    assert inputs.order.samples == len(inputs.records) == count - held
    steps = inputs.config.total_steps(inputs.order.samples)
    assert steps == -(-inputs.order.samples // inputs.config.batch.global_size)
    assert f"{count - held} samples" in inputs.summary()
    assert f"{held} other samples for evaluation" in inputs.summary()
    assert inputs.digest()["eval"] == []
    assert inputs.digest()["train"] == open_data(written).digest()["train"]
    read = [inputs.eval_records.where(number) for number in range(held)]
    assert len({*read, *(inputs.records.where(n) for n in range(count - held))}) == count
    main(options(written.path, written.root, "--data.eval-fraction", "0.25"))
    assert f"{count} samples: 40 bad" in capsys.readouterr().out


def test_only_the_last_answer_is_learned(folder):
    written = bad_data.write_data(folder, "list.json", 10)
    whole, last = (
        open_data(written, "--data.train-on", form) for form in ("answers", "last_answer")
    )
    found, fewer = (check(inputs.records, inputs.encoder) for inputs in (whole, last))
    assert (found.tokens == fewer.tokens).all()
    assert (found.learned >= fewer.learned).all()
    assert (found.learned > fewer.learned).any()


def test_the_chart(folder, tmp_path):
    pytest.importorskip("matplotlib")
    written = bad_data.write_data(folder, "list.json", 10)
    assert main(options(written.path, written.root, "--chart", str(tmp_path / "x.png"))) == 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(folder, capsys, tmp_path):
    written = bad_data.write_data(folder, "list.json", 80)
    clean, report = tmp_path / "clean.jsonl", tmp_path / "report.json"
    files = ["--write-clean", str(clean), "--json", str(report)]
    assert main(options(written.path, written.root, *files, "--shown", "1")) == 1
    output = capsys.readouterr().out
    assert f"{len(written.places)} samples: 80 bad" in output
    assert "with an answer before the first question; these turns are left out" in output
    assert "bad, image missing: 4\n" in output
    assert "and 3 more; --json FILE writes all of them" in output
    assert f"wrote {len(written.places) - 80} samples to {clean}\n" in output
    content = json.loads(report.read_text())
    places = {problem["sample"]: problem["where"] for problem in content["problems"]}
    assert places == {number: written.places[number] for number in written.bad}
    choices = content["figures"]["padding"]
    assert choices[0]["lengths"] == [256]
    assert all(row["choice"] == f"best {len(row['lengths'])}" for row in choices[1:-1])
    assert choices[-1]["choice"] == "packed"
    originals = json.loads(json.dumps(bad_data.GOOD))
    for line in clean.read_text().splitlines():
        raw = json.loads(line)
        raw.pop("id", None)
        assert raw in originals
    assert main(options(clean, written.root)) == 0
    assert f"{len(written.places) - 80} samples: 0 bad" in capsys.readouterr().out
    assert main(options(written.path, written.root, "--write-clean", str(clean))) == 2
    assert "clean.jsonl: the file exists; give another path" in capsys.readouterr().err
    assert main(options("nothing.json", "")) == 2
    assert "nothing.json" in capsys.readouterr().err


def test_images_that_are_changed_are_counted(folder, capsys):
    names = ("png 16 bits", "tiff float", "jpeg exif 6", "png 16 bits, exif", "png",
             "png color 12 of 16 bits")  # fmt: skip
    for number, name in enumerate(names):
        (folder / f"odd{number}").write_bytes(ODD[name].data)
    records = [bad_data.show(f"odd{number}") for number in range(len(names))]
    (folder / "odd.json").write_text(json.dumps(records))
    assert main(options(folder / "odd.json", folder, "--data.template", "mistral_instruct")) == 0
    assert "data.template is 'mistral_instruct', which writes '[/INST]'" in capsys.readouterr().out
    assert main(options(folder / "odd.json", folder)) == 0
    output = capsys.readouterr().out
    assert "\nimages of more than 8 bits per channel: 4\n" in output
    assert "\nimages of more than 8 bits per channel that are nearly black in 8 bits: 1\n" in output
    assert "\nimages turned by their Exif orientation: 2\n" in output


def test_only_json_can_be_written_clean(folder):
    records = open_data(bad_data.write_data(folder, "lines.jsonl", 10)).records
    assert only_json(records) is records
    with pytest.raises(ConfigError, match="one data set at a time"):
        only_json(JoinedRecords([records]))
    records.files[0] = object.__new__(ParquetFile)
    with pytest.raises(ConfigError, match="only write records of JSON"):
        only_json(records)


class Deadly(ListRecords):
    """Records of which one ends the worker that reads it. Not the tests' own process, in which the
    runtime type checker reads one now and then, by chance."""

    def __getitem__(self, number):
        if number == 70 and multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__getitem__(number)


def test_a_sample_that_kills_its_reader_is_named(folder):
    inputs = open_data(bad_data.write_data(folder, "lines.jsonl", 10))
    records = Deadly([Record("x", (), (Turn("human", "what?"), Turn("gpt", "that")))] * 100)
    with pytest.raises(RunError, match="died while it read sample 70"):
        check(records, inputs.encoder, workers=2)


def brute_force(longest: np.ndarray, count: int) -> int:
    values = np.unique(longest)
    choices = itertools.combinations(values, min(count, len(values)))
    fits = [choice for choice in choices if max(choice) >= values[-1]]
    return min(sum(min(b for b in choice if b >= one) for one in longest) for choice in fits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_best_lengths_are_the_best(seed, count):
    rng = np.random.default_rng(seed)
    longest = rng.integers(1, rng.integers(2, 60), rng.integers(1, 40))
    padding = Padding([np.array([one]) for one in longest], 8, 10, [])
    lengths = padding.best_lengths(count)
    assert len(lengths) <= count
    assert padding.padded(lengths) == 8 * brute_force(longest, count)


def test_padding_is_what_the_run_pads(folder):
    """Batches as the run makes them, by their sizes."""
    written = bad_data.write_data(folder, "lines.jsonl", 80)
    inputs = open_data(written, "--data.buckets", "60", "150", "--batch.global-size", "4")
    found = check(inputs.records, inputs.encoder)
    padding = measure_padding(inputs.order, found.tokens, found.good, found.slots)
    made = an_epoch(inputs)
    assert padding.padded([60, 150, 256]) == sum(batch.input_ids.size for batch in made)
    assert padding.tokens == sum(int((batch.segment_ids > 0).sum()) for batch in made)


def an_epoch(inputs: Inputs) -> list[Batch]:
    batches = inputs.train_batches()
    made = list(itertools.islice(batches, inputs.order.batches))
    batches.close()
    return made


def test_packed_rows_are_those_of_a_packed_run(folder):
    written = bad_data.write_data(folder, "lines.jsonl", 80)
    inputs = open_data(written, "--data.packing", "--batch.global-size", "8")
    found = check(inputs.records, inputs.encoder)
    padding = measure_padding(inputs.order, found.tokens, found.good, found.slots)
    rows = sum(int((batch.segment_ids > 0).any(axis=1).sum()) for batch in an_epoch(inputs))
    packed = padding.packed([256], 1)
    assert rows <= packed // 256 <= rows + len(written.bad)  # rows of bad images alone
    assert 0 < padding.waste(packed) < padding.waste(padding.padded([256]))


def test_padding_of_an_order_with_gaps():
    lengths = np.array([5, 7, 9])
    grouping = Grouping(np.array([True, False, True]), lengths, 1)
    order = EpochOrder((3,), 2, seed=0, grouping=grouping)
    padding = measure_padding(order, lengths, np.array([True, False, True]), lengths)
    assert sorted(padding.longest.tolist()) == [7, 9]
    assert padding.tokens == 14
    assert padding.waste(padding.padded([9])) == pytest.approx(1 - 14 / 36)


def test_a_data_set_without_a_good_text_is_all_padding():
    none = np.zeros(3, int)
    padding = measure_padding(EpochOrder((3,), 2, seed=0), none, none > 0, none)
    assert padding.waste(padding.packed([64], 1)) == padding.waste(padding.padded([64])) == 1
