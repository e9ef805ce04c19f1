"""Images that visitors of the page upload: kept for a day, found by their names alone.

A name is a random token that this server made, so a client cannot name any other file: no path of a
client's ever reaches the file system.
"""

import asyncio
import secrets
import tempfile
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from llava_jax.serving.bodies import Bodies, client_of, media_type, with_body
from llava_jax.serving.images import check_image
from llava_jax.serving.limits import MIB, Limits, RequestError

KEPT_SECONDS = 24 * 60 * 60
MAX_BYTES = 1024 * MIB
"""Bytes of all uploads together; above it, the oldest are removed."""
MAX_FILES = 2000


class Uploads:
    """A temporary folder of uploaded images.

    Args:
        limits: Limits of the server.

    Attributes:
        limits: The server's limits.
        folder: The folder's path.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._temporary = tempfile.TemporaryDirectory(prefix="llava_jax-")
        self.folder = Path(self._temporary.name)
        self._sizes: dict[str, int] = {}  # by name, the oldest first

    def close(self) -> None:
        """Removes the folder."""
        self._sizes.clear()
        self._temporary.cleanup()

    async def add(self, data: bytes) -> str:
        """Keeps an image file, and returns its name.

        Raises:
            RequestError: It is not an image that the server takes.
        """
        kind = await asyncio.to_thread(check_image, data, self.limits)
        name = f"{secrets.token_hex(16)}.{kind.lower()}"
        (self.folder / name).write_bytes(data)
        self._sizes[name] = len(data)
        while len(self._sizes) > MAX_FILES or sum(self._sizes.values()) > MAX_BYTES:
            self._remove(next(iter(self._sizes)))
        asyncio.get_running_loop().call_later(KEPT_SECONDS, self._remove, name)
        return name

    def path(self, name: str) -> Path:
        """The file of a name, which may stand at the end of a path.

        Raises:
            RequestError: No such image was uploaded, or it was removed since.
        """
        name = name.rpartition("/")[2]
        if name not in self._sizes:
            raise RequestError(
                "an image of this conversation is gone; clear it, and upload the image again",
                status=404,
            )
        return self.folder / name

    def _remove(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            (self.folder / name).unlink(missing_ok=True)


def add_upload_routes(app: FastAPI, uploads: Uploads, bodies: Bodies) -> None:
    """Takes and returns uploads under the paths that Gradio's page asks for, in Gradio's place."""

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Response:
        # Forms of another kind have no files.
        if media_type(request.headers) != "multipart/form-data":
            raise RequestError("an upload is multipart/form-data", status=415)
        with bodies.hold(client_of(request.scope)) as held:
            body = await held.read(request.headers, request.receive)
            read = Request(request.scope, with_body(body, request.receive))
            async with read.form(max_files=uploads.limits.images, max_fields=0) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                if not files:
                    raise RequestError("the upload has no file")
                return JSONResponse([await uploads.add(await file.read()) for file in files])

    @app.get("/gradio_api/file={name:path}")
    async def file(name: str) -> Response:
        path = uploads.path(name)
        # The name has been made from the image's own format, so the browser need not guess.
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
        return Response(path.read_bytes(), media_type=f"image/{path.suffix[1:]}", headers=headers)
