"""What a request may ask for, and why one is refused."""

import dataclasses

from starlette.responses import JSONResponse

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server takes of its clients.

    Attributes:
        queue: Requests that wait for their first token; more are refused, to be sent again later.
        client_queue: Waiting requests of one address, so that others get a turn.
        body_bytes: Largest size of a request.
        image_bytes: Largest size of an image's file.
        image_pixels: Most pixels of the square into which an image is padded.
        images: Most images in a conversation. The prefill is compiled for each number of them.
        new_tokens: Most tokens of an answer; a request for more gets this number.
        seconds: Longest time from a request's first byte to its answer's last token.
        remote_images: Whether images are fetched from http and https URLs.
    """

    queue: int = 64
    client_queue: int = 32
    body_bytes: int = 20 * MIB
    image_bytes: int = 12 * MIB
    image_pixels: int = 64 * MIB
    images: int = 4
    new_tokens: int = 1024
    seconds: float = 300.0
    remote_images: bool = False


class RequestError(Exception):
    """A request that gets no answer; its text says why, to the client.

    Attributes:
        status: HTTP's.
        code: A word for programs, as OpenAI has them.
        param: The field that is wrong.
        retry_after: Seconds after which it may be asked again.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(text)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """It in OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal(error: RequestError) -> JSONResponse:
    """What a client gets instead of an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 408:  # the rest of the body is not waited for
        headers["Connection"] = "close"
    return JSONResponse(error.body, error.status, headers=headers)
