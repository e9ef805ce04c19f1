"""Locks a directory so that only one process at a time writes to it, also on a shared disk.

The lock is a file that its holder touches (updates) every few seconds; locks of the operating
system do not work on all shared disks. If the holder of a lock has ended, another process takes
over the lock: at once if the holder ran on the same machine, and otherwise after the file has not
been touched for a minute.
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
"""Seconds without a touch after which a lock is taken over, unless its holder still runs on this
machine."""
HEARTBEAT_SECONDS = 5.0
"""Seconds between two touches of a lock by its holder."""
TRY_SECONDS = 3.0
"""Seconds in which a process tries to take a lock before it checks whether the holder is alive. If
the holder was killed, it has disappeared by then."""


@contextmanager
def hold_for_run(directory: Path) -> Iterator[None]:
    """Holds the lock of a directory for all processes of a run; process 0 takes the lock.

    All processes of the run must call this function.

    Args:
        directory: Directory to lock.

    Raises:
        ConfigError: Another run holds the lock, or this is not process 0 and process 0 cannot write
            the lock.
        OSError: This is process 0, and it cannot write the lock.
    """
    with ExitStack() as stack:
        refusal: Exception | None = None
        if is_main_process():
            try:
                stack.enter_context(hold(directory))
            except (ConfigError, OSError) as error:
                refusal = error
        if broadcast_from_main(refusal is not None):
            raise refusal or ConfigError(f"{directory} cannot be used; process 0 prints why")
        yield


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Locks a directory against all other processes that use this function.

    The directory is created if needed, and removed if it is empty at the end. A process that loses
    its lock exits, because another process may already be writing. A process loses its lock if
    somebody removes the file, or if another process takes over the lock while this process is
    suspended.

    Args:
        directory: Directory to lock.

    Raises:
        ConfigError: Another process holds the lock; the message describes that process.
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
    """Takes a lock, or raises a ConfigError that names its holder."""
    if _try(lease, file, TRY_SECONDS):
        return
    if _is_empty(file):  # the holder was killed before it wrote its name
        _append(file, "damaged=1\n")  # filelock takes over damaged files, but no empty ones
        if _try(lease, file, TRY_SECONDS):
            return
    seen, why = _stamp(file), "cannot be checked from this machine"
    if (owner := lease.owner) is not None and owner.hostname == _this_host():
        if _is_alive(owner.pid):
            raise _refusal(lease, file)
        _check_disk(file)
        why = "has ended, but its lock could not be taken over at once"
    print(
        f"the lock {file} belongs to {_holder(lease, file)}, which {why}; waiting until nobody "
        f"has updated the file for {LEASE_SECONDS:.0f} s",
        flush=True,
    )
    if not _try(lease, file, LEASE_SECONDS + TRY_SECONDS, seen):
        raise _refusal(lease, file)


def _try(
    lease: SoftFileLease, file: Path, seconds: float, seen: tuple[int, int] | None = None
) -> bool:
    """Tries to take a lock for some seconds, and returns True if this succeeds.

    If `seen` is given, gives up as soon as the file has another stamp, because its holder is alive.
    """
    touched = lambda: _stamp(file) not in (None, seen) if seen else False
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lease.acquire(timeout=seconds, poll_interval=0.1, cancel_check=touched)
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(file.parent) and not file.parent.is_dir():
                raise
            continue  # the last holder removed the directory, because it was empty
        except (Timeout, LeaseSettingsMismatch):
            return False
        return True


def _append(file: Path, line: str) -> None:
    """Appends a line to an existing lock file; filelock ignores fields that it does not know."""
    with suppress(FileNotFoundError), file.open("r+") as opened:
        opened.seek(0, os.SEEK_END)
        opened.write(line)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Returns the inode and the modification time of a file; None if there is no file."""
    with suppress(FileNotFoundError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _is_empty(file: Path) -> bool:
    """Returns True if the file exists and is empty."""
    with suppress(FileNotFoundError):
        return not file.stat().st_size
    return False


def _this_host() -> str:
    """Returns the name that filelock gives this machine or container in locks."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder, NAME)) as lease:
        owner = lease.owner
    return owner.hostname if owner else ""


def _is_alive(pid: int) -> bool:
    """Returns True if a process of this machine exists and is not a zombie."""
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
    """Raises the OSError that prevents writing a lock; filelock hides this error."""
    probe = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        probe.write_text("a lock is written here\n")
    finally:
        probe.unlink(missing_ok=True)


def _holder(lease: SoftFileLease, file: Path) -> str:
    """Describes the holder of a lock: its process id, its machine, and when it took the lock."""
    if (owner := lease.owner) is None:
        return "another process"
    with suppress(OSError):
        since = re.search(r"^since=(.*)$", file.read_text(errors="replace"), re.MULTILINE)
        host = owner.hostname.partition("?")[0]  # the container comes after the "?"
        began = f" since {since[1]}" if since else ""
        return f"process {owner.pid} on machine {host}{began}"
    return f"process {owner.pid}"


def _refusal(lease: SoftFileLease, file: Path) -> ConfigError:
    """Returns the error to raise when another process holds the lock."""
    owner = lease.owner
    is_here = owner is not None and owner.hostname == _this_host()
    stop = f"stop it (kill {owner.pid})" if owner and is_here else "stop it on its machine"
    return ConfigError(
        f"{file.parent} is used by {_holder(lease, file)}. Wait until this process ends, {stop}, "
        "or use another directory (--name of a run, --output of `llava-jax evaluate`). If a "
        "process has ended, its lock is taken over automatically within a minute; delete "
        f"{file} only if you are sure that no process uses the directory."
    )


def _end(compromise: LeaseCompromise) -> None:
    """Ends this process after it has lost its lock; another process may already be writing."""
    why = f"{compromise.reason}: {compromise.error}" if compromise.error else compromise.reason
    print(
        f"error: this process has lost the lock {compromise.lock_file} ({why}): the file was "
        "removed or could not be written, or another process took over the lock. Run the same "
        "command again to continue",
        file=sys.stderr,
    )
    exit_now(1)
