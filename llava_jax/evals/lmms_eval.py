"""lmms-eval's view of a checkpoint: `lmms-eval --model llava_jax --model_args pretrained=RUN ...`.

lmms-eval finds it by the entry point of this package; only with lmms-eval can this be imported.
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
from llava_jax.data.records import ROLES
from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.prompts import Prompt
from llava_jax.generation.sampling import Sampling
from llava_jax.pretrained.resolve import resolve

MAX_NEW_TOKENS = 256
"""Of an answer, where a task does not say."""


def manifest() -> ModelManifest:
    """What lmms-eval's registry takes."""
    return ModelManifest("llava_jax", chat_class_path=f"{__name__}.LlavaJax")


class LlavaJax(lmms):
    """A checkpoint of any form, as lmms-eval's tasks ask it.

    Args:
        pretrained: A run's directory, an adapter's, a checkpoint, or a hub id.
        base: What an adapter was trained on, if not what it names.
        dtype: The dtype of weights and computation.
        quantize: The decoder in fewer bits.
        max_length: Most tokens of a question with its answer.
        batch_size: Questions at a time.
        given: What lmms-eval gives every model, and is not used: all devices are.
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
            raise ConfigError(f"--model_args: {', '.join(unknown)} is not known to llava_jax")
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
        """Answers requests, those with the same settings together; a broken one with nothing."""
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
        """Answers requests that have the same settings."""
        settings = requests[numbers[0]].args[2]
        longest, sampling, stop = read_settings(settings)
        refused: list[int] = []

        def refuse(index: int, error: Exception) -> None:
            refused.append(numbers[index])
            logger.warning(f"request {numbers[index]} cannot be used: {error}")

        prompts = (to_prompt(self._messages(requests[number])) for number in numbers)
        for index, reply in self.assistant.answer_all(
            prompts, max_new_tokens=longest, sampling=sampling, stop=stop, refused=refuse
        ):
            counts = TokenCounts(reply.prompt_tokens, reply.new_tokens)
            yield numbers[index], GenerationResult(reply.text, counts)
        for number in refused:
            yield number, GenerationResult("")

    def _messages(self, request: Instance) -> list[Json]:
        _, to_messages, _, document, task, split = request.args
        return to_messages(self.task_dict[task][split][document])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Is not there: LLaVA's benchmarks generate."""
        raise NotImplementedError("llava_jax answers tasks that generate, not by likelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Is not there: such tasks run a conversation of their own."""
        raise NotImplementedError("llava_jax answers tasks of one round")


def read_settings(given: Json) -> tuple[int, Sampling, tuple[str, ...]]:
    """A task's generation_kwargs: most new tokens, how tokens are chosen, and what ends an answer.

    Beams are passed over: tasks ask for one.
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
    """Messages of lmms-eval, whose contents are texts and images, as a prompt.

    Raises:
        ConfigError: There is a video or a sound.
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
                raise ConfigError(f"llava_jax takes text and images, and the task has {part!r:.60}")
        turns.append(Turn(ROLES[message["role"]], text))
    return Prompt(tuple(turns), tuple(images))
