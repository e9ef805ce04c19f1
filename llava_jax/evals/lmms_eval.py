"""Lets lmms-eval evaluate a checkpoint of llava_jax.

    lmms-eval --model llava_jax --model_args pretrained=RUN ...

lmms-eval finds this module by the entry point in pyproject.toml. The module can be imported only if
lmms-eval is installed.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    GenerationResult,
    Instance,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
    ModelManifest,
)
from loguru import logger  # pyright: ignore[reportMissingImports]
from rich.progress import track

from llava_jax.config import Quantisation, parse_source
from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.data.forms import ROLES
from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.prompts import Prompt
from llava_jax.generation.sampling import Sampling
from llava_jax.pretrained.resolve import resolve

MAX_NEW_TOKENS = 256
"""Maximum number of tokens of an answer if the task does not set a maximum."""


def manifest() -> ModelManifest:
    """Returns the entry of this model for the registry of lmms-eval."""
    return ModelManifest("llava_jax", chat_class_path=f"{__name__}.LlavaJax")


class LlavaJax(lmms):
    """A model for lmms-eval, which answers with a checkpoint of any format that llava_jax reads.

    Args:
        pretrained: Directory of a run, of an adapter or of a checkpoint, or a hub id.
        base: Base model of the adapter; None uses the base model given in the adapter's config.
        dtype: Dtype of weights and computation; None chooses a dtype that suits the device.
        quantize: Quantization of the decoder's weights; None uses the quantization of the training
            run.
        max_length: Maximum number of tokens of a question with its images and answer.
        batch_size: Number of questions that are answered at the same time.
        given: Arguments that lmms-eval passes to every model. They are ignored, because llava_jax
            uses all devices.

    Raises:
        ConfigError: An argument is unknown or has a value that is not allowed.
        CheckpointError: The checkpoint cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        dtype: str | None = None,
        quantize: Quantisation | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        **given: Any,
    ):
        super().__init__()
        if unknown := given.keys() - {"device", "max_batch_size"}:
            raise ConfigError(
                f"--model_args: unknown arguments for llava_jax: {', '.join(unknown)}; remove them"
            )
        self.assistant = Assistant.load(
            resolve(
                parse_source(str(pretrained)),
                base=None if base is None else parse_source(str(base)),
            ),
            dtype=dtype,
            quantize=quantize or "as_trained",
            slots=int(batch_size),
            max_length=max_length,
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the answer to each request; a request that cannot be used gets an empty answer.

        Requests with the same settings are answered in the same batches.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(number)
        results = [GenerationResult("")] * len(requests)
        everything = (
            answer for numbers in groups.values() for answer in self._answer(requests, numbers)
        )
        for number, result in track(everything, "asking", len(requests)):
            results[number] = result
            text, settings = requests[number].args[0], requests[number].args[2]
            self.cache_hook.add_partial("generate_until", (text, settings), result.text)
        return results

    def _answer(
        self, requests: Sequence[Instance], numbers: list[int]
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Yields the index and the answer of each request; all requests have the same settings."""
        settings = requests[numbers[0]].args[2]
        longest, sampling, stop = read_settings(settings)
        refused: list[int] = []

        def refuse(index: int, error: Exception) -> None:
            refused.append(numbers[index])
            logger.warning(
                f"request {numbers[index]} cannot be answered and gets an empty answer: {error}"
            )

        prompts = (to_prompt(self._messages(requests[number])) for number in numbers)
        for index, reply in self.assistant.answer_all(
            prompts, max_new_tokens=longest, sampling=sampling, stop=stop, refused=refuse
        ):
            counts = TokenCounts(reply.prompt_tokens, reply.new_tokens)
            yield numbers[index], GenerationResult(reply.text, counts)
        for number in refused:
            yield number, GenerationResult("")

    def _messages(self, request: Instance) -> list[Json]:
        """Returns the messages of a request, which its task creates from a document."""
        _, to_messages, _, document, task, split = request.args
        return to_messages(self.task_dict[task][split][document])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError, because LLaVA's benchmarks use generated answers."""
        raise NotImplementedError(
            "llava_jax only supports tasks in which the model generates an answer"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError, because tasks with several rounds are not supported."""
        raise NotImplementedError("llava_jax only supports tasks with a single round")


def read_settings(given: Json) -> tuple[int, Sampling, tuple[str, ...]]:
    """Reads the generation_kwargs of a task.

    The number of beams is ignored, because tasks use one beam.

    Returns:
        Maximum number of new tokens, sampling settings, and texts that end an answer.
    """
    temperature = float(given.get("temperature") or 0.0)
    if not given.get("do_sample", temperature > 0):
        temperature = 0.0
    until = given.get("until") or ()
    sampling = Sampling(
        temperature,
        int(given["top_k"]) if given.get("top_k") else None,
        float(given.get("top_p") or 1.0),
        float(given.get("repetition_penalty") or 1.0),
    )
    longest = int(given.get("max_new_tokens") or MAX_NEW_TOKENS)
    return longest, sampling, (until,) if isinstance(until, str) else tuple(until)


def to_prompt(messages: Sequence[Json]) -> Prompt:
    """Converts messages of lmms-eval, which contain texts and images, to a prompt.

    Raises:
        ConfigError: A message contains something else, for example a video.
    """
    turns, images = [], []
    for message in messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "text":
                text += str(part["text"]).replace(IMAGE_PLACEHOLDER, "")
            elif part["type"] == "image":
                images.append(part["url"])
                text += f"{IMAGE_PLACEHOLDER}\n"
            else:
                raise ConfigError(
                    "llava_jax only supports text and images, but a message of the task contains "
                    f"{part!r:.60}"
                )
        turns.append(Turn(ROLES[message["role"]], text))
    return Prompt(tuple(turns), tuple(images))
