"""Runs the programs of a checkpoint in a process of their own that has limits.

A chat template is a program, and so is a regular expression. Jinja's sandbox keeps a template away
from files and from Python's internals, but it allows endless loops and texts of any length, and
nothing inside a process can reliably stop them: `"x" * 10**9` is a single step. The system can
limit a process, and the process can end and be started again without harm to this one.

This file is also that process's program. It imports no more than Jinja, so it starts in 0.1 s.
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

SECONDS = 1  # of a processor's time; a real template takes a few milliseconds
_MEMORY = 2**29  # bytes besides those that it starts with
_MAX_ADDED = 2**20  # characters that a template may add to a conversation


class ProgramError(Exception):
    """A program that failed, or took more time or memory than it may."""


class LimitedProcess:
    """Runs `render` and `match` in a process with limits. Several threads may call it at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, task: str, **arguments: object) -> Any:
        """What a task gives.

        Args:
            task: "render" or "match", the functions below.
            arguments: Theirs, as JSON has them.

        Raises:
            ProgramError: The program fails, or takes more time or memory than it may.
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
            except BrokenPipeError:  # it is dead, as the next lines find
                answer = b""
            except OSError as error:
                raise ProgramError(f"no process can be started for it: {error}") from error
            if not answer.endswith(b"\n"):
                self._end()
                raise ProgramError(
                    f"it takes more than {SECONDS} s of processor time or {_MEMORY // 2**20} MiB"
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
                start_new_session=True,  # a Ctrl-C is not meant for it
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not written yet
            assert pipe is not None
            pipe.close()


def _serve() -> None:
    """Answers requests, a line each, until there are no more."""
    import resource
    import signal

    with contextlib.suppress(OSError):  # only Linux says what is used, and only it has such limits
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tasks = {"render": render, "match": match}
    for line in sys.stdin.buffer:
        task, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever it is at
        try:
            answer = tasks[task](**arguments), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"[:500]
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def match(patterns: list[str], names: list[str]) -> list[int | None]:
    """The first pattern that each name, or a part of it behind a dot, matches as a whole."""
    compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
    found = lambda name: (index for index, known in enumerate(compiled) if known.match(name))
    return [next(found(name), None) for name in names]


def render(
    template: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]
) -> str:
    """A conversation as text, as transformers' `apply_chat_template` makes it for generation."""
    # The template has the messages, to change at will.
    most = len(json.dumps(messages)) + _MAX_ADDED
    made = _compiled(template)
    given = {"tools": None, "documents": None, **variables}
    text = made.render({**given, "messages": messages, "add_generation_prompt": True})
    if len(text) > most:
        raise ValueError(f"it makes a text of {len(text):,} characters")
    return text


def _compiled(template: str) -> Any:
    """A template in the environment that transformers gives it."""
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
        """What a template marks as an answer is text like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Takes no name that means something to Python."""

        def __init__(*args: Any, **values: object):
            self, *given = args  # so that a value may be called self
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*given, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")
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
    made.globals["dict"] = lambda *args, **values: dict(*args, **values)  # without its methods
    made.globals["namespace"] = Namespace
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


if __name__ == "__main__":
    _serve()
