"""Example answers: what is generated after the first wrong token, and where an answer ends."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_models import model_of, whole

from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec
from llava_jax.data.conversation import Encoded, Turn
from llava_jax.data.image_tokens import Expanded, expand_images
from llava_jax.data.images import ImageTransform
from llava_jax.data.records import Record
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import ListRecords
from llava_jax.data.templates import TEMPLATES
from llava_jax.pretrained.tokenizer import load_tokenizer
from llava_jax.train_step.step import EvalResult
from llava_jax.training.examples import (
    MAX_NEW_TOKENS,
    MORE_TOKENS,
    AnswerGenerator,
    Question,
    answers_of,
    questions_of,
)

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
TURNS = (Turn("human", "one?"), Turn("gpt", "yes"), Turn("human", "two?"), Turn("gpt", "no, a dog"))
RECORD = Record("a", (), TURNS)
SPEC = BatchSpec(
    size=2, max_slots=1, image_size=(8, 8), max_length=64, pad_token_id=0, slot_features=4
)
END = 60


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    transform = ImageTransform(shortest_edge=8, height=8, width=8)
    tokenizer = load_tokenizer(TINY)
    return SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], transform, model_of(3, 4), 256, 1)


class Counter:
    """An eval step whose next token is the last token plus 1."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: Batch) -> EvalResult:
        slots = np.shape(batch.pixel_values)[1]
        self.shapes.append((*np.shape(batch.input_ids), slots))
        ids, mask = np.asarray(batch.input_ids), np.asarray(batch.loss_mask)
        predicted = np.zeros_like(ids)
        for row, segments in enumerate(np.asarray(batch.segment_ids)):
            if segments.any():
                (target,) = np.flatnonzero(mask[row])
                assert np.flatnonzero(segments)[-1] == target
                predicted[row, target - 1] = ids[row, target - 1] + 1
        nothing = np.zeros(ids.shape, bool)
        return EvalResult(np.zeros(len(ids), np.float32), nothing, nothing, predicted)


def question(first: int, *, limit: int = 99) -> Question:
    """A question whose wrong answer begins with a token."""
    expected = np.array([7, END], np.int32)
    return Question(0, 0, RECORD, "what?", prompt_of([1, 5, 6]), expected, [first], limit)


def prompt_of(ids: list[int], images: int = 0) -> Expanded:
    encoded = Encoded(np.array(ids, np.int32), np.zeros(len(ids), bool))
    config = model_of(3, 4)
    return expand_images(encoded, config, whole(config, images))


def generator(encoder: SampleEncoder, step: Counter, **options: object) -> AnswerGenerator:
    given = {"spec": SPEC, "ends": {END}, "rows": range(2)} | options
    return AnswerGenerator(step, encoder, **given)


def test_answers_go_on_until_the_model_ends_them(encoder):
    step = Counter()
    asked = [question(first) for first in (50, END, 58, 55)]
    found = generator(encoder, step).generate(asked)
    assert [q.tokens for q in asked] == [[*range(n, END + 1)] for n in (50, END, 58, 55)]
    assert [example.is_cut for example in found] == [False] * 4
    assert [example.right for example in found] == [False] * 4
    # Two rows at a time: 58 and 50 together, then 55 takes the free row.
    assert len(step.shapes) == 10
    assert found[0].given == encoder.tokenizer.decode([*range(50, END + 1)]).strip()


def test_answers_without_an_end_are_cut(encoder):
    asked = [question(10, limit=4), question(20, limit=1)]
    found = generator(encoder, Counter()).generate(asked)
    assert [q.tokens for q in asked] == [[10, 11, 12, 13], [20]]
    assert all(example.is_cut for example in found)


def test_a_signal_stops_between_tokens(encoder):
    step = Counter()
    calls = iter([False, False, True])
    generator(encoder, step).generate([question(10)], lambda: next(calls))
    assert len(step.shapes) == 2


def test_a_text_ends_the_answers_of_the_template_plain(encoder):
    plain = dataclasses.replace(encoder, template=TEMPLATES["plain"])
    newline = encoder.tokenizer("a\nb", add_special_tokens=False).input_ids[1]
    asked = [question(newline - 3)]
    (found,) = generator(plain, Counter(), ends=set()).generate(asked)
    assert asked[0].tokens[-1] == newline
    assert found.given == encoder.tokenizer.decode(asked[0].tokens[:-1]).strip()
    assert not found.is_cut


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [((), (32, 0)), ({(16, 5), (32, 1)}, (16, 5)), ({(4, 1)}, (32, 0)), ({(16, 0)}, (16, 0))],
)
def test_rows_have_a_shape_that_is_compiled_or_that_a_batch_would_have(encoder, shapes, expected):
    step = Counter()
    spec = dataclasses.replace(SPEC, max_slots=8, buckets=(32,), image_buckets=(0, 1, 2))
    generator(encoder, step, shapes=shapes, spec=spec).generate([question(58)])
    assert set(step.shapes) == {(2, *expected)}


def test_rows_have_slots_for_the_images_of_a_question(encoder):
    step = Counter()
    spec = dataclasses.replace(SPEC, max_slots=8, image_buckets=(0, 2))
    asked = question(58)
    asked.prompt = prompt_of([1, 3, 3, 6], images=2)
    asked.pixels = np.zeros((2, 3, 8, 8), np.uint8)
    generator(encoder, step, spec=spec).generate([asked])
    assert set(step.shapes) == {(2, 64, 2)}


def test_later_turns_are_shown_too(encoder):
    ids = encoder.encode_text(RECORD).input_ids
    predicted = dict.fromkeys(range(4), np.r_[ids[1:], 0])
    asked = questions_of(ListRecords([RECORD] * 4), predicted, encoder, 4)
    assert [(q.index, q.turn) for q in asked] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    asked = questions_of(ListRecords([RECORD] * 4), predicted, encoder, 6)
    assert [(q.index, q.turn) for q in asked] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 1)]


def test_an_answer_that_is_cut_is_compared_with_a_part_of_the_expected_answer(encoder):
    expected = encoder.tokenizer("a b c d e f g h", add_special_tokens=False).input_ids
    right = expected[: len(expected) // 2]
    asked = question(right[0], limit=len(right))
    asked.tokens, asked.expected = [*right], np.array(expected, np.int32)
    (found,) = generator(encoder, Counter()).generate([asked])
    assert found.is_cut
    assert found.f1 == 1.0
    assert found.expected.startswith(found.given)


def test_a_record_has_one_question_for_each_answer(encoder):
    encoded = encoder.encode_text(RECORD)
    ids, mask = encoded.input_ids, encoded.loss_mask
    predicted = np.r_[ids[1:], 0]
    first, second = answers_of(mask)
    assert not {*first} & {*second}
    wrong = second[1]  # the second token of the second answer
    predicted[wrong - 1] = 9
    one, two = questions_of(ListRecords([RECORD]), {0: predicted}, encoder, 10)
    assert (one.text, two.text, one.turn, two.turn) == ("one?", "two?", 0, 1)
    assert one.tokens == one.expected.tolist() == ids[first].tolist()
    assert two.tokens == [ids[second[0]], 9]
    assert two.prompt.input_ids.tolist() == ids[: second[0]].tolist()
    assert two.limit == 2 + min(MAX_NEW_TOKENS, len(second) - 2 + MORE_TOKENS)
    tight = dataclasses.replace(encoder, max_length=len(ids))
    assert questions_of(ListRecords([RECORD]), {0: predicted}, tight, 10)[1].limit == len(second)
    (chosen,) = questions_of(ListRecords([RECORD]), {0: predicted}, encoder, 1)
    assert chosen.turn == 0
    assert questions_of(ListRecords([RECORD]), {}, encoder, 3) == []


def test_masked_answers_do_not_shift_the_questions(encoder, monkeypatch):
    """For example, if only the last answer of a conversation is learned."""
    encoded = encoder.encode_text(RECORD)
    mask = encoded.loss_mask.copy()
    mask[answers_of(mask)[0]] = False
    last = dataclasses.replace(encoded, loss_mask=mask)
    monkeypatch.setattr(SampleEncoder, "encode_text", lambda *_: last)
    predicted = np.r_[encoded.input_ids[1:], 0]
    (found,) = questions_of(ListRecords([RECORD]), {0: predicted}, encoder, 10)
    assert found.text == "two?"
