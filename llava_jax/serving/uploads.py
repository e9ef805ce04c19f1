"""Stores the images that visitors of the web page upload, for at most a day.

The server gives each image a random name and finds the image only by this name. No path that a
client sends reaches the file system.
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
"""Largest total size of all uploads in bytes. If it is exceeded, the oldest uploads are removed."""
MAX_FILES = 2000
"""Largest number of uploads. If it is exceeded, the oldest uploads are removed."""


class Uploads:
    """Temporary directory of uploaded images.

    Args:
        limits: Limits of the server.

    Attributes:
        limits: Limits of the server.
        folder: Path of the directory.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._temporary = tempfile.TemporaryDirectory(prefix="llava_jax-")
        self.folder = Path(self._temporary.name)
        self._sizes: dict[str, int] = {}  # bytes by name, oldest upload first

    def close(self) -> None:
        """Removes the directory with all uploads."""
        self._sizes.clear()
        self._temporary.cleanup()

    async def add(self, data: bytes) -> str:
        """Stores an image file and returns its new name.

        Args:
            data: Contents of the image file.

        Raises:
            RequestError: The file is not an image, or exceeds a limit.
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
        """Returns the path of an uploaded image.

        Args:
            name: Name of the upload, or a path that ends with this name.

        Raises:
            RequestError: No image has this name, or the image was removed.
        """
        name = name.rpartition("/")[2]
        if name not in self._sizes:
            raise RequestError(
                "an image of this conversation was removed from the server; clear the conversation "
                "and upload the image again",
                status=404,
            )
        return self.folder / name

    def _remove(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            (self.folder / name).unlink(missing_ok=True)


def add_upload_routes(app: FastAPI, uploads: Uploads, bodies: Bodies) -> None:
    """Adds routes that store and return uploads. These routes replace Gradio's own routes.

    Args:
        app: Application that gets the routes.
        uploads: Directory of the uploads.
        bodies: Reader of request bodies.
    """

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Response:
        # Forms with another media type cannot contain files.
        if media_type(request.headers) != "multipart/form-data":
            text = "the Content-Type header of an upload must be multipart/form-data"
            raise RequestError(text, status=415)
        with bodies.hold(client_of(request.scope)) as held:
            body = await held.read(request.headers, request.receive)
            read = Request(request.scope, with_body(body, request.receive))
            async with read.form(max_files=uploads.limits.images, max_fields=0) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                if not files:
                    raise RequestError("the upload contains no file; send an image file")
                return JSONResponse([await uploads.add(await file.read()) for file in files])

    @app.get("/gradio_api/file={name:path}")
    async def file(name: str) -> Response:
        path = uploads.path(name)
        # The suffix of the name is the format of the image, so the browser must not guess the type.
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
        return Response(path.read_bytes(), media_type=f"image/{path.suffix[1:]}", headers=headers)
