"""What clients of OpenAI's chat completions send."""

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
"""Characters of a text that ends the answer."""
MAX_VALUES = 20_000
"""Values in a body, all fields together: each takes some 100 bytes, where it had two."""


class _Part(BaseModel):
    # Fields that are not here, `user` or `detail` for two, change nothing of an answer.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageUrl(_Part):
    """Where an image is."""

    url: str


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        """Where it is."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[list[ContentPart], MaxLen(MAX_PARTS)]
Stop = Annotated[str, StringConstraints(max_length=MAX_STOP)]


class Message(_Part):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Content

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its content; text alone is one part."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(_Part):
    """Of a stream."""

    include_usage: bool = False


class ChatRequest(_Part):
    """The body of a request; `top_k` and `repetition_penalty` are vLLM's extensions."""

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
    # What changes an answer and is not to be had here: taken where it asks for nothing.
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
        """Most tokens of the answer, if it says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> Sampling:
        """How tokens are chosen: a temperature of 1 unless it says, as OpenAI has it.

        Raises:
            RequestError: A value that makes no sense.
        """
        seed = random.getrandbits(32) if self.seed is None else self.seed % 2**32
        given = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k in (0, -1) else self.top_k,  # as vLLM has it
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
    """Reads a request's body.

    Raises:
        RequestError: It is not of this form, or asks for what is not to be had.
    """
    request = parse_json(ChatRequest, body)
    for name, idle in _IDLE.items():
        value = getattr(request, name)
        if value is not None and value not in idle:
            raise RequestError(
                f"{name} = {value!r:.80}: this server has nothing but {idle[0]!r}",
                param=name,
                code="unsupported_parameter",
            )
    return request


def parse_json(model: type[_Model], body: bytes | bytearray) -> _Model:
    """Reads JSON of a form.

    Raises:
        RequestError: It has another form, or too many values; says where.
    """
    if sum(body.count(sign) for sign in b",[{") > MAX_VALUES:
        raise RequestError(f"the body has more than {MAX_VALUES:,} values")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = max(found, key=lambda one: len(one["loc"]))  # of a union, what came closest
        if first["type"] == "json_invalid":
            raise RequestError(f"the body is not JSON: {first['msg']}") from None
        # Without the names of a union's members, which are ours.
        fields = [x for x in first["loc"] if isinstance(x, int) or x in _NAMES]
        param = ".".join(str(x) for x in fields) or None
        raise RequestError(f"{param or 'the body'}: {first['msg']}", param=param) from None
    except ValueError as error:  # a lone surrogate, for one
        raise RequestError(f"the body cannot be read: {error}") from error


_NAMES = {
    name
    for model in (ChatRequest, Message, TextPart, ImagePart, ImageUrl, StreamOptions)
    for name in model.model_fields
}
