"""Frames of video files, of directories and of lists; videos that are bad in every way we know."""

import io
import os
import struct
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from llava_jax.data import video_file
from llava_jax.data.video_file import (
    Video,
    choose_frames,
    count_frames,
    iterate_frames,
    locate_video,
)
from llava_jax.errors import ConfigError, SampleError

BITS = 8
"""A frame shows its number as black and white columns, with the lowest bit at the left."""


def read_frames(video: Video, count: int, **options: bool) -> list[Image.Image]:
    return [*iterate_frames(video, count, **options)]


def draw(number: int, width: int = 64, height: int = 48) -> Image.Image:
    bits = np.array([[number >> bit & 1 for bit in range(BITS)]], np.uint8)
    columns = Image.fromarray(255 * bits).convert("RGB")
    return columns.resize((width, height), Image.Resampling.NEAREST)


def write_video(
    path: Path,
    count: int,
    *,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    milliseconds: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    width, height = size
    with av.open(path, "w", container_options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_image(draw(number, width, height))
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, path: Path, shift: float = 0, **options: str) -> Path:
    """Copies the packets, `shift` seconds earlier; those before 0 are not to be shown."""
    with av.open(source) as old, av.open(path, "w", container_options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                ticks = round(shift / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                new.mux(packet)
    return path


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    """The numbers that the frames show."""
    assert all(frame.mode == "RGB" for frame in frames)
    columns = [
        np.asarray(frame.resize((BITS, 1), Image.Resampling.BOX))[0, :, 0] for frame in frames
    ]
    return [int((column > 127) @ 2 ** np.arange(BITS)) for column in columns]


def read(path: Path | str, count: int) -> list[int]:
    """Also checks `count_frames`."""
    video = Video(str(path))
    found = numbers(read_frames(video, count))
    assert count_frames(video, count) == len(found)
    return found


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames in 10 seconds, with B-frames and nine keyframes; the header is at the start."""
    path = tmp_path_factory.mktemp("videos") / "movie.mp4"
    return write_video(path, 100, b_frames=2, options={"movflags": "faststart"})


def test_which_frames_are_chosen():
    """As by LLaVA-NeXT's process_video_with_decord."""
    assert choose_frames(100, 32, Fraction(10)) == [*range(0, 100, 10)]
    assert choose_frames(100, 10, Fraction(10)) == [*range(0, 100, 10)]
    assert choose_frames(100, 4, Fraction(10)) == [0, 33, 66, 99]
    assert choose_frames(300, 32, Fraction(30000, 1001)) == [*range(0, 300, 30)]
    assert choose_frames(9, 4, Fraction(30)) == [0]
    assert choose_frames(5, 8, Fraction(2, 5)) == [*range(5)]
    assert choose_frames(5, 8) == [*range(5)]
    assert choose_frames(100, 8) == np.linspace(0, 99, 8, dtype=int).tolist()
    assert choose_frames(100, 1) == [0]
    assert choose_frames(0, 4) == []


@pytest.mark.parametrize("count", [1, 4, 9, 10, 32])
def test_frames_of_a_file(movie, count):
    assert read(movie, count) == choose_frames(100, count, Fraction(10))


FILES: dict[str, dict[str, Any]] = {
    "a.mkv": {"b_frames": 2},
    "a.avi": {"codec": "mpeg4", "b_frames": 2},
    "h264.avi": {"b_frames": 2},
    "a.ts": {"b_frames": 2},
    "a.mpg": {"codec": "mpeg2video", "rate": 25, "b_frames": 2},
    "a.webm": {"codec": "libvpx"},
    "a.wmv": {"codec": "wmv2"},
    "a.flv": {"b_frames": 2},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.mov": {"codec": "mpeg4", "gop": 1},
    "fragmented.mp4": {"b_frames": 2, "options": {"movflags": "frag_keyframe+empty_moov"}},
    "one_keyframe.mp4": {"gop": 1000, "b_frames": 2},
}


@pytest.mark.parametrize("name", FILES)
def test_containers(name, tmp_path):
    path = write_video(tmp_path / name, 60, **FILES[name])
    rate = FILES[name].get("rate", 10)
    for count in (5, 30):
        assert read(path, count) == choose_frames(60, count, Fraction(rate))


def test_frames_between_keyframes_are_not_decoded(movie, monkeypatch):
    decoded = []
    decode_from = video_file._decode_from

    def counted(*arguments: Any):
        for frame in decode_from(*arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_file, "_decode_from", counted)
    assert read(movie, 2) == [0, 99]
    assert len(decoded) < 10
    decoded.clear()
    assert len(read(movie, 10)) == 10
    assert len(decoded) <= 100


def test_frames_are_at_irregular_times(tmp_path):
    """Frames are chosen by their numbers, as LLaVA-NeXT does."""
    times = np.cumsum(np.random.default_rng(0).integers(20, 400, 60)).tolist()
    for name, b_frames in (("a.mp4", 0), ("b.mp4", 2), ("a.mkv", 2)):
        path = write_video(tmp_path / name, 60, milliseconds=times, b_frames=b_frames)
        assert read(path, 5) == choose_frames(60, 5)


def test_a_cut_video_has_the_frames_that_a_player_shows(movie, tmp_path):
    """A file that was cut without encoding it again begins at a keyframe that is not shown."""
    path = remux(movie, tmp_path / "cut.mp4", shift=0.5)
    assert read(path, 3) == [5, 52, 99]
    assert read(path, 32) == [*range(5, 100, 10)]


def test_a_video_shorter_than_a_second_has_a_frame(tmp_path):
    assert read(write_video(tmp_path / "a.mp4", 3, rate=30), 8) == [0]
    assert read(write_video(tmp_path / "b.mp4", 1), 8) == [0]


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_a_rotated_video_is_turned_upright(movie, tmp_path, matrix, turns):
    """In the header's matrix (a, b, c, d), a point (x, y) is shown at (ax + cy, bx + dy)."""
    content = movie.read_bytes()
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content[:start] + turned + content[start + len(turned) :])
    upright = read_frames(Video(str(path)), 2)[1]
    stored = read_frames(Video(str(path)), 2, exif_orientation=False)[1]
    assert numbers([stored]) == [99]
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(stored), turns))


def test_memory_does_not_depend_on_the_length(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, size=(640, 480), codec="mpeg4")
    tracemalloc.start()
    frames = iterate_frames(Video(str(path)), 3)
    assert [frame.size for frame in frames] == [(640, 480)] * 3
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_content_of_a_file(movie):
    video = locate_video({"bytes": movie.read_bytes(), "path": None}, "", False)
    assert numbers(read_frames(video, 4)) == [0, 33, 66, 99]
    assert count_frames(video, 4) == 4
    with pytest.raises(SampleError, match="cannot read an embedded video of 5 bytes"):
        read_frames(Video(b"hello"), 4)


def test_remote_files(movie):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/videos/a.mp4", movie.read_bytes())
    frame = io.BytesIO()
    draw(4).save(frame, "PNG")
    system.pipe("/videos/frames/1.png", frame.getvalue())
    video = locate_video("a.mp4", "memory://videos", False)
    assert numbers(read_frames(video, 4)) == [0, 33, 66, 99]
    assert numbers(read_frames(locate_video("frames", "memory://videos", False), 4)) == [4]
    with pytest.raises(SampleError, match=r"video not found: memory://videos/b\.mp4"):
        read_frames(locate_video("b.mp4", "memory://videos", False), 4)


def write_frames(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        draw(number, 64 + 8 * number).save(folder / name)
    return folder


def test_a_directory_of_frames(tmp_path):
    folder = write_frames(tmp_path / "clip", *(f"f{number}.png" for number in range(12)))
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (folder / name).write_text("x")
    assert read(folder, 12) == [*range(12)]  # 10 is after 9
    assert read(folder, 4) == [0, 3, 7, 11]
    (folder / "f3.png").write_bytes(b"x")
    with pytest.raises(SampleError, match=r"cannot read image .*clip/f3.png: the file is damaged"):
        read_frames(Video(str(folder)), 4)
    assert count_frames(Video(str(folder)), 4) == 4


def test_a_list_of_frames(tmp_path):
    folder = write_frames(tmp_path / "clip", *(f"{number}.jpg" for number in range(12)))
    raw = [f"clip/{number}.jpg" for number in range(11)]
    last = {"bytes": (folder / "11.jpg").read_bytes(), "path": "11.jpg"}
    video = locate_video([*raw, last], str(tmp_path), False)
    assert isinstance(video.source, tuple)
    assert numbers(read_frames(video, 20)) == [*range(12)]
    assert numbers(read_frames(video, 3)) == [0, 5, 11]
    assert count_frames(video, 20) == 12
    (folder / "5.jpg").unlink()
    with pytest.raises(SampleError, match="image not found") as caught:
        read_frames(video, 3)
    assert caught.value.kind == "image missing"


def test_paths_obey_the_rules_of_images(tmp_path):
    write_frames(tmp_path / "outside", "0.png")
    root = tmp_path / "root"
    clip = write_frames(root / "clip", "0.png")
    (root / "link").symlink_to("../outside")
    (clip / "1.png").symlink_to("../../outside/0.png")
    for path in ("../outside", "/etc/hostname", "a\0b", "https://x.org/a.mp4"):
        with pytest.raises(SampleError, match=r"is outside data\.image_root") as caught:
            locate_video(path, str(root), False)
        assert caught.value.kind == "video path"
    with pytest.raises(SampleError, match=r"image path '\.\./outside/0\.png' is outside"):
        locate_video(["../outside/0.png"], str(root), False)
    with pytest.raises(SampleError, match="because of a symbolic link"):
        locate_video("link", str(root), False)
    assert len(read_frames(locate_video("link", str(root), True), 2)) == 1
    inside = locate_video("clip", str(root), False)
    assert len(read_frames(inside, 1)) == 1
    with pytest.raises(
        SampleError, match=r"image .*1.png' is outside .* because of a symbolic link"
    ):
        read_frames(inside, 2)
    assert len(read_frames(locate_video("clip", str(root), True), 2)) == 2
    with pytest.raises(SampleError, match="10,001 frames in a list; at most 10,000"):
        locate_video(["a.png"] * 10_001, str(root), False)


def sound(path: Path) -> Path:
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, path: Path, kept: float) -> Path:
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    return path


def damage(source: Path, path: Path) -> Path:
    content = source.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + 20] + bytes(len(content) - start - 20))
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


NOT_A_VIDEO = "the file is truncated or damaged, or its format is none of"
BAD: dict[str, tuple[Any, str, str]] = {
    "no file": (lambda folder, movie: folder / "x.mp4", "video missing", "video not found: "),
    "no directory": (lambda folder, movie: folder / "x", "video missing", "video not found: "),
    "an empty file": (lambda folder, movie: text(folder / "x.mp4", ""), "video", NOT_A_VIDEO),
    "a text": (lambda folder, movie: text(folder / "x.mp4", "hi\n" * 99), "video", NOT_A_VIDEO),
    "an image": (
        lambda folder, movie: write_frames(folder, "x.png") / "x.png", "video", NOT_A_VIDEO),
    "a playlist": (
        lambda folder, movie: text(folder / "x.mp4", f"ffconcat version 1.0\nfile {movie}\n"),
        "video", NOT_A_VIDEO),
    "a playlist of a server": (
        lambda folder, movie: text(folder / "x.mp4", f"#EXTM3U\n#EXTINF:9,\n{movie}\n"),
        "video", NOT_A_VIDEO),
    "only sound": (lambda folder, movie: sound(folder / "x.mp4"), "video", "the file has no video"),
    "the end is missing": (
        lambda folder, movie: cut(movie, folder / "x.mp4", 0.7),
        "video", "the file is truncated: it should have 100 frames, but has "),
    "only a header": (
        lambda folder, movie: cut(movie, folder / "x.mp4", 0.1), "video", NOT_A_VIDEO),
    "damaged": (lambda folder, movie: damage(movie, folder / "x.mp4"), "video", "Invalid data"),
    "an empty directory": (
        lambda folder, movie: folder, "video", "the directory has no image files"),
    "a directory of texts": (
        lambda folder, movie: text(folder / "a.txt", "x").parent,
        "video", "the directory has no image files (.png, "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_videos(name, movie, tmp_path):
    make, kind, message = BAD[name]
    path = make(tmp_path, movie)
    with pytest.raises(SampleError) as caught:
        read_frames(Video(str(path)), 4)
    assert caught.value.kind == kind
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    if name not in ("the end is missing", "damaged"):  # which only the header does not show
        with pytest.raises(SampleError):
            count_frames(Video(str(path)), 4)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(SampleError, match="not a regular file"):
        read_frames(Video(str(tmp_path / "x.mp4")), 4)


def test_what_a_video_may_cost(movie, tmp_path, monkeypatch):
    video = Video(str(movie))
    with monkeypatch.context() as changed:
        changed.setattr(video_file, "MAX_PIXELS", 3000)
        for function in (read_frames, count_frames):
            with pytest.raises(SampleError, match="64 x 48 = 3,072 pixels") as caught:
                function(video, 4)
            assert caught.value.kind == "video size"
    with monkeypatch.context() as changed:
        changed.setattr(video_file, "MAX_PACKETS", 50)
        for path in (movie, remux(movie, tmp_path / "a.mkv")):
            for function in (read_frames, count_frames):
                with pytest.raises(SampleError, match="1 to 50 are allowed") as caught:
                    function(Video(str(path)), 4)
                assert caught.value.kind == "video cost"
    with monkeypatch.context() as changed:
        changed.setattr(video_file, "MAX_DECODED_PIXELS", 10 * 64 * 48)  # every 8th is a keyframe
        assert len(read_frames(video, 4)) == 4  # 1 + 2 + 3 + 4 frames
        with pytest.raises(SampleError, match="36 frames of 3,072 pixels must be dec") as caught:
            read_frames(video, 10)
        assert caught.value.kind == "video cost"


def test_a_frame_that_grows_is_refused(tmp_path, monkeypatch):
    """The header of a transport stream may say less than its frames have."""
    small = write_video(tmp_path / "a.ts", 20)
    large = write_video(tmp_path / "large.ts", 20, size=(320, 240))
    large = remux(large, tmp_path / "b.ts", shift=-2)
    (tmp_path / "c.ts").write_bytes(small.read_bytes() + large.read_bytes())
    monkeypatch.setattr(video_file, "MAX_PIXELS", 5000)
    with pytest.raises(SampleError, match=r"cannot read video .*c\.ts"):
        read_frames(Video(str(tmp_path / "c.ts")), 100)


def test_without_the_package(movie, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(
        ConfigError, match=r"needs the package av: pip install 'llava_jax\[video\]'"
    ):
        read_frames(Video(str(movie)), 4)
