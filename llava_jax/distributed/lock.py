"""One process at a time that writes into a directory, also on a disk that machines share.

The lock is a file that its holder touches every few seconds, because locks of the operating system
do not work across all shared disks. A lock whose holder is gone is taken over: at once if the
holder ran on this machine, otherwise when nobody has touched the file for a minute.
"""

import datetime
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from llava_jax.disk import naming
from llava_jax.distributed.multihost import broadcast_from_main, is_main_process
from llava_jax.distributed.watchdog import exit_now
from llava_jax.errors import ConfigError

NAME = "in_use.lock"
LEASE_SECONDS = 60.0
"""A lock whose file is older than this is taken over, unless its holder runs on this machine."""
HEARTBEAT_SECONDS = 5.0
TRY_SECONDS = 3.0
"""What is left of a process that was killed is gone by then, and its lock is free or taken over."""


@contextmanager
def hold_for_run(directory: Path) -> Iterator[None]:
    """As `hold`, for all processes of a run: the first one holds the lock.

    Raises:
        ConfigError: Another run has it.
        OSError: The lock cannot be written.
    """
    with ExitStack() as stack:
        refusal: Exception | None = None
        if is_main_process():
            try:
                stack.enter_context(hold(directory))
            except (ConfigError, OSError) as error:
                refusal = error
        if broadcast_from_main(refusal is not None):
            raise refusal or ConfigError(f"{directory} cannot be used; process 0 says why")
        yield


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keeps all others out of a directory that use this function.

    The directory is made if needed, and removed if nothing was written into it. A process that
    loses its lock ends: somebody removed the file, or it slept while another took over.

    Raises:
        ConfigError: Another process has it; says which, and since when.
        OSError: The lock cannot be written.
    """
    file = directory / NAME
    lease = SoftFileLease(
        file.absolute(),
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=HEARTBEAT_SECONDS,
        thread_local=False,
        on_compromise=_end,
    )
    try:
        with naming(file):
            _acquire(lease, file)
            now = datetime.datetime.now(datetime.UTC)
            _append(file, f"since={now:%Y-%m-%d %H:%M:%S} UTC\n")
        yield
    finally:
        lease.release()
        with suppress(OSError):
            directory.rmdir()


def _acquire(lease: SoftFileLease, file: Path) -> None:
    """Takes a lock, or says who has it."""
    if _try(lease, file, TRY_SECONDS):
        return
    if _is_empty(file):  # its holder was killed before it wrote its name
        _append(file, "damaged=1\n")  # filelock takes over what is damaged, but nothing empty
        if _try(lease, file, TRY_SECONDS):
            return
    seen, why = _stamp(file), "cannot be looked at from here"
    if (owner := lease.owner) is not None and owner.hostname == _this_host():
        if _is_alive(owner.pid):
            raise _refusal(lease, file)
        _check_disk(file)
        why = "has ended, but its lock could not be taken over at once"
    print(
        f"{file} was left by {_holder(lease, file)}, which {why}; waiting up to "
        f"{LEASE_SECONDS:.0f} s until nobody has touched it for so long",
        flush=True,
    )
    if not _try(lease, file, LEASE_SECONDS + TRY_SECONDS, seen):
        raise _refusal(lease, file)


def _try(
    lease: SoftFileLease, file: Path, seconds: float, seen: tuple[int, int] | None = None
) -> bool:
    """Whether the lock was to be had; gives up early when its holder touched it since."""
    touched = lambda: _stamp(file) not in (None, seen) if seen else False
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lease.acquire(timeout=seconds, poll_interval=0.1, cancel_check=touched)
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(file.parent) and not file.parent.is_dir():
                raise
            continue  # the last holder wrote nothing, and so removed the directory
        except (Timeout, LeaseSettingsMismatch):
            return False
        return True


def _append(file: Path, line: str) -> None:
    """Adds a field that filelock does not know, which it leaves alone; never makes the file."""
    with suppress(FileNotFoundError), file.open("r+") as opened:
        opened.seek(0, os.SEEK_END)
        opened.write(line)


def _stamp(file: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _is_empty(file: Path) -> bool:
    with suppress(FileNotFoundError):
        return not file.stat().st_size
    return False


def _this_host() -> str:
    """This machine, or container, as locks name it."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder, NAME)) as lease:
        owner = lease.owner
    return owner.hostname if owner else ""


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine is there, and not only waits for its parent to notice."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2][1] != "Z"
    return True


def _check_disk(file: Path) -> None:
    """Fails as taking over a lock does, which filelock does not tell."""
    probe = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        probe.write_text("a lock is written here\n")
    finally:
        probe.unlink(missing_ok=True)


def _holder(lease: SoftFileLease, file: Path) -> str:
    """Who has a lock, and since when."""
    if (owner := lease.owner) is None:
        return "another process"
    with suppress(OSError):
        since = re.search(r"^since=(.*)$", file.read_text(errors="replace"), re.MULTILINE)
        host = owner.hostname.partition("?")[0]  # behind it is the container
        began = f" since {since[1]}" if since else ""
        return f"process {owner.pid} on machine {host}{began}"
    return f"process {owner.pid}"


def _refusal(lease: SoftFileLease, file: Path) -> ConfigError:
    owner = lease.owner
    is_here = owner is not None and owner.hostname == _this_host()
    stop = f"stop it (kill {owner.pid})" if owner and is_here else "stop it there"
    return ConfigError(
        f"{file.parent} is used by {_holder(lease, file)}. Wait until it ends, {stop}, or use "
        "another directory (--name of a run, --output of tools/evaluate.py). The lock of a "
        "process that is gone is removed by the program itself, within a minute; delete "
        f"{file} only if you are sure that no process uses it."
    )


def _end(compromise: LeaseCompromise) -> None:
    """Ends this process; another may write already."""
    why = f"{compromise.reason}: {compromise.error}" if compromise.error else compromise.reason
    print(
        f"error: {compromise.lock_file} is no longer this process's ({why}): it was removed, could "
        "not be written, or another process took over. The same command continues",
        file=sys.stderr,
    )
    exit_now(1)
