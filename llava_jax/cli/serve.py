"""Implements `llava-jax serve`, which serves a model with OpenAI's API and a web page."""

import argparse
import ipaddress
import os
import re
import signal
import socket
import sys
from typing import Any

from llava_jax.cli.arguments import Parser, report_errors
from llava_jax.cli.model_options import (
    add_model_options,
    chosen_quantisation,
    find_checkpoint,
    load_assistants,
)

INSTALL = "serving needs packages that are not installed: pip install 'llava_jax[serve]'"
ORIGIN = re.compile(r"(http(?!\S*:80$)|https(?!\S*:443$))://[a-z0-9._-]+(:\d+)?")
"""Matches an origin as browsers send it: in lower case, and without the default port."""
KEY_VARIABLE = "LLAVA_JAX_API_KEY"
MAX_OPTION = 2**31
"""Limit of all numeric options."""
GRACE = 10
"""Number of seconds that unfinished answers may still take after a signal to stop."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 after a signal to stop, 1 for a user's mistake, a bad checkpoint or a missing package.
    """
    given = parse(argv)
    try:
        from llava_jax.serving import app, connections  # noqa: F401 - fails if a package is missing
        from llava_jax.serving.web_page import load_gradio

        if not given.no_page:
            load_gradio()
    except ModuleNotFoundError as error:
        print(f"error: {INSTALL} ({error})", file=sys.stderr)
        return 1
    # uvicorn sends SIGTERM to this process again when the server has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return report_errors(lambda: serve(given))
    except KeyboardInterrupt:
        return 0


def serve(given: argparse.Namespace) -> int:
    """Serves until a signal stops the server, and returns the exit status 0."""
    with bind(given) as listener:
        run(given, listener)
    return 0


def run(given: argparse.Namespace, listener: socket.socket) -> None:
    """Loads the models and serves them until a signal stops the server.

    Args:
        given: Arguments of the command.
        listener: Socket from `bind`.

    Raises:
        ConfigError: An option is not allowed for this model.
        CheckpointError: A checkpoint cannot be used.
    """
    import uvicorn

    from llava_jax.serving.access import guard_access
    from llava_jax.serving.app import make_app
    from llava_jax.serving.connections import Connections
    from llava_jax.serving.service import Service
    from llava_jax.serving.web_page import add_page

    # The thread that generates answers takes Python's global lock many times for each token. With
    # the default interval, it would wait 5 ms each time while another thread reads requests.
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
        proxy_headers=bool(
            given.allow_origin
        ),  # without a proxy, clients could forge these headers
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

    def handle_exit(sig: int, frame: Any) -> None:
        service.ending.set()
        connections.end_in(GRACE - 2)  # two seconds before uvicorn cancels the tasks
        end(sig, frame)

    server.handle_exit = handle_exit
    server.run(sockets=[listener])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = Parser(
        prog="llava-jax serve",
        description="Serves a model over HTTP: OpenAI's chat completions at /v1, a web page at /, "
        "and also /health and /metrics. Without an API key, everyone who can reach the port can "
        "use the server. Therefore a server without an API key can be reached only from this "
        "machine, unless --no-auth is given.",
    )
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--name",
        help="model name that clients use (default: the name of the checkpoint's directory)",
    )
    add_further_models(parser)
    add("--no-page", action="store_true", help="serve the API without the web page")
    add(
        "--remote-images",
        action="store_true",
        help="fetch images from public http and https URLs that clients send (default: accept only "
        "images that are part of the request)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="IP address to listen on (default: 127.0.0.1, which can be reached only from this "
        "machine); 0.0.0.0 can be reached from all networks, and requires --api-key or --no-auth",
    )
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help="API key that clients must send as `Authorization: Bearer KEY`, or enter as the "
        "password if the browser asks for a password (default: the value of the environment "
        f"variable {KEY_VARIABLE}, or no key). Other users of this machine can see the options of "
        "a command, but not its environment variables",
    )
    add(
        "--no-auth",
        action="store_true",
        help="allow other machines to connect without an API key: everyone who can reach the port "
        "can use the server",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of other web pages that may use the server, for example "
        "https://chat.example.org (default: none). Requests to the host name of the origin are "
        "also accepted, because a reverse proxy sends such requests. The option can be given "
        "several times",
    )
    for name, default, text in (
        ("--port", 7860, "port to listen on; 0 chooses a free port"),
        ("--slots", 8, "number of conversations that are answered at the same time"),
        ("--max-new-tokens", 1024, "maximum number of tokens of an answer"),
        ("--max-images", 4, "maximum number of images in a conversation"),
        ("--max-image-mib", 12.0, "maximum size of an image file in MiB"),
        ("--max-image-side", 8192, "maximum length of an image's longer side in pixels"),
        ("--max-body-mib", 20.0, "maximum size of a request body in MiB"),
        (
            "--max-queue",
            64,
            "maximum number of waiting requests; others get HTTP status 429",
        ),
        ("--max-client-queue", 32, "maximum number of waiting requests from one IP address"),
        ("--max-seconds", 300.0, "maximum number of seconds that a request may take"),
    ):
        help_to = f"{text} (default: %(default)s)"
        add(name, type=type(default), default=default, metavar="N", help=help_to)
    given = parser.parse_args(argv)
    check_options(given, parser)
    return given


def add_further_models(parser: argparse.ArgumentParser) -> None:
    """Adds the options that serve further models of the same base."""
    add = parser.add_argument
    add(
        "--compare",
        action="store_true",
        help="also serve the base model of the adapter; its weights are in memory only once",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        type=named_adapter,
        metavar="NAME=DIR",
        help="also serve an adapter of the same base model under this name; clients choose it with "
        "the field `model` of a request. The weights of the base are in memory only once. The "
        "option can be given several times",
    )


def named_adapter(text: str) -> tuple[str, str]:
    """Parses NAME=DIR; used as the `type` of an argument.

    Raises:
        ArgumentTypeError: The name or the directory is missing, or the name cannot be printed.
    """
    name, _, directory = text.partition("=")
    if not (name and directory and name.isprintable()):
        raise argparse.ArgumentTypeError(
            f"{text!a}: the format is NAME=DIR, such as cats=runs/cats"
        )
    return name, directory


def check_options(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Checks option values, strips spaces from the API key and converts origins to lower case.

    Args:
        given: Arguments of the command; the API key and the origins are changed in place.
        parser: Parser that reports errors.

    Raises:
        SystemExit: A value is not allowed (status 2).
    """
    if given.name is not None and not (given.name and given.name.isprintable()):
        parser.error(f"--name {given.name!a}: the name must be printable and not empty")
    for name, value in vars(given).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name != "port" and not 0 < value < MAX_OPTION:
            text = f"the value must be above 0 and below {MAX_OPTION}"
            parser.error(f"--{name.replace('_', '-')} {value}: {text}")
    if not 0 <= given.port < 2**16:
        parser.error(f"--port {given.port}: a port is a number from 0 to 65535")
    if given.api_key is not None:
        given.api_key = given.api_key.strip()
        if not given.api_key.isprintable() or not given.api_key:
            parser.error(
                f"the API key from --api-key or {KEY_VARIABLE} is empty, or contains characters "
                "that cannot be printed"
            )
    given.allow_origin = [origin.lower() for origin in given.allow_origin]
    for origin in given.allow_origin:
        if not ORIGIN.fullmatch(origin):
            parser.error(
                f"--allow-origin {origin}: an origin has the form https://chat.example.org, or "
                "https://chat.example.org:8443 if the port is not the default port"
            )


def bind(given: argparse.Namespace) -> socket.socket:
    """Returns a socket that is bound to the address that the arguments name.

    A wrong address is reported before models are loaded.

    Args:
        given: Arguments of the command.

    Raises:
        ConfigError: The address cannot be used, or other machines could reach a server without an
            API key.
    """
    from llava_jax.errors import ConfigError

    host = given.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the socket was created with the protocol TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, given.port))
        address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
        if not (address.is_loopback or given.api_key or given.no_auth):
            raise ConfigError(
                f"--host {host!r} lets other machines connect, and there is no API key: set "
                f"{KEY_VARIABLE} (or give --api-key), or give --no-auth if everyone may "
                "use the server"
            )
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {given.port}: {error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def limits(given: argparse.Namespace) -> Any:
    """Returns the limits of requests that the options set."""
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
    """Loads the models, compiles them for common prompts and returns them by name.

    The first model is the checkpoint. With --compare, the base model of its adapter follows, and
    then the adapters of --adapter. All models share the weights of the base.

    Args:
        given: Arguments of the command.

    Raises:
        ConfigError: An option is not allowed for this model.
        CheckpointError: A checkpoint cannot be used.
    """
    from llava_jax.config import format_source, parse_source
    from llava_jax.errors import ConfigError
    from llava_jax.pretrained.resolve import base_warnings, model_name, resolve

    checkpoint = find_checkpoint(given)
    quantize = chosen_quantisation(given, checkpoint)
    found = {given.name or model_name(given.checkpoint): checkpoint}
    if given.compare:
        if checkpoint.adapter is None:
            raise ConfigError(
                f"--compare needs an adapter, but {format_source(given.checkpoint)} is a whole "
                "model without a base model; leave out --compare"
            )
        name = model_name(parse_source(checkpoint.name))
        found[f"{name}-base" if name in found else name] = checkpoint._replace(adapter=None)
    for name, directory in given.adapter:
        if name in found:
            raise ConfigError(f"--adapter {name}={directory}: there is another model {name!r}")
        found[name] = one = resolve(directory, base=checkpoint.base)
        for line in base_warnings(one.adapter, checkpoint, quantize) if one.adapter else ():
            print(f"--adapter {name}: {line}", flush=True)
    names = [str(one.adapter or format_source(one.base)) for one in found.values()]
    print(f"loading {', '.join(names)}", flush=True)
    loaded = load_assistants(given, [*found.values()], slots=given.slots, quantize=quantize)
    assistants = dict(zip(found, loaded, strict=True))
    for assistant in loaded:
        warm_up(assistant)
    return assistants


def warm_up(assistant: Any) -> None:
    """Compiles the programs for prompts without images, prompts with one image, and decoding.

    Raises:
        ConfigError: The model cannot answer a short question about an image, for example because
            the maximum length is too small.
    """
    from PIL import Image

    from llava_jax.data.conversation import Turn
    from llava_jax.errors import ConfigError, SampleError
    from llava_jax.generation.prompts import Prompt

    question = "What is in the picture?"
    for images in ((), (Image.new("RGB", (64, 64)),)):
        turn = Turn("human", "<image>\n" * len(images) + question)
        try:
            for _ in assistant.stream(Prompt((turn,), images), max_new_tokens=2):
                pass
        except SampleError as error:
            text = f"the model cannot answer a short question about an image: {error}"
            raise ConfigError(text) from error


if __name__ == "__main__":
    sys.exit(main())
