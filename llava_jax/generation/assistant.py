"""Answers to conversations, from any checkpoint: text as it comes, of several at a time."""

import dataclasses
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Literal

import jax
from transformers import PreTrainedTokenizerBase

from llava_jax.config import MeshConfig, Quantisation
from llava_jax.data.conversation import SampleError
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError
from llava_jax.generation.engine import Engine, Request
from llava_jax.generation.prompts import Prompt, PromptReader, special_tokens
from llava_jax.generation.sampling import GREEDY, Sampling
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.processor import has_processor
from llava_jax.pretrained.resolve import Checkpoint, quantisation_of

MAX_LENGTH = 2048
"""Tokens of prompt and answer together, unless more or fewer are asked for; as in training."""


_BYTE = re.compile("<0x[0-9A-F]{2}>")  # as SentencePiece names them


def default_dtype() -> str:
    """What is computed in where nobody says: CPUs are slow in 16 bits."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer that is whole.

    Attributes:
        text: Without the spaces around it.
        ending: Whether the model ended it, or its length.
        prompt_tokens: Of the prompt, images expanded.
        new_tokens: Of the answer.
    """

    text: str
    ending: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


class Answer:
    """An answer that is being generated.

    Attributes:
        request: Its tokens.
        text: What is certain of it so far: no half of a character, nothing of a stop string.
        ending: Why it is over; None while it is not.
    """

    def __init__(
        self, request: Request, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
    ):
        self.request = request
        self.text = ""
        self.ending: Literal["stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._stop = tuple(filter(None, stop))

    def update(self) -> None:
        """Takes in the tokens that were generated since."""
        tokens = self.request.tokens
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()
        # What was certain before has none in it, and only its end may be the begin of one.
        found = [
            position
            for word in self._stop
            if (position := text.find(word, max(0, len(self.text) - len(word)))) >= 0
        ]
        self.ending = "stop" if found else self.request.ending
        if found:
            self.text = text[: min(found)]
        elif self.ending:
            self.text = text
        else:
            self.text = text[: len(text) - self._uncertain(text)]

    def _uncertain(self, text: str) -> int:
        """Characters at the end that later tokens may change, or make a stop string of."""
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        # SentencePiece's bytes are characters if all that are beside each other are valid together.
        if count := self._newest_bytes():
            before = self._tokenizer.decode(self.request.tokens[:-count], skip_special_tokens=True)
            unfinished = max(unfinished, len(text) - len(str(before).lstrip()))
        begun = [
            size
            for word in self._stop
            for size in range(1, min(len(word), len(text) + 1))
            if text.endswith(word[:size])
        ]
        return max([unfinished, *begun])

    def _newest_bytes(self) -> int:
        """How many of the newest tokens are a byte each, or nothing."""
        for count, token in enumerate(reversed(self.request.tokens)):
            name = self._tokenizer.convert_ids_to_tokens(token)  # None beyond the vocabulary
            if name and token not in self._special and not _BYTE.fullmatch(str(name)):
                return count
        return len(self.request.tokens)

    @property
    def reply(self) -> Reply:
        """The answer as a whole; it must be over."""
        return Reply(
            self.text.strip(),
            self.ending or "length",
            len(self.request.input_ids),
            len(self.request.tokens),
        )


class Assistant:
    """A model that answers, several conversations at a time.

    Args:
        model: A model with its weights.
        reader: Turns prompts into the model's inputs.
        slots: Most conversations at a time.
        max_length: Longest conversation in tokens, with images expanded and the answer.
        donate: Whether to take the weights out of the model, see `generation.engine.Engine`.
    """

    def __init__(
        self,
        model: LlavaModel,
        reader: PromptReader,
        *,
        slots: int,
        max_length: int,
        donate: bool = False,
    ):
        self.reader, self.max_length = reader, max_length
        self._engine = Engine(model, slots=slots, length=max_length, donate=donate)
        self._answers: dict[Request, Answer] = {}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        quantize: Quantisation | Literal["as_trained"] | None = "as_trained",
        slots: int = 8,
        max_length: int | None = None,
    ) -> "Assistant":
        """Loads a checkpoint onto all devices.

        Args:
            checkpoint: What `resolve` has found.
            dtype: Dtype of the weights and the computation; None is bfloat16, on a CPU float32.
            quantize: How the decoder's linears are quantised. "as_trained" takes what the run that
                made the checkpoint has used.
            slots: Largest number of conversations at a time.
            max_length: Largest length of a conversation in tokens; None is what the model takes, at
                most `MAX_LENGTH`.

        Raises:
            ConfigError: The model does not take this length.
            CheckpointError: The checkpoint cannot be used.
        """
        dtype = dtype or default_dtype()
        base, adapter = checkpoint.base, checkpoint.adapter
        bits = quantisation_of(adapter or base) if quantize == "as_trained" else quantize
        mesh = make_mesh(MeshConfig(fsdp=1, tensor=-1))
        model = LlavaModel.from_checkpoint(checkpoint, dtype, mesh, bits)
        place = adapter if adapter is not None and has_processor(adapter) else base
        llm = model.config.llm
        most = min(llm.max_position_embeddings, llm.sliding_window or 2**31)
        length = min(most, MAX_LENGTH) if max_length is None else max_length
        if not 2 <= length <= most:
            raise ConfigError(f"a length of {length} tokens: this model takes from 2 to {most}")
        reader = PromptReader.open(place, model.config)
        return cls(model, reader, slots=slots, max_length=length, donate=True)

    @property
    def free(self) -> int:
        """Answers that may be added."""
        return self._engine.free

    def begin(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Reads a prompt, without generating anything yet; may be called from any thread.

        Args:
            prompt: The conversation.
            max_new_tokens: Most tokens of the answer.
            sampling: How tokens are chosen.
            stop: Texts that end the answer, and are not in it.

        Raises:
            SampleError: It cannot be used: a broken image, turns out of order, too long.
        """
        input_ids, pixels = self.reader(prompt, self._engine.check)
        request = Request(input_ids, pixels, max_new_tokens, self.reader.ends, sampling)
        return Answer(request, self.reader.tokenizer, stop)

    def is_compiled(self, answer: Answer) -> bool:
        """Whether nothing has to be compiled before it can be added."""
        return self._engine.is_compiled(answer.request)

    def compile(self, answer: Answer) -> None:
        """Compiles what its prompt needs, unless that is done; may be called from any thread."""
        self._engine.compile(answer.request)

    def add(self, answer: Answer) -> None:
        """Generates an answer's first token; one must be `free`."""
        self._answers[answer.request] = answer
        self._engine.add(answer.request)
        self._update(answer)

    def step(self) -> list[Answer]:
        """Generates a token of every answer that is not over, and returns these."""
        answers = [self._answers[request] for request in self._engine.step()]
        for answer in answers:
            self._update(answer)
        return answers

    def remove(self, answer: Answer) -> None:
        """Gives an answer up."""
        self._engine.remove(answer.request)
        self._answers.pop(answer.request, None)

    def reset(self) -> None:
        """Gives all answers up, and starts anew: after an error, nothing can be gone on with."""
        self._answers.clear()
        self._engine.reset()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Generator[str]:
        """Yields an answer piece by piece. As `begin`."""
        answer = self.begin(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        sent = 0
        try:
            self.add(answer)
            while True:
                if piece := answer.text[sent:]:
                    sent += len(piece)
                    yield piece
                if answer.ending:
                    return
                self.step()
        finally:
            self.remove(answer)

    def answer_all(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        refused: Callable[[int, SampleError], None] | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """Answers many prompts, taking the next when one is over. As `begin`.

        Args:
            prompts: Conversations; one is taken when there is a place for it.
            max_new_tokens: Most tokens of an answer.
            sampling: How tokens are chosen.
            stop: Texts that end an answer.
            refused: Told of each prompt that cannot be used; None lets it end all.

        Yields:
            The number of a prompt, and its answer, in the order in which they end.
        """
        waiting = enumerate(prompts)
        numbers: dict[Answer, int] = {}
        try:
            while True:
                while self.free and (new := next(waiting, None)) is not None:
                    try:
                        answer = self.begin(
                            new[1], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
                        )
                    except SampleError as error:
                        if refused is None:
                            raise
                        refused(new[0], error)
                        continue
                    numbers[answer] = new[0]
                    self.add(answer)
                over = [answer for answer in numbers if answer.ending]
                for answer in over:
                    yield numbers.pop(answer), answer.reply
                if not over and not self.step():
                    return
        finally:
            for answer in numbers:  # if this ends before they do
                self.remove(answer)

    def _update(self, answer: Answer) -> None:
        answer.update()
        if answer.ending:
            self.remove(answer)
