"""Finds the image files that records name, and decodes images that records contain as base64."""

import base64
import os
import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from llava_jax.errors import SampleError

MAX_PATH = 4096
"""Maximum number of characters in the path of an image."""
_LONG = 1000
"""Number of characters from which on a path without a dot is treated as an image in base64."""
_MAX_NAME = 255
"""Maximum number of bytes in the name of a file or directory."""

_BASE64 = re.compile(r"(?:data:[^,]{0,100};base64,\s*|(?=iVBORw0KGgo|/9j/|R0lGOD|UklGR))")
"""Start of an image in base64: the start of a data URL, or of a PNG, JPEG, GIF or WebP file."""
_IS_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")


def locate_image(image: object, root: str, follow_links: bool, what: str = "image") -> str | bytes:
    """Returns the full path of an image file, or the content of an embedded image.

    Args:
        image: Path, bytes, or a dict with the keys "bytes" and "path", one of which may be None. A
            path may also be a data URL or the content of an image file in base64.
        root: Directory that relative paths start from. An absolute path must be inside of it.
        follow_links: Whether symbolic links may point to images outside of the directory.
        what: "image" or "video", for messages and for the kind of a `SampleError`.

    Raises:
        SampleError: The image is neither embedded nor a path, its path is not valid or is outside
            of the directory, or its base64 is damaged.
    """
    image = read_embedded(image, what)
    if isinstance(image, bytes):
        return image
    _check_name(image, what)
    path = _relative_path(image, root, what)
    located = os.path.join(root, path)
    is_local = "://" not in root
    if is_local and not follow_links and _inside(*map(os.path.realpath, (root, located))) is None:
        raise SampleError(
            f"{what} {image!r:.200} is outside data.image_root because of a symbolic link; set "
            "data.follow_links to true to allow this",
            f"{what} path",
        )
    return located


def find_local_image(image: object) -> str | bytes:
    """Returns the path of an image file that a user names in Python, or its content.

    Unlike in data files, the path may lead to any directory.

    Args:
        image: Path, file:// URL, data URL, bytes, or a dict with the keys "bytes" and "path".

    Raises:
        SampleError: The image is not one of these, or its base64 is damaged.
    """
    image = read_embedded(image)
    if isinstance(image, bytes):
        return image
    _check_name(image)
    path = local_path(image)
    if "://" in path[:16]:
        raise SampleError(
            f"an image is {image!r:.80}; it must be a PIL image, the path of a file, a data URL, "
            "or the content of a file",
            "image path",
        )
    return path


def read_embedded(image: object, what: str = "image") -> str | bytes:
    """Returns the content of an image that a record contains, or else the path of the image.

    Raises:
        SampleError: The image is neither embedded nor a path, or its base64 is damaged.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise SampleError(f"{an(what)} must be a path or embedded bytes, found {image!r:.60}")
    return _decode(image, what) if is_embedded(image) else image


def an(what: str) -> str:
    """Returns "an image" or "a video"."""
    return f"{'an' if what == 'image' else 'a'} {what}"


def local_path(image: str) -> str:
    """Returns the path in a file:// URL of this machine; returns other texts unchanged."""
    if image.startswith("file://") and not urlsplit(image).netloc:
        return unquote(urlsplit(image).path)
    return image


def is_embedded(image: str) -> bool:
    """Returns True if a text is the content of an image in base64, and not a path."""
    start = _BASE64.match(image)
    if start is None:
        return False
    # "/9j/x.jpg" may be a path, but no path is as long as an image file.
    return start.end() > 0 or (len(image) > 100 and bool(_IS_BASE64.fullmatch(image)))


def _decode(image: str, what: str) -> bytes:
    """Returns the content of an image file from a data URL or from base64."""
    start = _BASE64.match(image)
    try:
        return decode_base64(image[start.end() :] if start else image)
    except ValueError as error:
        raise SampleError(f"{what} {image!r:.60} is not valid base64: {error}", what) from None


def decode_base64(text: str) -> bytes:
    """Returns the bytes of a text in base64.

    The padding may be missing, the alphabet may be the one for URLs, and there may be white space.

    Raises:
        ValueError: The text is not valid base64.
    """
    text = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _check_name(image: str, what: str = "image") -> None:
    """Raises SampleError if a text cannot be the path of a file."""
    begins = f"begins with {image[:60]!r}"
    hint = f"if it is {an(what)} in base64, write it as a data URL: "
    hint += "data:image/png;base64,..." if what == "image" else "data:video/mp4;base64,..."
    if len(image) > MAX_PATH:
        raise SampleError(
            f"{an(what)} path has {len(image):,} characters and {begins}; at most {MAX_PATH:,} are "
            f"allowed; {hint}",
            f"{what} path",
        )
    try:
        longest = max(len(os.fsencode(part)) for part in image.split("/"))
    except UnicodeEncodeError as error:
        raise SampleError(
            f"{what} path {image!r:.200} is not a valid file name: {error}", f"{what} path"
        ) from None
    if longest > _MAX_NAME or (len(image) > _LONG and _IS_BASE64.fullmatch(image)):
        raise SampleError(
            f"{an(what)} path has a name of {longest:,} bytes and {begins}, so there is no such "
            f"file; {hint}",
            what,
        )


def _relative_path(image: str, root: str, what: str) -> str:
    """Returns the path of an image relative to the directory of the images.

    Raises:
        SampleError: The path is outside of the directory.
    """
    path = local_path(image)
    has_parent = ".." in PurePosixPath(path).parts
    if "://" in root:
        path = path.removeprefix(root.rstrip("/") + "/")
    elif os.path.isabs(path) and "\0" not in path:
        inside = _inside(os.path.abspath(root), path)
        path = inside or _inside(os.path.realpath(root), os.path.realpath(path)) or path
    is_address = "://" in path or ("://" in root and "::" in path)  # fsspec chains URLs with ::
    if is_address or os.path.isabs(path) or has_parent or "\0" in path:
        raise SampleError(
            f"{what} path {image!r:.200} is outside data.image_root, which is "
            f"{root or 'the working directory'!s:.200}, or is not valid; write a path inside that "
            'directory, without "..", or change data.image_root',
            f"{what} path",
        )
    return path


def _inside(folder: str, path: str) -> str | None:
    """Returns the path relative to a folder; None if it is outside of the folder."""
    relative = os.path.relpath(path, folder)
    return None if relative.split("/")[0] == ".." else relative
