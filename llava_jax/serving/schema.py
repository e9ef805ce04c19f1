"""Parses and checks requests for chat completions of OpenAI's API."""

import random
from typing import Annotated, Literal, TypeVar

from annotated_types import MaxLen
from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from llava_jax.errors import ConfigError
from llava_jax.generation.sampling import Sampling
from llava_jax.serving.limits import RequestError

MAX_MESSAGES = 1000
MAX_PARTS = 256
MAX_STOPS = 16
MAX_STOP = 1000
"""Largest number of characters of a stop string."""
MAX_VALUES = 20_000
"""Largest number of JSON values in a body. After parsing, a value of 2 bytes can take 100 bytes."""


class _Part(BaseModel):
    # Other fields, such as `user` and `detail`, do not change an answer and are ignored.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageUrl(_Part):
    """JSON object that contains the URL of an image."""

    url: str


class TextPart(_Part):
    """Part of a message that is text."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """Part of a message that is an image."""

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

    include_usage: bool = False


class ChatRequest(_Part):
    """Body of a chat completion request; `top_k` and `repetition_penalty` are vLLM's extensions."""

    model: str
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], MaxLen(MAX_STOPS)] | None = None
    # These fields would change an answer, but are not supported. `parse_request` accepts only
    # values that have no effect.
    n: object = None
    logprobs: object = None
    top_logprobs: object = None
    logit_bias: object = None
    frequency_penalty: object = None
    presence_penalty: object = None
    response_format: object = None
    tools: object = None
    tool_choice: object = None
    functions: object = None
    function_call: object = None

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


_IDLE: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


_Model = TypeVar("_Model", bound=BaseModel)


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """Parses the body of a chat completion request.

    Raises:
        RequestError: The body is not a valid request, or uses a field that is not supported.
    """
    request = parse_json(ChatRequest, body)
    for name, idle in _IDLE.items():
        value = getattr(request, name)
        if value is not None and value not in idle:
            raise RequestError(
                f"{name} = {value!r:.80}: this server supports only {idle[0]!r}",
                param=name,
                code="unsupported_parameter",
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
        first = max(found, key=lambda one: len(one["loc"]))
        if first["type"] == "json_invalid":
            raise RequestError(f"the request body is not valid JSON: {first['msg']}") from None
        # The names of a union's members are left out, because clients do not know them.
        fields = [x for x in first["loc"] if isinstance(x, int) or x in _NAMES]
        param = ".".join(str(x) for x in fields) or None
        raise RequestError(f"{param or 'the request body'}: {first['msg']}", param=param) from None
    except ValueError as error:  # for example half of a surrogate pair
        raise RequestError(f"the request body cannot be read: {error}") from error


_NAMES = {
    name
    for model in (ChatRequest, Message, TextPart, ImagePart, ImageUrl, StreamOptions)
    for name in model.model_fields
}
