"""Serves a checkpoint, as OpenAI's API and as a web page: `python tools/serve.py --help`."""

import argparse
import ipaddress
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from llava_jax.generation.cli_options import add_model_options, load_assistant

INSTALL = "serving needs more packages: pip install -e '.[serve]'"
ORIGIN = re.compile(r"(http(?!\S*:80$)|https(?!\S*:443$))://[a-z0-9._-]+(:\d+)?")
"""As browsers send it."""
KEY_VARIABLE = "LLAVA_JAX_API_KEY"
GRACE = 10
"""Seconds that answers in progress are given when the server is told to end."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 for a mistake or a checkpoint that is amiss."""
    given = parse(argv)
    try:
        from llava_jax.serving import app, connections  # noqa: F401 - to see whether they can be had
        from llava_jax.serving.web_page import load_gradio

        if not given.no_page:
            load_gradio()
    except ModuleNotFoundError as error:
        print(f"error: {INSTALL} ({error})", file=sys.stderr)
        return 1
    from llava_jax.errors import CheckpointError, ConfigError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn passes it on when it has ended
    try:
        with bind(given) as listener:
            run(given, listener)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def run(given: argparse.Namespace, listener: socket.socket) -> None:
    """Loads the models and serves them until a signal ends it.

    Raises:
        ConfigError, CheckpointError: They cannot be had.
    """
    import uvicorn

    from llava_jax.serving.access import guard_access
    from llava_jax.serving.app import make_app
    from llava_jax.serving.connections import Connections
    from llava_jax.serving.service import Service
    from llava_jax.serving.web_page import add_page

    # The thread that generates asks for the interpreter many times a token; while requests are
    # read, it would wait 5 ms each time.
    sys.setswitchinterval(0.0005)
    service = Service(load(given), limits(given))
    app = make_app(service)
    if not given.no_page:
        add_page(app, service)
    guard_access(app, host=given.host, api_key=given.api_key, origins=given.allow_origin)
    connections = Connections()
    config = uvicorn.Config(
        app,
        http=connections.protocol(),  # pyright: ignore[reportArgumentType]
        proxy_headers=bool(given.allow_origin),  # without a proxy, clients would make them up
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    listener.listen(1024)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{', '.join(service.names)}: listening on http://{shown}:{port}", flush=True)
    server = uvicorn.Server(config)
    end = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        service.ending.set()
        connections.end_in(GRACE - 2)  # before uvicorn would cancel their tasks
        end(number, frame)

    server.handle_exit = handle_exit
    server.run(sockets=[listener])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/serve.py",
        description="Serves a checkpoint: OpenAI's chat completions at /v1, a page at /, and "
        "/health and /metrics. Without --api-key, whoever reaches the port may use it; so it then "
        "listens on this machine alone.",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--name", help="what the model is called; default: as its directory")
    add("--compare", action="store_true", help="serve its base too, which takes the memory twice")
    add("--no-page", action="store_true", help="the API alone")
    add(
        "--remote-images",
        action="store_true",
        help="fetch images from public http(s) URLs (off by default)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on. Default 127.0.0.1: this machine only. 0.0.0.0: all networks; "
        "needs a key or --no-auth",
    )
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help="what clients must send, as `Authorization: Bearer KEY` or to the browser's prompt; "
        f"better set {KEY_VARIABLE}, which other users of the machine cannot see",
    )
    add(
        "--no-auth",
        action="store_true",
        help="allow other machines to connect without a key: anyone who reaches the port can use "
        "the server",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of another origin ask, and answer to its host name too, as for a proxy: "
        "https://chat.example.org; may be given several times",
    )
    for name, default, text in (
        ("--port", 7860, "where to listen; 0 is any that is free"),
        ("--slots", 8, "conversations that are answered at a time"),
        ("--max-new-tokens", 1024, "of an answer"),
        ("--max-images", 4, "in a conversation"),
        ("--max-image-mib", 12.0, "of an image's file"),
        ("--max-image-side", 8192, "pixels of an image's longer side"),
        ("--max-body-mib", 20.0, "of a request"),
        ("--max-queue", 64, "requests that wait; to more the answer is 429"),
        ("--max-client-queue", 32, "requests of one address that wait"),
        ("--max-seconds", 300.0, "that a request may take"),
    ):
        help_to = f"{text}; default: %(default)s"
        add(name, type=type(default), default=default, metavar="N", help=help_to)
    given = parser.parse_args(argv)
    if given.name is not None and not (given.name and given.name.isprintable()):
        parser.error(f"--name {given.name!a}: it must have characters, and printable ones alone")
    for name, value in vars(given).items():
        if isinstance(value, int | float) and value is not False and value <= 0 and name != "port":
            parser.error(f"--{name.replace('_', '-')} {value}: it must be above 0")
    if given.api_key is not None:
        given.api_key = given.api_key.strip()
        if not given.api_key.isprintable() or not given.api_key:
            parser.error("the API key is empty, or has characters that cannot be printed")
    given.allow_origin = [origin.lower() for origin in given.allow_origin]
    for origin in given.allow_origin:
        if not ORIGIN.fullmatch(origin):
            parser.error(
                f"--allow-origin {origin}: an origin is as https://chat.example.org, with the port "
                "if it is not the usual one"
            )
    return given


def bind(given: argparse.Namespace) -> socket.socket:
    """A socket at the address, before anything is loaded in vain.

    Raises:
        ConfigError: It is not to be had, or other machines could reach a server without a key.
    """
    from llava_jax.errors import ConfigError

    host = given.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of a socket that does not say TCP, asyncio would not send small answers at once.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, given.port))
        address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
        if not (address.is_loopback or given.api_key or given.no_auth):
            raise ConfigError(
                f"--host {host!r} lets other machines in, and there is no key: set {KEY_VARIABLE} "
                "(or give --api-key), or say --no-auth if whoever reaches the port may use it"
            )
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {given.port}: {error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def limits(given: argparse.Namespace) -> Any:
    """What the command line lets requests have."""
    from llava_jax.serving.limits import MIB, Limits

    return Limits(
        queue=given.max_queue,
        client_queue=given.max_client_queue,
        body_bytes=int(given.max_body_mib * MIB),
        image_bytes=int(given.max_image_mib * MIB),
        image_pixels=given.max_image_side**2,
        images=given.max_images,
        new_tokens=given.max_new_tokens,
        seconds=given.max_seconds,
        remote_images=given.remote_images,
    )


def load(given: argparse.Namespace) -> dict[str, Any]:
    """The models, by name and compiled for a usual prompt; the base, if asked for, the second.

    Raises:
        ConfigError, CheckpointError: One cannot be had.
    """
    from llava_jax.pretrained.resolve import model_name

    found = {given.name or model_name(given.checkpoint): given}
    if given.compare:
        base = base_of(given)
        name = model_name(base.checkpoint)
        found[f"{name}-base" if name in found else name] = base
    assistants = {}
    for name, one in found.items():
        print(f"loading {one.checkpoint}", flush=True)
        assistants[name] = load_assistant(one, slots=given.slots)
        warm_up(assistants[name])
    return assistants


def base_of(given: argparse.Namespace) -> argparse.Namespace:
    """The same for what the checkpoint was trained on, in as many bits.

    Raises:
        ConfigError: It does not say.
    """
    from llava_jax.config import format_source, parse_source
    from llava_jax.errors import ConfigError
    from llava_jax.pretrained.resolve import quantisation_of, resolve

    base = given.base
    if base is None:
        found = resolve(parse_source(given.checkpoint) or given.checkpoint)
        if found.adapter is None:
            raise ConfigError(f"--compare: {given.checkpoint} is no adapter, and names no base")
        base = format_source(found.base)
    bits = given.quantize or quantisation_of(Path(given.checkpoint)) or "none"
    return argparse.Namespace(**vars(given) | {"checkpoint": base, "base": None, "quantize": bits})


def warm_up(assistant: Any) -> None:
    """Compiles what most requests need: a prompt alone, one with an image, and the step."""
    from PIL import Image

    from llava_jax.data.conversation import SampleError, Turn
    from llava_jax.errors import ConfigError
    from llava_jax.generation.prompts import Prompt

    question = "What is in the picture?"
    for images in ((), (Image.new("RGB", (64, 64)),)):
        turn = Turn("human", "<image>\n" * len(images) + question)
        try:
            for _ in assistant.stream(Prompt((turn,), images), max_new_tokens=2):
                pass
        except SampleError as error:
            raise ConfigError(f"no place for a picture and a question: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
