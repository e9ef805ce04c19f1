"""Generates the model's answers to some eval questions, with the eval step of the run.

The eval step predicts the next token of a row if this token is marked as supervised. So it can also
generate: each call adds one token to the answers of a batch. This needs no other program, no copy
of the weights and no cache, and therefore no memory beside that of an evaluation. It works wherever
the weights are: on one device, sharded, quantized or in host memory. A call costs a whole forward
pass, but few calls are needed: up to its first wrong token, an answer is known from the evaluation
itself, because greedy decoding gives the expected tokens until then.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from llava_jax.config import NO_FEATURE
from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec, fill
from llava_jax.data.conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, encode_prompt
from llava_jax.data.image_tokens import Expanded
from llava_jax.data.records import Record
from llava_jax.data.samples import Sample, SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.errors import SampleError
from llava_jax.generation.overlap import token_f1
from llava_jax.train_step.step import EvalResult

MAX_NEW_TOKENS = 64
"""Maximum number of tokens that are generated after the first wrong token of an answer."""
MORE_TOKENS = 16
"""Number of tokens that an answer may have more than the expected answer. So the answers to
questions with short answers cost little."""


@dataclasses.dataclass(frozen=True)
class Example:
    """An eval question and the model's answer.

    Attributes:
        question: Text of the question.
        expected: Expected answer.
        given: Answer of the model, by greedy decoding after the expected answers to the earlier
            questions of the record.
        index: Index of the record that contains the question.
        turn: Number of the question among the questions of the record, from 0.
        images: Number of images in the record.
        right: Whether greedy decoding gives exactly the expected answer.
        f1: Token F1 of the answer; None in files that older versions wrote. An answer that is cut
            is compared with as many tokens of the expected answer.
        is_cut: Whether the answer has more tokens, which were not generated.
    """

    question: str
    expected: str
    given: str
    index: int = -1  # files that older versions wrote lack the fields from here on
    turn: int = 0
    images: int = 0
    right: bool = False
    f1: float | None = None
    is_cut: bool = False


@dataclasses.dataclass(eq=False)
class Question:
    """A question of an eval record, with the answer that is being generated.

    Attributes:
        index: Index of the record.
        turn: Number of the question among the questions of the record, from 0.
        record: Record that contains the question.
        text: Text of the question, without image placeholders.
        prompt: Tokens before the answer.
        expected: Token ids of the expected answer, int32 [N].
        tokens: Tokens of the answer so far.
        limit: Maximum number of tokens of the answer.
        pixels: Pixels of the image slots of the prompt, uint8 [M, 3, H, W]; None until they are
            needed.
    """

    index: int
    turn: int
    record: Record
    text: str
    prompt: Expanded
    expected: np.ndarray
    tokens: list[int] = dataclasses.field(default_factory=list)
    limit: int = 0
    pixels: np.ndarray | None = None

    @property
    def start(self) -> int:
        """Number of tokens before the answer."""
        return len(self.prompt.input_ids)


def answers_of(learned: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of each answer: of each sequence of consecutive True values.

    Args:
        learned: Mask of the supervised positions of a row, bool [T].
    """
    positions = np.flatnonzero(learned)
    if not len(positions):
        return []
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def questions_of(
    records: Records, predicted: Mapping[int, np.ndarray], encoder: SampleEncoder, count: int
) -> list[Question]:
    """Returns questions of some records, with the tokens that the evaluation has predicted.

    Args:
        records: Eval records.
        predicted: Predicted tokens of each record, `EvalResult.predicted`, by record index.
        encoder: Encoder that made the evaluated batches.
        count: Number of questions. If the records have more, each record has about the same number
            of questions, and the turns of the questions differ: of the n-th record with k
            questions, question n mod k comes first.
    """
    ranked = []
    for number, index in enumerate(sorted(predicted)):
        found = _questions(index, records[index], encoder)
        ranked += [((q.turn - number) % len(found), q) for q in found]
    ranked.sort(key=lambda item: item[0])  # a stable sort, so each rank is in the order of records
    chosen = [question for _, question in ranked[:count]]
    chosen.sort(key=lambda question: (question.index, question.turn))
    for question in chosen:
        start = question.start - 1
        greedy = predicted[question.index][start : start + len(question.expected)]
        # After a wrong token, greedy decoding continues from the wrong token, but the evaluation
        # continued from the expected token.
        wrong = np.flatnonzero(greedy != question.expected)
        question.tokens = greedy[: wrong[0] + 1 if len(wrong) else None].tolist()
        known, room = len(question.tokens), encoder.max_length - question.start
        new = min(MAX_NEW_TOKENS, len(question.expected) - known + MORE_TOKENS)
        question.limit = min(known + new, room)
    return chosen


def _questions(index: int, record: Record, encoder: SampleEncoder) -> list[Question]:
    """Returns all questions of a record that have an answer."""
    encoded = encoder.encode_text(record)
    texts, features = _texts(record, encoder), encoder.model.image_tokens
    found = []
    for turn, at in enumerate(answers_of(encoded.loss_mask)):
        prompt = encoded.first(int(at[0]), features)
        text = texts.get(at[0], "")
        found.append(Question(index, turn, record, text, prompt, encoded.input_ids[at]))
    return found


def _texts(record: Record, encoder: SampleEncoder) -> dict[int, str]:
    """Returns the text of each question, by the number of tokens before its answer.

    Answers may be masked, so the n-th answer that is learned need not belong to the n-th question.
    """
    texts, image = {}, encoder.model.image_token_id
    for number, turn in enumerate(record.turns, 1):
        if turn.role == "human":
            asked = record.turns[:number]
            prompt = encode_prompt(
                asked,
                encoder.template,
                encoder.tokenizer,
                image,
                video_token_id=encoder.video_token_id,
            )
            prompt = encoder.expand(record, prompt)
            text = turn.text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "")
            texts[len(prompt.input_ids)] = text.strip()
    return texts


class AnswerGenerator:
    """Generates the model's answers to eval questions.

    Args:
        eval_step: Function that runs the compiled eval step on a host batch.
        encoder: Encoder that made the evaluated batches.
        spec: Shapes of eval batches.
        ends: Ids of the tokens that end an answer.
        rows: Indices of the rows of a batch that this process fills.
        shapes: Shapes for which the eval step is already compiled: numbers of tokens and of image
            slots in a row.
    """

    def __init__(
        self,
        eval_step: Callable[[Batch], EvalResult],
        encoder: SampleEncoder,
        spec: BatchSpec,
        ends: Collection[int],
        rows: Sequence[int],
        shapes: Collection[tuple[int, int]] = (),
    ):
        self._eval_step, self._encoder, self._spec = eval_step, encoder, spec
        self._ends, self._rows, self._shapes = ends, rows, sorted(shapes)
        # A template such as "plain" ends answers by a text and not by a control token.
        suffix = encoder.template.answer_suffix
        self._stop = "" if "{" in suffix else suffix

    def generate(
        self, questions: Sequence[Question], halted: Callable[[], bool] = lambda: False
    ) -> list[Example]:
        """Generates the answers greedily, several at the same time, and returns the examples.

        All processes must call this with the same questions.

        Args:
            questions: Questions with the first tokens of their answers.
            halted: Function that decides whether to stop; it is called before each token. If it
                returns True, the remaining answers stay as they are.
        """
        size = self._spec.size
        while (running := [q for q in questions if not self._is_done(q)][:size]) and not halted():
            predicted = jax.device_get(self._eval_step(self._batch(running)).predicted)
            for question, row in zip(running, predicted, strict=False):
                last = question.start + len(question.tokens) - 1
                question.tokens.append(int(row[last]))
        return [self._example(question) for question in questions]

    def _is_done(self, question: Question) -> bool:
        return len(question.tokens) >= question.limit or self._has_ended(question)

    def _has_ended(self, question: Question) -> bool:
        """Returns True if the model has ended its answer."""
        if question.tokens[-1] in self._ends:
            return True
        return bool(self._stop) and self._stop in self._decode(question.tokens).lstrip()

    def _batch(self, questions: Sequence[Question]) -> Batch:
        """Returns a batch whose rows predict the next token of each answer."""
        # The last token is a placeholder for the token that is predicted.
        blank = [self._spec.pad_token_id]
        tokens = [np.array([*q.prompt.input_ids, *q.tokens, *blank], np.int32) for q in questions]
        own = [
            {row: self._sample(questions[row], tokens[row])} if row < len(questions) else {}
            for row in self._rows
        ]
        needed = max(sum(question.prompt.slots) for question in questions)
        length, slots = self._shape(max(map(len, tokens)), needed)
        return fill(own, len(own), dataclasses.replace(self._spec, max_slots=slots), length)

    def _shape(self, tokens: int, needed: int) -> tuple[int, int]:
        """Returns the length and the image slots of rows, if possible those of a compiled step."""
        for length, slots in self._shapes:
            if length >= tokens and slots >= needed:
                return length, slots
        length = self._spec.bucket(tokens)
        return length, self._spec.image_bucket(needed, length)

    def _sample(self, question: Question, tokens: np.ndarray) -> Sample:
        if question.pixels is None:
            question.pixels = np.zeros((0, 3, *self._spec.image_size), np.uint8)
            # The evaluation has read the images, so an image is missing only if it was removed now.
            with contextlib.suppress(SampleError):
                question.pixels = self._encoder.add_images(
                    question.record, question.prompt
                ).pixel_values
        is_last = np.arange(len(tokens)) == len(tokens) - 1
        new = [(0, len(tokens) - question.start), (0, 0)]
        index = np.pad(question.prompt.feature_index, new, constant_values=NO_FEATURE)
        weights = np.pad(question.prompt.feature_weights, new)
        return Sample(tokens, is_last, index, weights, question.pixels)

    def _example(self, question: Question) -> Example:
        answer, is_cut = question.expected.tolist(), not self._has_ended(question)
        expected = self._decode(answer).strip()
        right = question.tokens == answer
        given = expected if right else self._text(question.tokens)
        # A part of an answer can only share words with the same part of the expected answer.
        compared = self._decode(answer[: len(question.tokens)]).strip() if is_cut else expected
        return Example(
            question=question.text,
            expected=expected,
            given=given,
            index=question.index,
            turn=question.turn,
            images=len(question.record.images),
            right=right,
            f1=token_f1(given, compared),
            is_cut=is_cut,
        )

    def _text(self, tokens: list[int]) -> str:
        """Returns the text of an answer, without the text that ends it."""
        text = self._decode(tokens).strip()
        return text.partition(self._stop)[0].strip() if self._stop else text

    def _decode(self, tokens: list[int]) -> str:
        return str(self._encoder.tokenizer.decode(tokens, skip_special_tokens=True))
