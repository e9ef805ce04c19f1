"""Where processes meet: who does not come, or comes twice, is named."""

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from several_processes import free_port

from llava_jax.distributed import rendezvous
from llava_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 1.5)
    monkeypatch.setattr(rendezvous, "FIRST_LINE_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "_TRY_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "_ACCEPT_SECONDS", 0.1)


def meet(*processes: tuple[int, int], address: str | None = None) -> list[str]:
    """Processes with a count and a number each; what each says, "" for one that met the others."""
    address = address or f"127.0.0.1:{free_port()}"

    def one(process: tuple[int, int]) -> str:
        try:
            rendezvous.meet_at(address, *process)
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_all_meet_and_leave_the_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 30)
    port = free_port()
    for address in (f"127.0.0.1:{port}", f"localhost:{port}"):  # again at once, as JAX does
        assert meet((4, 3), (4, 0), (4, 2), (4, 1), address=address) == [""] * 4


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ([(2, 0), (2, 0)], "two processes have the number 0: .*, pid .*, and .*JAX_PROCESS_ID"),
        ([(3, 0), (3, 1), (3, 1)], "two processes have the number 1: .*, pid .*, and .*"),
        ([(2, 0), (3, 1), (3, 2)], "process . .* expects 3 processes, but process 0 expects 2"),
        ([(2, 0), (2, 2)], "process number 2 is not in the range 0 to 1; set JAX_PROCESS_ID"),
        ([(2, 0), (2, -1)], "process number -1 is not in the range 0 to 1"),
        ([(3, 0), (3, 2)], "after 1.5 s, 2 of 3 processes have .* 127.0.0.1:.*, but not process 1"),
    ],
)
def test_all_hear_what_is_wrong(processes: list[tuple[int, int]], said: str):
    for error in meet(*processes):
        assert re.search(said, error)


def test_who_waits_says_so(capsys: pytest.CaptureFixture[str]):
    meet((9, 0), address=(address := f"127.0.0.1:{free_port()}"))
    state = f"the processes of this run: 1 of 9 processes have connected to {address}, but not "
    assert capsys.readouterr().err == f"waiting for {state}process 1, 2, 3, 4, 5, 6, 7, 8\n"


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Connection refused"), ("no.invalid", "Name or service")]
)
def test_an_address_that_is_not_reached_is_named(
    capsys: pytest.CaptureFixture[str], host: str, reason: str
):
    address = f"{host}:{free_port()}"
    (error,) = meet((2, 1), address=address)
    start = f"process 0 of this run could not be reached at {address} for 1.5 s: "
    assert error.startswith(start)
    assert capsys.readouterr().err.startswith(f"waiting for process 0 of this run at {address}: ")
    assert reason in error or host == "no.invalid"  # a resolver has words of its own


def test_an_address_where_something_else_answers_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            while True:
                try:
                    with other.accept()[0] as connection:
                        connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        (error,) = meet((2, 1), address=address)
        other.shutdown(socket.SHUT_RDWR)
    assert "another program answers there" in error


def test_a_port_that_something_else_has_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (error,) = meet((2, 0), address=f"127.0.0.1:{port}")
    assert error.startswith(f"process 0 of this run cannot listen on port {port}: Address already")


def test_a_stranger_at_the_port_disturbs_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 30)
    port = free_port()

    def disturb() -> None:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"number": "x"}\n', b""):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(text)
                    break
                except OSError:
                    pass

    stranger = threading.Thread(target=disturb)
    stranger.start()
    first = threading.Thread(target=meet, args=((2, 0),), kwargs={"address": f"127.0.0.1:{port}"})
    first.start()
    stranger.join()
    assert meet((2, 1), address=f"127.0.0.1:{port}") == [""]
    first.join()


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:0", "host:65536", "host:x", ""])
def test_an_address_without_a_port_is_named(address: str):
    with pytest.raises(ConfigError, match=f"process 0 is '{address}', but must be host:port"):
        rendezvous.meet_at(address, 2, 1)


def test_an_address_of_ipv6():
    assert meet((2, 0), (2, 1), address=f"[::1]:{free_port()}") == ["", ""]
