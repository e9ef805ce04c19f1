"""Images that visitors of the page upload: kept for a day, found by their names alone.

A name is a random token that this server made, so a client cannot name any other file: no path of a
client's ever reaches the file system.
"""

import asyncio
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from llava_jax.serving.bodies import Bodies, with_body
from llava_jax.serving.images import check_image
from llava_jax.serving.limits import MIB, Limits, RequestError

MAX_SECONDS = 24 * 60 * 60
"""How long an upload is kept."""
MAX_BYTES = 1024 * MIB
"""Bytes of all uploads together; above it, the oldest are removed."""

_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp|gif|bmp|tiff)")


class Uploads:
    """A temporary folder of uploaded images.

    Args:
        limits: Limits of the server.

    Attributes:
        limits: The same.
        folder: The folder's path.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._temporary = tempfile.TemporaryDirectory(prefix="llava_jax-")
        self.folder = Path(self._temporary.name)

    def close(self) -> None:
        """Removes the folder."""
        self._temporary.cleanup()

    async def add(self, data: bytes) -> str:
        """Keeps an image file, and returns its name.

        Raises:
            RequestError: It is not an image that the server takes.
        """
        kind = await asyncio.to_thread(check_image, data, self.limits)
        self._remove_oldest(MAX_BYTES - len(data))
        name = f"{secrets.token_hex(16)}.{kind.lower()}"
        (self.folder / name).write_bytes(data)
        asyncio.get_running_loop().call_later(MAX_SECONDS + 1, self._remove_oldest, MAX_BYTES)
        return name

    def path(self, name: str) -> Path:
        """The file of a name, which may stand at the end of a path.

        Raises:
            RequestError: No such image was uploaded, or it was removed since.
        """
        name = name.rpartition("/")[2]
        path = self.folder / name
        try:
            if _NAME.fullmatch(name) and stat.S_ISREG(os.lstat(path).st_mode):
                return path
        except OSError:
            pass
        raise RequestError(
            "an image of this conversation is gone; clear it, and upload the image again",
            status=404,
        )

    def _remove_oldest(self, max_bytes: int) -> None:
        """Removes what is too old, and then the oldest until at most `max_bytes` are left.

        Gradio's copies of uploads lie in folders here, so all that is in the folder is counted.
        """
        found = [(entry.stat().st_mtime, _size(entry), entry) for entry in self.folder.iterdir()]
        total = sum(size for _, size, _ in found)
        for modified, size, entry in sorted(found):
            if total <= max_bytes and modified > time.time() - MAX_SECONDS:
                return
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            total -= size


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else (entry,)
    return sum(file.stat().st_size for file in files)


def add_upload_routes(app: FastAPI, uploads: Uploads, bodies: Bodies) -> None:
    """Takes and returns uploads under the paths that Gradio's page asks for, in Gradio's place."""

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Response:
        with bodies.hold() as held:
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
