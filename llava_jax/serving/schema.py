"""Parses and checks requests for chat completions of OpenAI's API."""

import difflib
import random
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from annotated_types import MaxLen
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from llava_jax.errors import ConfigError
from llava_jax.generation.sampling import MAX_ALTERNATIVES, Sampling
from llava_jax.serving.limits import RequestError

MAX_MESSAGES = 1000
MAX_PARTS = 256
MAX_STOPS = 16
MAX_STOP = 1000
"""Largest number of characters of a stop string."""
MAX_VALUES = 20_000
"""Largest number of JSON values in a body. After parsing, a value of 2 bytes can take 100 bytes."""


class _Part(BaseModel):
    """JSON object of a request. A field that is not declared may have the value null.

    Attributes:
        ignored: Values of fields that are accepted but not used, because these values do not change
            an answer; None accepts all values of a field. Any other field is refused, because its
            sender expects that it changes the answer.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    ignored: ClassVar[Mapping[str, tuple[object, ...] | None]] = {}

    @model_validator(mode="after")
    def _refuse_others(self) -> "_Part":
        for name, value in (self.model_extra or {}).items():
            allowed = self.ignored.get(name, ())
            if value is None or allowed is None or _is_among(value, allowed):
                continue
            text = f"{name} = {value!r:.80}: this server supports only {[*allowed, None][0]!r}"
            if name not in self.ignored:
                near = difflib.get_close_matches(name[:80], type(self).model_fields, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                text = f"this server does not support the field {name[:80]!r}{hint}"
            raise PydanticCustomError(_UNSUPPORTED, "{text}", {"text": text, "name": name[:80]})
        return self


def _is_among(value: object, allowed: tuple[object, ...]) -> bool:
    """Returns True if a JSON value is one of `allowed`; true is not the same as 1."""
    is_bool = isinstance(value, bool)
    return any(value == other and is_bool == isinstance(other, bool) for other in allowed)


_UNSUPPORTED = "unsupported_parameter"


class ImageUrl(_Part):
    """JSON object that contains the URL of an image."""

    ignored = {"detail": None, "uuid": None}
    url: str


class TextPart(_Part):
    """Part of a message that is text."""

    ignored = {"cache_control": None}
    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """Part of a message that is an image."""

    ignored = {"cache_control": None, "detail": None, "uuid": None}
    type: Literal["image_url"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        """URL of the image."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[list[ContentPart], MaxLen(MAX_PARTS)]
Stop = Annotated[str, StringConstraints(max_length=MAX_STOP)]


class Message(_Part):
    """One message of a conversation."""

    # The messages of OpenAI's own answers have most of these fields.
    ignored = {"name": None, "refusal": None, "annotations": None, "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Content

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Parts of the message. If the content is a string, this string is the only part."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(_Part):
    """Options of a streamed answer."""

    ignored = {"include_obfuscation": None, "continuous_usage_stats": (False,)}
    include_usage: bool | None = None


class ChatRequest(_Part):
    """Body of a chat completion request, with some of vLLM's extensions."""

    ignored = {
        name: allowed
        for allowed, names in (
            (None, "user metadata store service_tier safety_identifier request_id priority"),
            (None, "prompt_cache_key prompt_cache_retention cache_salt parallel_tool_calls"),
            ((1,), "n best_of length_penalty"),
            ((0,), "frequency_penalty presence_penalty min_p min_tokens"),
            (([],), "tools functions stop_token_ids bad_words"),
            (({},), "logit_bias chat_template_kwargs mm_processor_kwargs"),
            ((False,), "ignore_eos use_beam_search echo add_special_tokens"),
            ((False,), "include_stop_str_in_output return_tokens_as_token_ids"),
            ((True,), "skip_special_tokens spaces_between_special_tokens"),
            (("none", "auto"), "tool_choice function_call"),
            (({"type": "text"},), "response_format"),
            ((["text"],), "modalities"),
            (("medium",), "verbosity"),
            (("none",), "reasoning_effort"),
        )
        for name in names.split()
    }
    model: str
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], MaxLen(MAX_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def new_tokens(self) -> int | None:
        """Largest number of tokens of the answer; None if the request sets no limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> Sampling:
        """Returns the sampling parameters; the default temperature is 1, as in OpenAI's API.

        Raises:
            RequestError: A value is not allowed.
        """
        seed = random.getrandbits(32) if self.seed is None else self.seed % 2**32
        given = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k in (0, -1) else self.top_k,  # 0 and -1 mean off, as in vLLM
            "repetition_penalty": self.repetition_penalty,
        }
        try:
            return Sampling(seed=seed, **{k: v for k, v in given.items() if v is not None})
        except ConfigError as error:
            raise RequestError(str(error), param=str(error).partition(" ")[0]) from error


_Model = TypeVar("_Model", bound=BaseModel)


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """Parses the body of a chat completion request.

    Raises:
        RequestError: The body is not a valid request, or uses a field that is not supported.
    """
    request = parse_json(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        text = "top_logprobs needs logprobs = true"
        raise RequestError(text, param="top_logprobs")
    continues = bool(request.continue_final_message)
    if request.add_generation_prompt is not None and request.add_generation_prompt == continues:
        raise RequestError(
            "continue_final_message and add_generation_prompt must be different: either the model "
            "continues the last message, or it begins a new one",
            param="add_generation_prompt",
        )
    is_answer = request.messages[-1].role == "assistant"
    if continues != is_answer:
        raise RequestError(
            "the last message must be from the assistant, because continue_final_message is true"
            if continues
            else "the last message must be from the user (a human turn); to continue a message of "
            "the assistant, set continue_final_message to true",
            param="messages",
        )
    return request


def parse_json(model: type[_Model], body: bytes | bytearray) -> _Model:
    """Parses JSON and returns an object of a pydantic class.

    Args:
        model: Pydantic class of the object.
        body: JSON text in UTF-8.

    Raises:
        RequestError: The text is not JSON, does not match the class or has too many values. The
            message names the field.
    """
    if sum(body.count(sign) for sign in b",[{") > MAX_VALUES:
        raise RequestError(f"the request body has more than {MAX_VALUES:,} JSON values")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        # If no member of a union matches, the deepest error belongs to the best matching member.
        raise _refusal(max(found, key=lambda one: len(one["loc"]))) from None
    except ValueError as error:  # for example half of a surrogate pair
        raise RequestError(f"the request body cannot be read: {error}") from error


def _refusal(found: ErrorDetails) -> RequestError:
    """Returns the error of a request from the first error that pydantic has found."""
    if found["type"] == "json_invalid":
        return RequestError(f"the request body is not valid JSON: {found['msg']}")
    # The names of a union's members are left out, because clients do not know them. Among these is
    # the type of a part, which follows the index of the part.
    path = [x for x in found["loc"] if isinstance(x, int) or x in _NAMES]
    if path[2:3] == ["content"]:
        path[4:5] = []
    where = ".".join(map(str, path))
    about, text = found.get("ctx", {}), found["msg"]
    if found["type"] == _UNSUPPORTED:
        param = ".".join(filter(None, (where, about["name"])))
        text = f"{where}: {text}" if where else text
        return RequestError(text, param=param, code=_UNSUPPORTED)
    if found["type"] == "union_tag_invalid":
        text = f"parts of the type {about['tag']!r:.80} are not supported; send text or image_url"
        if "video" in about["tag"]:
            text += ". The server reads no videos; send frames of the video as images"
    return RequestError(f"{where or 'the request body'}: {text}", param=where or None)


_NAMES = {
    name
    for model in (ChatRequest, Message, TextPart, ImagePart, ImageUrl, StreamOptions)
    for name in model.model_fields
}
