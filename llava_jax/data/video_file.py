"""Reads frames of videos: video files, directories of frames, and lists of frames."""

import array
import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from llava_jax.data.files import is_folder, is_remote, list_folder, open_file
from llava_jax.data.image_paths import locate_image
from llava_jax.data.images import open_image
from llava_jax.errors import ConfigError, SampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
"""Names of FFmpeg's demuxers that may read a video file. "mov" also reads MP4 and 3GP, "matroska"
WebM, and "asf" WMV. Others are not safe: a playlist, for example, may name files and addresses that
FFmpeg would open."""

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Suffixes, in lower case, of the files in a directory that are frames."""

# These limits prevent a single video from delaying a run for long or filling its memory.
MAX_PIXELS = 2**25
"""Maximum number of pixels of a frame in a video file, which is a little more than 8K has. A
decoder keeps up to 17 frames in memory."""
MAX_PACKETS = 2**22
"""Maximum number of frames in a video file; 19 hours at 60 frames per second."""
MAX_DECODED_PIXELS = 2**35
"""Maximum number of pixels of all frames of a video file that are decoded, also to reach the frames
that are used. One core decodes about 2**27 pixels of H.264 in a second."""
MAX_FRAMES = 10_000
"""Maximum number of frames in a list."""

_BUFFER_BYTES = 2**18
"""Number of bytes that FFmpeg reads at a time."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of a record.

    Attributes:
        source: Path of a video file or of a directory of frames, content of a video file, or path
            or content of each frame.
        root: Local directory that the frames of a directory must be in, also if they are symbolic
            links; None if links may lead anywhere.
    """

    source: str | bytes | tuple[str | bytes, ...]
    root: str | None = None


def locate_video(video: object, root: str, follow_links: bool) -> Video:
    """Returns a video of a record, with full paths.

    Args:
        video: Path of a file or of a directory, content of a file, data URL, a dict with the keys
            "bytes" and "path", or a list of frames, each of which is an image as in
            `image_paths.locate_image`.
        root: Directory that relative paths start from. An absolute path must be inside of it.
        follow_links: Whether symbolic links may point to files outside of the directory.

    Raises:
        SampleError: The video is not one of these, a path is not valid or is outside of the
            directory, or base64 is damaged.
    """
    if not isinstance(video, list | tuple):
        inside = None if follow_links or is_remote(root) else root
        return Video(locate_image(video, root, follow_links, "video"), inside)
    if len(video) > MAX_FRAMES:
        raise SampleError(
            f"a video has {len(video):,} frames in a list; at most {MAX_FRAMES:,} are allowed",
            "video cost",
        )
    return Video(tuple(locate_image(frame, root, follow_links) for frame in video))


def choose_frames(total: int, count: int, rate: Fraction | None = None) -> list[int]:
    """Chooses the frames of a video that a model sees.

    The rule is that of LLaVA-NeXT's `process_video_with_decord` (llava/utils.py), with which
    LLaVA-NeXT-Video and LLaVA-OneVision were trained: one frame per second, or `count` frames
    evenly spread over the whole video if these are more than `count`.

    Args:
        total: Number of frames of the video.
        count: Maximum number of frames to choose.
        rate: Average number of frames per second; None for separate images, whose times are not
            known, so that all of them are used if they are at most `count`.

    Returns:
        Indices of the frames in order; at least one if `total` and `count` are positive.
    """
    step = 1 if rate is None else max(1, round(rate))
    if len(range(0, total, step)) <= count:
        return [*range(0, total, step)]
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def count_frames(video: Video, count: int) -> int:
    """Returns the number of frames that `iterate_frames` yields, without decoding any frame.

    Of an MP4 file, only the header is read; other video files are read to their end.

    Args:
        video: Video of a record.
        count: Maximum number of frames.

    Raises:
        SampleError: The video does not exist, is not a video, or costs too much to read.
        ConfigError: PyAV is not installed.
    """
    frames = _separate_frames(video)
    if frames is not None:
        return len(choose_frames(len(frames), count))
    with _opened(video) as (container, stream):
        total = _indexed_frames(container, stream)
        if total is None:
            total = len(_read_times(container, stream).times)
        _check_total(total)
        return len(choose_frames(total, count, _rate(stream)))


def iterate_frames(
    video: Video, count: int, *, exif_orientation: bool = True
) -> Iterator[Image.Image]:
    """Yields at most `count` RGB frames of a video in order; see `choose_frames`.

    Only one frame is in memory at a time.

    Args:
        video: Video of a record.
        count: Maximum number of frames.
        exif_orientation: Whether to turn frames upright as the Exif orientation of an image file,
            or the rotation in a video file, says.

    Raises:
        SampleError: The video does not exist, is truncated or damaged, is not a video, or costs too
            much to decode. Some frames may have been yielded before.
        ConfigError: PyAV is not installed.
    """
    frames = _separate_frames(video)
    if frames is not None:
        for index in choose_frames(len(frames), count):
            frame = frames[index]
            if video.root is not None and isinstance(frame, str):
                frame = locate_image(os.path.abspath(frame), video.root, False)
            yield open_image(frame, exif_orientation=exif_orientation)
        return
    with _opened(video) as (container, stream):
        table = _read_times(container, stream)
        total = _indexed_frames(container, stream) or len(table.times)
        _check_total(total)
        if len(table.times) < total:
            raise SampleError(
                f"the file is truncated: it should have {total:,} frames, but has "
                f"{len(table.times):,}",
                "video",
            )
        indices = np.array(choose_frames(total, count, _rate(stream)), np.int64)
        _check_cost(table, indices, stream.width * stream.height)
        for frame in _decode(container, stream, table, table.times[indices].tolist()):
            image = frame.to_image()
            turn = frame.rotation if exif_orientation else 0  # in degrees, counterclockwise
            yield image.rotate(turn, expand=True) if turn % 90 == 0 else image


def _separate_frames(video: Video) -> tuple[str | bytes, ...] | None:
    """Returns the paths or contents of frames that are separate images; None for a video file.

    A remote path with a suffix is always a file, because some file systems would read the whole
    file to find out whether it is a directory.
    """
    source = video.source
    if not isinstance(source, str):
        return source if isinstance(source, tuple) else None
    if is_remote(source) and PurePosixPath(source).suffix:
        return None
    try:
        if not is_folder(source):
            return None
        paths = list_folder(source)
    except (OSError, ValueError) as error:
        raise SampleError(f"cannot read video {source}: {error}", "video") from error
    named = {PurePosixPath(path).name: path for path in paths}
    names = [name for name in named if name.lower().endswith(FRAME_SUFFIXES) and name[0] != "."]
    if not names:
        raise SampleError(
            f"cannot read video {source}: the directory has no image files "
            f"({', '.join(FRAME_SUFFIXES)})",
            "video",
        )
    return tuple(named[name] for name in sorted(names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts numbers in names by their values: 2.png before 10.png."""
    parts = re.split("([0-9]+)", name)
    return [(int(part), part) if n % 2 else (0, part) for n, part in enumerate(parts)]


@contextlib.contextmanager
def _opened(video: Video) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """Opens a video file with FFmpeg. Errors inside the context name the file."""
    source = video.source
    assert not isinstance(source, tuple)
    embedded = isinstance(source, bytes)
    name = f"an embedded video of {len(source)} bytes" if embedded else f"video {source}"
    av = _import_av(name)
    try:
        with io.BytesIO(source) if embedded else open_file(source) as file:
            options = {"format_whitelist": ",".join(FORMATS)}
            try:
                opened = av.open(file, "r", options=options, buffer_size=_BUFFER_BYTES)
            except (OSError, ValueError, EOFError) as error:
                raise SampleError(
                    "the file is truncated or damaged, or its format is none of FFmpeg's "
                    f"{', '.join(FORMATS)} ({_reason(error)})",
                    "video",
                ) from None
            with opened as container:
                stream = _find_stream(container)
                stream.codec_context.thread_count = 1  # several workers read videos
                # The decoder also refuses a larger frame later in the file.
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                yield container, stream
    except FileNotFoundError:
        raise SampleError(f"video not found: {source}", "video missing") from None
    except SampleError as error:
        raise SampleError(f"cannot read {name}: {error}", error.kind) from None
    except ConfigError:
        raise
    # FFmpeg and fsspec's file systems raise errors of many types.
    except Exception as error:
        raise SampleError(f"cannot read {name}: {_reason(error)}", "video") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _import_av(name: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"{name} needs the package av: pip install 'llava_jax[video]'") from error
    return av


def _find_stream(container: "InputContainer") -> "VideoStream":
    """Returns the first video stream that is not the cover picture of an audio file."""
    import av.stream

    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise SampleError("the file has no video, for example only sound", "video")
    stream = streams[0]
    if stream.codec_context is None:
        raise SampleError("FFmpeg does not know the codec of the video", "video")
    if not 0 < stream.width * stream.height <= MAX_PIXELS:
        raise SampleError(
            f"its frames have {stream.width} x {stream.height} = "
            f"{stream.width * stream.height:,} pixels; 1 to {MAX_PIXELS:,} are allowed",
            "video size",
        )
    return stream


def _rate(stream: "VideoStream") -> Fraction:
    """Returns the average number of frames per second; 1 if it is not known."""
    return stream.average_rate or stream.guessed_rate or Fraction(1)


def _check_total(total: int) -> None:
    if not 0 < total <= MAX_PACKETS:
        raise SampleError(
            f"the file has {total:,} frames; 1 to {MAX_PACKETS:,} are allowed",
            "video cost" if total else "video",
        )


def _indexed_frames(container: "InputContainer", stream: "VideoStream") -> int | None:
    """Returns the number of frames in the index of an MP4 file; None if there is no such index.

    Frames that an edit list leaves out are not counted. A fragmented file has no complete index.
    """
    if not container.format.name.startswith("mov") or not stream.frames:
        return None
    _check_total(len(stream.index_entries))
    return sum(entry.size > 0 and not entry.is_discard for entry in stream.index_entries)


class _Times(NamedTuple):
    """Times of all F frames of a video file, in units of the stream's time base.

    Attributes:
        times: int64 [F]. Times at which the frames are shown, in order. If the file does not
            contain these times, they are the numbers of the frames.
        keys: int64 [K]. Indices of the frames at which decoding can begin, in order; at least 0.
        seeks: int64 [K]. Times to seek to for these frames.
        in_order: Whether the times are only the numbers of the frames, so that all frames must be
            decoded in order.
    """

    times: Int64[np.ndarray, " F"]
    keys: Int64[np.ndarray, " K"]
    seeks: Int64[np.ndarray, " K"]
    in_order: bool = False


def _read_times(container: "InputContainer", stream: "VideoStream") -> _Times:
    """Reads a video file to its end, without decoding it, and returns the times of its frames."""
    shown, keys, seeks = (array.array("q") for _ in range(3))
    name, total = container.format.name, 0
    # FFmpeg makes up times that these formats do not contain, and they may be wrong.
    has_times = name not in ("avi", "mpeg")
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        total += 1
        if total > MAX_PACKETS:
            break
        if packet.pts is None:
            has_times = False
            continue
        shown.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
            # In an MP4 file, FFmpeg finds a frame by the time at which it is shown; in some other
            # files, by the time at which it is decoded.
            seeks.append(packet.pts)
            if packet.dts is not None and not name.startswith("mov"):
                seeks[-1] = min(packet.pts, packet.dts)
    _check_total(total)
    if not has_times:
        first = np.zeros(1, np.int64)
        return _Times(np.arange(total), first, first, in_order=True)
    times = np.sort(np.array(shown, np.int64))
    order = np.argsort(np.array(keys, np.int64), kind="stable")
    begins = np.searchsorted(times, np.array(keys, np.int64)[order])
    starts = np.array(seeks, np.int64)[order]
    if not len(begins) or begins[0] > 0:
        begins, starts = np.append(0, begins), np.append(times[0], starts)
    return _Times(times, begins, starts)


def _check_cost(table: _Times, indices: Int64[np.ndarray, " C"], pixels: int) -> None:
    """Raises SampleError if too much must be decoded to reach the frames `indices`.

    Args:
        table: Times of all frames.
        indices: Indices of the frames that are used, in order.
        pixels: Number of pixels of a frame.
    """
    keys = table.keys[np.searchsorted(table.keys, indices, side="right") - 1]
    begins = np.maximum(keys, np.append(0, indices[:-1] + 1))
    frames = int((indices - begins + 1).sum())
    if frames * pixels > MAX_DECODED_PIXELS:
        raise SampleError(
            f"{frames:,} frames of {pixels:,} pixels must be decoded, which are "
            f"{frames * pixels:,} pixels; at most {MAX_DECODED_PIXELS:,} are allowed; write the "
            "video with smaller frames or with more keyframes",
            "video cost",
        )


def _decode(
    container: "InputContainer", stream: "VideoStream", table: _Times, times: list[int]
) -> "Iterator[VideoFrame]":
    """Yields the frames that a player shows at some times.

    Decoding continues from the last frame, or begins at a keyframe that is nearer to the next one.
    """
    key_times = table.times[table.keys]
    key, decoder = -1, iter(())
    shown = coming = None
    for time in times:
        wanted = int(np.searchsorted(key_times, time, side="right")) - 1
        if wanted > key:
            key = wanted
            if shown is None or coming is None or key_times[key] > coming[0]:
                decoder = _decode_from(container, stream, table, int(table.seeks[key]))
                shown, coming = None, next(decoder, None)
                if key and (coming is None or coming[0] > time):  # the seek was not exact
                    decoder = _decode_from(container, stream, table, int(table.seeks[0]))
                    coming = next(decoder, None)
        while coming is not None and (shown is None or coming[0] <= time):
            shown, coming = coming, next(decoder, None)
        if shown is None:
            raise SampleError("no frame can be decoded", "video")
        yield shown[1]


def _decode_from(
    container: "InputContainer", stream: "VideoStream", table: _Times, start: int
) -> "Iterator[tuple[int, VideoFrame]]":
    """Yields frames with their times in the table, from the keyframe at a time `start`."""
    container.seek(0 if table.in_order else start, stream=stream)
    for number, frame in enumerate(container.decode(stream)):
        if table.in_order:
            yield number, frame
        elif frame.pts is not None:
            yield frame.pts, frame
