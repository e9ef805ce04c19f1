"""Lengths of all samples, from the texts of a few."""

from pathlib import Path

import numpy as np
import pytest

from llava_jax.config import parse_config
from llava_jax.data import lengths
from llava_jax.data.conversation import Turn
from llava_jax.data.lengths import estimate_sizes
from llava_jax.data.records import Record
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import ListRecords
from llava_jax.training.inputs import find_model, open_inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs():
    config = parse_config(["--config", str(ROOT / "configs" / "tiny_lora.py"), "--data.buckets",
                           "auto", "--data.eval-path", "None"])  # fmt: skip
    return open_inputs(config, *find_model(config, Path(str(config.init_from))))


def record(words: int, images: int = 0, word: str = "red") -> Record:
    """Its images are missing, so whoever decodes one fails."""
    turns = (Turn("human", "<image>" * images + "what?"), Turn("gpt", " ".join([word] * words)))
    return Record("x", ("nowhere.png",) * images, turns)


class CountingEncoder(SampleEncoder):
    """Remembers the records whose texts are encoded."""

    def encode_text(self, record):
        vars(self).setdefault("read", []).append(record)
        return super().encode_text(record)


@pytest.fixture
def encoder(inputs):
    fields = vars(inputs.encoder) | {"max_length": 300, "max_images": 2}
    return CountingEncoder(**fields)


BAD = record(5, images=3)
"""A record with more images than a sample may have."""


def exact(records: ListRecords, encoder: SampleEncoder) -> np.ndarray:
    """The length of each record that is not bad, as a run encodes it."""
    length = lambda record: 0 if record is BAD else len(encoder.encode_text(record).input_ids)
    return np.array([length(record) for record in records])


def test_few_records_are_all_read(encoder):
    records = ListRecords(BAD if n in (4, 50) else record(n % 40 + 1, n % 3) for n in range(100))
    found = estimate_sizes(records, encoder).tokens
    assert len(encoder.read) == 100
    np.testing.assert_array_equal(found, exact(records, encoder))


def test_many_records_are_estimated_from_a_few(encoder):
    """Also where the data is sorted, a few are by far the longest, and many are bad."""
    rng = np.random.default_rng(0)
    words = np.sort(rng.lognormal(2.5, 0.8, 5000)).astype(int) + 1
    records = ListRecords(
        record(count, images, "teal")
        for count, images in zip(words.tolist(), rng.integers(0, 3, 5000).tolist(), strict=True)
    )
    records[::7] = [BAD] * len(records[::7])
    found = estimate_sizes(records, encoder).tokens
    assert len(encoder.read) <= lengths.SAMPLED
    wanted = exact(records, encoder)
    good = wanted > 0
    np.testing.assert_allclose(found[good], wanted[good], rtol=0.1, atol=4)
    assert found.max() == pytest.approx(wanted.max(), rel=0.01)


def test_texts_without_spaces_have_the_lengths_of_others(encoder):
    rng = np.random.default_rng(0)
    records = ListRecords(record(1, word="x" * n) for n in rng.integers(1, 200, 3000).tolist())
    found, wanted = estimate_sizes(records, encoder).tokens, exact(records, encoder)
    for share in (10, 50, 90):
        assert np.percentile(found, share) == pytest.approx(np.percentile(wanted, share), rel=0.1)


def test_records_of_which_none_can_be_read_have_no_length(encoder):
    assert not np.any(estimate_sizes(ListRecords([BAD] * 10), encoder))


def test_the_inputs_choose_what_fits_their_data(inputs):
    """All texts of easy-VQA's conversations have about the same length, far below max_length."""
    buckets, padding = inputs.choose_buckets(1000)
    assert 1 <= len(buckets.lengths) <= 4
    assert buckets.lengths[-1] <= 128
    assert buckets.images == ()
    assert 0 < padding < 0.2
    assert inputs.choose_buckets(1000) == (buckets, padding)
    again = inputs.with_buckets(buckets)
    batches = again.train_batches()
    made = [next(batches) for _ in range(20)]
    batches.close()
    assert {batch.input_ids.shape[1] for batch in made} <= set(again.spec.lengths)
    real = sum(int((batch.segment_ids > 0).sum()) for batch in made)
    assert 1 - real / sum(batch.input_ids.size for batch in made) == pytest.approx(
        padding, abs=0.02
    )
