"""Runs code from a checkpoint in a separate process with limits on time and memory.

A chat template is code, and so is a regular expression. Jinja's sandbox keeps a template away from
files and from Python's internals, but it allows endless loops and texts of any length. A process
cannot reliably stop code that it runs itself, because `"x" * 10**9` is a single step. A separate
process can be limited by the operating system, and can be killed and started again.

This file is also the program of the separate process. Besides the standard library, it imports only
Jinja, so the process starts in 0.1 s.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SECONDS = 1  # of CPU time per task; a real template takes a few milliseconds
_MEMORY = 2**29  # bytes, in addition to the memory that the process uses at its start
_MAX_ADDED = 2**20  # characters that a template may add to the messages


class ProgramError(Exception):
    """Raised if a task fails, or exceeds its limit on time or memory."""


class LimitError(ProgramError):
    """Raised if a task exceeds its limit on time or memory, so that trying it again is slow."""


class LimitedProcess:
    """Runs the functions `render`, `match` and `targets` in a process with limits.

    Several threads may share an object.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, task: str, **arguments: object) -> Any:
        """Runs a task and returns its result.

        Args:
            task: Name of a function in this module: "render", "match" or "targets".
            arguments: Keyword arguments of the function; they are sent as JSON.

        Raises:
            ProgramError: The task fails or exceeds a limit, or no process can be started.
        """
        request = json.dumps([task, arguments], default=str).encode() + b"\n"
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:  # the process has ended, which the next lines report
                answer = b""
            except OSError as error:
                raise ProgramError(f"the separate process cannot be started: {error}") from error
            if not answer.endswith(b"\n"):
                self._end()
                raise LimitError(
                    f"it needs more than {SECONDS} s of processor time, or more than "
                    f"{_MEMORY // 2**20} MiB of memory"
                )
        value, error = json.loads(answer)
        if error is not None:
            raise ProgramError(error)
        return value

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C must not end this process
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # close() may try to write the rest of a request
            assert pipe is not None
            pipe.close()


def _serve() -> None:
    """Answers requests, one per line of standard input, until the input ends."""
    import resource
    import signal

    with contextlib.suppress(OSError):  # this file and this limit exist only on Linux
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tasks = {"render": render, "match": match, "targets": targets}
    for line in sys.stdin.buffer:
        task, arguments = json.loads(line)
        # After this time a signal ends the process, even in the middle of a single step.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = tasks[task](**arguments), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"[:500]
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def match(patterns: list[str], names: list[str]) -> list[int | None]:
    """Returns, for each name, the index of the first pattern that matches the name, or None.

    A pattern must match the whole name, or everything after one of the dots in the name.
    """
    compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
    found = lambda name: (index for index, known in enumerate(compiled) if known.match(name))
    return [next(found(name), None) for name in names]


def targets(
    modules: list[str],
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None,
    modules_to_save: list[str] | None,
    layers_to_transform: int | list[int] | None,
    layers_pattern: str | list[str] | None,
) -> list[bool]:
    """Returns, for each module, whether PEFT adds an adapter to it.

    Args:
        modules: Names of linear layers.
        target_modules: Regular expression for the whole name, "all-linear", or whole names or ends
            of names.
        exclude_modules: Modules that get no adapter, in the same form.
        modules_to_save: Names of modules that were trained in full, and get no adapter.
        layers_to_transform: Indices of the layers that get adapters, if `target_modules` is a list
            with ends of names. Whole names are not limited to these layers.
        layers_pattern: Names before the index of a layer; none means any name.
    """

    def is_named(name: str, rule: str | list[str]) -> bool:
        if isinstance(rule, str):
            return re.fullmatch(rule, name) is not None
        return name in rule or name.endswith(tuple(f".{end}" for end in rule))

    chosen = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    before = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    ahead = r"(?:^|.*?\.)" if layers_pattern else r".*?\."

    def is_in_layer(name: str) -> bool:
        if not chosen or isinstance(target_modules, str) or name in target_modules:
            return True
        found = (re.match(rf"{ahead}{pattern}\.(\d+)\.", name) for pattern in before)
        match = next((match for match in found if match), None)
        return match is not None and int(match[match.lastindex or 1]) in chosen

    def is_excluded(name: str) -> bool:
        saved = (re.match(rf"(^|.*\.){m}($|\..*)", name) for m in modules_to_save or ())
        return (bool(exclude_modules) and is_named(name, exclude_modules)) or any(saved)

    is_all = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    is_target = lambda name: is_all or (is_named(name, target_modules) and is_in_layer(name))
    return [is_target(name) and not is_excluded(name) for name in modules]


# A character for private use marks where the last message ends. The space after it shows whether
# the template keeps spaces at the end of a message.
_END = "\ue0fe "


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, object],
    continues: bool = False,
) -> str:
    """Renders a conversation as text for generation, like transformers' `apply_chat_template`.

    Args:
        template: Jinja source of the chat template.
        messages: Conversation in the format of `apply_chat_template`.
        variables: Further variables of the template, such as `bos_token`.
        continues: Whether the text ends with the last message, like `continue_final_message`;
            otherwise it ends with the start of an answer, like `add_generation_prompt`.

    Raises:
        ValueError: The rendered text is much longer than the messages, or has no last message.
        jinja2.TemplateError: The template is invalid. The template's code may raise other errors.
    """
    # The length is taken first, because the template can change the messages.
    most = len(json.dumps(messages)) + _MAX_ADDED
    made = _compiled(template)
    given = {"tools": None, "documents": None, **variables}
    if continues:
        messages = [*messages[:-1], _with_end(messages[-1])]
    text = made.render({**given, "messages": messages, "add_generation_prompt": not continues})
    if len(text) > most:
        raise ValueError(f"the rendered text has {len(text):,} characters, more than {most:,}")
    return _until_end(text) if continues else text


def _with_end(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a message with `_END` after its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _END}
    *before, last = content
    return {**message, "content": [*before, {**last, "text": last["text"] + _END}]}


def _until_end(text: str) -> str:
    """Returns the text before `_END`, without spaces at its end if the template removes them."""
    end = text.rfind(_END[0])
    if end < 0:
        raise ValueError("the template leaves out the last message, so it cannot be continued")
    return text[:end] if text.startswith(_END, end) else text[:end].rstrip()


def _compiled(template: str) -> Any:
    """Returns the compiled template, in an environment like that of transformers."""
    if template not in _known:
        _known[template] = _environment().from_string(template)
    return _known[template]


_known: dict[str, Any] = {}


def _environment() -> Any:
    import datetime

    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """Renders the content of `{% generation %}`, which marks answers, as ordinary text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace, but without attributes whose names start with an underscore."""

        def __init__(*args: Any, **values: object):
            self, *given = args  # so that an attribute can have the name self
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*given, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"the attribute {name!r} must not start with _"
                )
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    # A function instead of the class, so that templates cannot reach attributes of `dict`.
    made.globals["dict"] = lambda *args, **values: dict(*args, **values)
    made.globals["namespace"] = Namespace
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


if __name__ == "__main__":
    _serve()
