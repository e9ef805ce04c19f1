"""Defines all limits of HTTP requests, and the errors that clients get as responses."""

import dataclasses

from starlette.responses import JSONResponse

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that the server sets for its clients.

    Attributes:
        queue: Largest number of requests that wait for their first token; further requests get
            status 429.
        client_queue: Largest number of waiting requests from one IP address. All visitors of the
            web page count as one address.
        body_bytes: Largest size of a request body in bytes.
        image_bytes: Largest size of an image file in bytes.
        image_pixels: Largest number of pixels of an image after padding to a square.
        images: Largest number of images in a conversation. The program that processes prompts is
            compiled once for each number of images.
        new_tokens: Largest number of tokens of an answer; a request for more tokens gets this
            number.
        seconds: Longest time in seconds between the moment when a complete request enters the queue
            and the last token of its answer.
        remote_images: Whether the server fetches images from http and https URLs.
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
    """Raised if a request is refused or fails; the client gets the message in the response.

    Attributes:
        status: HTTP status code of the response.
        code: Machine-readable code of the error, such as "queue_full"; None if it has no code.
        param: Name of the field that is wrong; None if the error is not about one field.
        retry_after: Number of seconds after which the client may send the request again; None if
            the response contains no such number.
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
        """The error as a JSON object in OpenAI's format."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal(error: RequestError) -> JSONResponse:
    """Returns the HTTP response that reports an error to a client."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 408:  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(error.body, error.status, headers=headers)
