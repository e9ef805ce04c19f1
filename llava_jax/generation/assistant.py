"""Loads the model of a checkpoint and answers several conversations at the same time."""

import dataclasses
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Literal

import jax
from transformers import PreTrainedTokenizerBase

from llava_jax.config import MeshConfig, Quantisation
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.engine import Engine, Request
from llava_jax.generation.prompts import Prompt, PromptReader, special_tokens
from llava_jax.generation.sampling import GREEDY, Sampling
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.processor import has_processor
from llava_jax.pretrained.resolve import Checkpoint, quantisation_of

MAX_LENGTH = 2048
"""Default limit of the number of tokens of prompt and answer together, as in training."""


_BYTE = re.compile("<0x[0-9A-F]{2}>")  # the names of SentencePiece's byte tokens


def default_dtype() -> str:
    """Returns "float32" on CPUs, where bfloat16 is slow, and "bfloat16" on other devices."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Reply:
    """A complete answer.

    Attributes:
        text: Text of the answer, without white space at its start and end.
        ending: "stop" if the model or a stop string ended the answer, "length" if the answer
            reached its largest length.
        prompt_tokens: Number of tokens of the prompt, with images expanded.
        new_tokens: Number of tokens of the answer.
    """

    text: str
    ending: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


class Answer:
    """An answer that is being generated.

    Attributes:
        request: Request for which the tokens are generated.
        text: Text generated so far, without the part at its end that may still change: an
            incomplete character, or the beginning of a stop string.
        ending: "stop" or "length", as in `Reply`; None while the answer is being generated.
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
        """Sets `text` and `ending` from the tokens that were generated so far."""
        tokens = self.request.tokens
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()
        # The text of the last call contains no complete stop string, but its end may be the
        # beginning of a stop string. So the search for a stop string starts before the end of the
        # old text, by the length of the stop string.
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
        """Counts the last characters of a text that may still change or begin a stop string."""
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        # SentencePiece decodes adjacent byte tokens together: one invalid byte turns the characters
        # of all these tokens into replacement characters.
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
        """Counts the byte tokens, and special tokens without text, at the end of the answer."""
        for count, token in enumerate(reversed(self.request.tokens)):
            name = self._tokenizer.convert_ids_to_tokens(token)  # None if unknown
            if name and token not in self._special and not _BYTE.fullmatch(str(name)):
                return count
        return len(self.request.tokens)

    @property
    def reply(self) -> Reply:
        """Returns the complete answer. The answer must have ended."""
        return Reply(
            self.text.strip(),
            self.ending or "length",
            len(self.request.input_ids),
            len(self.request.tokens),
        )


class Assistant:
    """A model that answers several conversations at the same time.

    Args:
        model: Model with its weights.
        reader: Reader that turns prompts into the model's inputs.
        slots: Largest number of conversations at the same time.
        max_length: Largest number of tokens of a conversation, including its images and its answer.
        donate: Whether to move the weights out of `model`; see `generation.engine.Engine`.
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
        """Loads a checkpoint, sharded over all devices.

        Args:
            checkpoint: Result of `pretrained.resolve.resolve`.
            dtype: Dtype of the weights and the computation; None takes `default_dtype()`.
            quantize: Quantization of the decoder's linear layers. "as_trained" takes the
                quantization of the run that wrote the checkpoint; None does not quantize.
            slots: Largest number of conversations at the same time.
            max_length: Largest number of tokens of a conversation; None takes the largest number
                that the model supports, but at most `MAX_LENGTH`.

        Raises:
            ConfigError: The model does not support conversations of this length.
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
            raise ConfigError(
                f"a length of {length} tokens is not supported; this model takes 2 to {most} tokens"
            )
        reader = PromptReader.open(place, model.config)
        return cls(model, reader, slots=slots, max_length=length, donate=True)

    @property
    def free(self) -> int:
        """Returns the number of answers that can be added."""
        return self._engine.free

    def begin(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Returns an answer that has no text yet; `add` starts to generate the text.

        Any thread may call this method.

        Args:
            prompt: Conversation that waits for an answer.
            max_new_tokens: Largest number of tokens of the answer.
            sampling: Settings by which tokens are chosen.
            stop: Texts that end the answer and are not part of it.

        Raises:
            SampleError: The prompt cannot be used: for example, an image is broken, turns are out
                of order, or the prompt is too long.
        """
        input_ids, pixels = self.reader(prompt, self._engine.check)
        request = Request(input_ids, pixels, max_new_tokens, self.reader.ends, sampling)
        return Answer(request, self.reader.tokenizer, stop)

    def is_compiled(self, answer: Answer) -> bool:
        """Returns True if the program that `add` needs for this answer is compiled."""
        return self._engine.is_compiled(answer.request)

    def compile(self, answer: Answer) -> None:
        """Compiles the program that `add` needs, unless this was done. Any thread may call it."""
        self._engine.compile(answer.request)

    def add(self, answer: Answer) -> None:
        """Generates the first token of an answer. At least one slot must be `free`."""
        self._answers[answer.request] = answer
        self._engine.add(answer.request)
        self._update(answer)

    def step(self) -> list[Answer]:
        """Generates one token for every running answer, and returns these answers."""
        answers = [self._answers[request] for request in self._engine.step()]
        for answer in answers:
            self._update(answer)
        return answers

    def remove(self, answer: Answer) -> None:
        """Stops an answer before its end; does nothing if the answer has ended."""
        self._engine.remove(answer.request)
        self._answers.pop(answer.request, None)

    def reset(self) -> None:
        """Stops all answers.

        This is needed after an error in `add` or `step`, because no answer can continue then.
        """
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
        """Yields the text of an answer piece by piece; takes the same arguments as `begin`."""
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
        """Answers many prompts, several prompts at the same time.

        Args:
            prompts: Conversations; the next conversation is read whenever a slot is free.
            max_new_tokens: Largest number of tokens of an answer.
            sampling: Settings by which tokens are chosen.
            stop: Texts that end an answer and are not part of it.
            refused: Function that takes the index and the error of a prompt that cannot be used;
                None raises the error.

        Yields:
            The index of a prompt and its answer, in the order in which answers end.

        Raises:
            SampleError: A prompt cannot be used, and `refused` is None.
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
            for answer in numbers:  # the caller may stop before all answers have ended
                self.remove(answer)

    def _update(self, answer: Answer) -> None:
        """Updates an answer with its new tokens, and removes the answer if it has ended."""
        answer.update()
        if answer.ending:
            self.remove(answer)
