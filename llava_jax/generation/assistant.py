"""Loads the model of a checkpoint and answers several conversations at the same time."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Literal

import jax

from llava_jax.config import MeshConfig, ModelConfig, Quantisation
from llava_jax.data.tiles import max_image_tokens
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.answer import Answer, Reply
from llava_jax.generation.decoder import Structure, Weights, unstack_layers
from llava_jax.generation.engine import Engine, Request
from llava_jax.generation.prompts import Prompt, PromptReader
from llava_jax.generation.sampling import GREEDY, Sampling
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.resolve import Checkpoint, quantisation_of

MAX_LENGTH = 2048
"""Default limit of the number of tokens of prompt and answer together, as in training."""
TEXT_TOKENS = 1024
"""Number of tokens of texts that fit beside an image of any size by default."""


def default_dtype() -> str:
    """Returns "float32" on CPUs, where bfloat16 is slow, and "bfloat16" on other devices."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def choose_length(config: ModelConfig, max_length: int | None) -> int:
    """Returns the largest number of tokens of a conversation.

    Args:
        config: Sizes of the model.
        max_length: Wanted number; None takes the largest number that the model supports, but at
            most `MAX_LENGTH`, or an image of any size and `TEXT_TOKENS`.

    Raises:
        ConfigError: The model does not support conversations of this length.
    """
    most = min(config.llm.context_length, config.llm.sliding_window or 2**31)
    usual = max(MAX_LENGTH, max_image_tokens(config) + TEXT_TOKENS)
    length = min(most, usual) if max_length is None else max_length
    if not 2 <= length <= most:
        raise ConfigError(
            f"a length of {length} tokens is not supported; this model takes 2 to {most} tokens"
        )
    return length


class Assistant:
    """A model that answers several conversations at the same time.

    Args:
        model: Model with its weights.
        reader: Reader that turns prompts into the model's inputs.
        slots: Largest number of conversations at the same time.
        max_length: Largest number of tokens of a conversation, including its images and its answer.
        donate: Whether to move the weights out of `model`; see `generation.engine.Engine`.
        unstacked: Weights of the model; see `generation.engine.Engine`.
    """

    def __init__(
        self,
        model: LlavaModel,
        reader: PromptReader,
        *,
        slots: int,
        max_length: int,
        donate: bool = False,
        unstacked: tuple[Structure, Weights] | None = None,
    ):
        self.reader, self.max_length = reader, max_length
        self._engine = Engine(
            model, slots=slots, length=max_length, donate=donate, unstacked=unstacked
        )
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
        template: str | None = None,
    ) -> "Assistant":
        """Loads a checkpoint, sharded over all devices.

        Args:
            checkpoint: Result of `pretrained.resolve.resolve`.
            dtype: Dtype of the weights and the computation; None takes `default_dtype()`.
            quantize: Quantization of the decoder's linear layers. "as_trained" takes the
                quantization of the run that wrote the checkpoint; None does not quantize.
            slots: Largest number of conversations at the same time.
            max_length: Largest number of tokens of a conversation, as in `choose_length`.
            template: Name or file of the chat template, as in `read_chat_template`; None takes the
                checkpoint's own.

        Raises:
            ConfigError: The model does not support conversations of this length, or there is no
                such chat template.
            CheckpointError: The checkpoint cannot be used.
        """
        bits = quantize
        if bits == "as_trained":
            bits = quantisation_of(checkpoint.adapter or checkpoint.base)
        (assistant,) = cls.load_all(
            [checkpoint],
            dtype=dtype,
            quantize=bits,
            slots=slots,
            max_length=max_length,
            template=template,
        )
        return assistant

    @classmethod
    def load_all(
        cls,
        checkpoints: Sequence[Checkpoint],
        *,
        dtype: str | None,
        quantize: Quantisation | None,
        slots: int,
        max_length: int | None,
        template: str | None,
    ) -> list["Assistant"]:
        """Loads checkpoints that have the same base; the base is in memory only once.

        Args:
            checkpoints: Checkpoints with or without an adapter.
            dtype: Dtype, as in `load`.
            quantize: Quantization of the decoder's linear layers; None does not quantize.
            slots: Largest number of conversations with each checkpoint at the same time.
            max_length: Largest number of tokens of a conversation, as in `load`.
            template: Chat template of all checkpoints, as in `load`.

        Raises:
            ConfigError: See `load`.
            CheckpointError: A checkpoint cannot be used.
        """
        mesh = make_mesh(MeshConfig(fsdp=1, tensor=-1))
        models = LlavaModel.from_checkpoints(
            checkpoints, dtype=dtype or default_dtype(), mesh=mesh, quantize=quantize
        )
        length = choose_length(models[0].config, max_length)
        readers = []
        for model in models:
            assert model.processor_source is not None
            readers.append(PromptReader.open(model.processor_source, model.config, template))
            model.adapter = None  # so that models with similar adapters share compiled programs
        unstacked = unstack_layers(models, donate=True)
        return [
            cls(model, reader, slots=slots, max_length=length, unstacked=weights)
            for model, reader, weights in zip(models, readers, unstacked, strict=True)
        ]

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
        wants_scores: bool = False,
    ) -> Answer:
        """Returns an answer that has no text yet; `add` starts to generate the text.

        Any thread may call this method.

        Args:
            prompt: Conversation that waits for an answer.
            max_new_tokens: Largest number of tokens of the answer.
            sampling: Settings by which tokens are chosen.
            stop: Texts that end the answer and are not part of it.
            wants_scores: Whether to compute the log probabilities of the tokens, which are then in
                `request.scores` of the answer.

        Raises:
            SampleError: The prompt cannot be used: for example, an image is broken, turns are out
                of order, or the prompt is too long.
        """
        inputs = self.reader(prompt, self._engine.check)
        request = Request(inputs, max_new_tokens, self.reader.ends, sampling)
        request.scores = [] if wants_scores else None
        return Answer(request, self.reader.tokenizer, stop, continues=prompt.continues)

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
