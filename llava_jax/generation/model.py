"""Defines the public class `LlavaModel`: a model with its weights that also answers questions."""

from collections.abc import Iterator, Sequence
from typing import Literal, overload
from weakref import WeakKeyDictionary

from llava_jax.config import format_source
from llava_jax.errors import ConfigError
from llava_jax.generation.assistant import Assistant, choose_length
from llava_jax.generation.messages import ImageSource, Messages, to_prompt
from llava_jax.generation.prompts import PromptReader
from llava_jax.generation.sampling import Sampling
from llava_jax.models.layers import split
from llava_jax.models.lora import adapters_in, count_values
from llava_jax.models.paths import is_adapter
from llava_jax.pretrained import model

MAX_NEW_TOKENS = 512
"""Default of the largest number of tokens of an answer, as in `llava-jax chat`."""


class LlavaModel(model.LlavaModel):
    """A LLaVA model with its weights. Calling the model returns the logits of all tokens.

    Attributes:
        source: Directory or parts that the base was loaded from.
        adapter: Path of the adapter that was loaded last; None if no adapter was loaded.
    """

    def __repr__(self) -> str:
        """Returns a few lines: source, sizes, dtype and adapters."""
        _, params = split(self)
        vision, llm = self.config.vision, self.config.llm
        sizes = {"config": self.config, "adapters": adapters_in(self)}
        count = lambda paths: f"{count_values({p: params[p] for p in paths}, **sizes):,}"
        adapters = [path for path in params if is_adapter(path)]
        kinds = {str(getattr(leaf, "kind", self.dtype)) for leaf in params.values()}
        lines = [
            f"source: {format_source(self.source) if self.source else 'none'}",
            f"vision tower: {vision.model_type}, {vision.num_hidden_layers} layers, images of "
            f"{vision.image_size} x {vision.image_size} pixels, {self.config.image_tokens} tokens "
            "per image",
            f"decoder: {llm.model_type}, {llm.num_hidden_layers} layers, hidden size "
            f"{llm.hidden_size}, vocabulary of {llm.vocab_size:,} tokens",
            f"parameters: {count(params.keys() - {*adapters})} ({', '.join(sorted(kinds))})",
        ]
        if adapters:
            targets = sorted({path.split(".")[-2] for path in adapters})
            lines.append(f"adapters: {count(adapters)} parameters on {', '.join(targets)}")
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    @overload
    def chat(
        self,
        messages: str | Messages,
        images: ImageSource | Sequence[ImageSource] = ...,
        *,
        max_new_tokens: int = ...,
        max_length: int | None = ...,
        stream: Literal[False] = ...,
        stop: Sequence[str] = ...,
        **sampling: float | int | None,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: str | Messages,
        images: ImageSource | Sequence[ImageSource] = ...,
        *,
        max_new_tokens: int = ...,
        max_length: int | None = ...,
        stream: Literal[True],
        stop: Sequence[str] = ...,
        **sampling: float | int | None,
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: str | Messages,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_length: int | None = None,
        stream: bool = False,
        stop: Sequence[str] = (),
        **sampling: float | int | None,
    ) -> str | Iterator[str]:
        """Answers a question or continues a conversation.

        The tokenizer, the image processor and the chat template are those of the checkpoint, or of
        the adapter if it has its own. During the call, the weights of the decoder's blocks are in
        memory twice.

        Args:
            messages: Question, or messages as dicts with "role" and "content", as for
                `apply_chat_template`. An image part may contain its image as "image" or "path".
            images: One image or several: PIL images, paths, data URLs or contents of image files,
                for the image parts without an image and for each `<image>` in the text. If there is
                neither, the images are placed before the question.
            max_new_tokens: Largest number of tokens of the answer.
            max_length: Largest number of tokens of the conversation, its images and the answer
                together; None takes the largest number that the model supports, at most 2,048.
            stream: Whether to return an iterator over pieces of the answer, as they are generated.
            stop: Texts that end the answer and are not part of it.
            sampling: `temperature`, `top_k`, `top_p`, `repetition_penalty` and `seed`, as in
                `generate`. By default, the most likely token is always chosen.

        Returns:
            The answer, or an iterator over its pieces if `stream` is True.

        Raises:
            SampleError: The messages or the images cannot be used, or are too long.
            ConfigError: A setting has a value that is not allowed.
            CheckpointError: The checkpoint has no tokenizer or image processor that can be used.
        """
        prompt, chosen = to_prompt(messages, images), _sampling(max_new_tokens, sampling)
        pieces = self._assistant(1, max_length).stream(
            prompt, max_new_tokens=max_new_tokens, sampling=chosen, stop=stop
        )
        return pieces if stream else "".join(pieces).strip()

    def generate_batch(
        self,
        conversations: Sequence[str | Messages],
        images: Sequence[ImageSource | Sequence[ImageSource]] | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_length: int | None = None,
        batch_size: int = 8,
        stop: Sequence[str] = (),
        **sampling: float | int | None,
    ) -> list[str]:
        """Answers several questions or conversations. The answers do not depend on each other.

        Args:
            conversations: Questions, or lists of messages, as in `chat`.
            images: Image or images of each conversation, as in `chat`; None if no images are given
                beside the messages.
            max_new_tokens: Largest number of tokens of an answer.
            max_length: Largest number of tokens of a conversation, as in `chat`.
            batch_size: Largest number of answers that are generated at the same time.
            stop: Texts that end an answer and are not part of it.
            sampling: Sampling settings, as in `chat`.

        Returns:
            The answers, in the order of the conversations.

        Raises:
            SampleError: A conversation cannot be used, as in `chat`.
            ConfigError: A setting has a value that is not allowed, or there are not as many lists
                of images as conversations.
            CheckpointError: The checkpoint has no tokenizer or image processor that can be used.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}: the value must be at least 1")
        chosen = _sampling(max_new_tokens, sampling)
        images = [()] * len(conversations) if images is None else images
        if isinstance(images, ImageSource) or len(images) != len(conversations):
            found = "one image" if isinstance(images, ImageSource) else len(images)
            raise ConfigError(
                f"images must be a list with as many items as conversations, {len(conversations)}, "
                f"found {found}; each item is an image, or the list of the images of a conversation"
            )
        prompts = [to_prompt(one, of_it) for one, of_it in zip(conversations, images, strict=True)]
        if not prompts:
            return []
        assistant = self._assistant(min(batch_size, len(prompts)), max_length)
        replies = dict(
            assistant.answer_all(prompts, max_new_tokens=max_new_tokens, sampling=chosen, stop=stop)
        )
        return [replies[index].text for index in range(len(prompts))]

    def _assistant(self, slots: int, max_length: int | None) -> Assistant:
        """Returns an assistant with the weights of this model, and its own caches."""
        reader = _READERS.get(self)
        source = self.processor_source
        if source is None:
            raise ConfigError("the model was not loaded from a checkpoint, so it has no tokenizer")
        if reader is None or reader.source != source:
            reader = _READERS[self] = PromptReader.open(source, self.config)
        length = choose_length(self.config, max_length)
        return Assistant(self, reader, slots=slots, max_length=length)


_READERS: WeakKeyDictionary[LlavaModel, PromptReader] = WeakKeyDictionary()
"""Prompt readers of models. They are not attributes of the models, because attributes are a part of
the structure for which a model is compiled."""


def _sampling(max_new_tokens: int, settings: dict[str, float | int | None]) -> Sampling:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: the value must be at least 1")
    return Sampling(**settings)  # pyright: ignore[reportArgumentType]
