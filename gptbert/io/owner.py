"""One writer for a folder or file: a lock that the kernel frees, and a lease where locks do not reach."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gptbert.errors import OwnedError
from gptbert.io.screen import log

RENEWAL = 20.0  # seconds between an owner's signs of life
PATIENCE = 120.0  # seconds without one after which an owner is taken for dead
_SETTLING = 1.0  # seconds in which two processes without locks notice each other
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # what file systems without locks answer
_MOST_BYTES = 10_000

_held: dict[int, "_Ownership"] = {}  # by open files; a forked child would keep their locks after its parent's death
os.register_at_fork(after_in_child=lambda: list(map(os.close, _held)))


@dataclass(frozen=True)
class Owner:
    """Who writes to a folder.

    Attributes:
        host: its name.
        pid: the process.
        since: when it began, in the host's local time.
        command: its command line, shortened.
        machine: identity of the running kernel, the same in all containers on it.
        namespace: in which `pid` is valid.
        token: unique to this owner.
    """

    host: str
    pid: int
    since: str
    command: str
    machine: str
    namespace: str
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        """The calling process, with a new token."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
            command=textwrap.shorten(f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}", 200, placeholder=" …"),
            machine=_machine(),
            namespace=_pid_namespace(),
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """The owner that a file names; None if it names none."""
        types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        try:
            with path.open("rb") as file:
                content = json.loads(file.read(_MOST_BYTES))
            values = {name: content[name] for name in types}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        are_of_type = all(isinstance(values[name], kind) for name, kind in types.items())
        return cls(**values) if are_of_type else None

    @property
    def is_dead_here(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        if (self.machine, self.namespace) != (_machine(), _pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


@contextmanager
def owned(path: Path, what: str, way_on: str = "wait for it, or stop it") -> Iterator[None]:
    """Own a folder or file while the block runs; a second owner is refused, before it has changed anything.

    `path` is a file in which the owner says who it is, beside what it owns or inside of it; it is there while the block
    runs. Missing folders above it are created, and removed if they are empty at the end.

    - The file is locked (flock), so that the kernel frees it once the process has ended in any way.
    - Where locks do not exist, or may hold for one host only, the owner renews the file's time as a lease. An owner on
      another host is taken for dead after `PATIENCE` without that.

    Args:
        path: the owner's file.
        what: what is owned, for messages: a flag and its value.
        way_on: what the second process can do.

    Raises:
        OwnedError: another process owns it.
        OSError: the file cannot be written.
    """
    new_folders = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        with _Ownership(path, what, way_on):
            yield
    finally:
        for folder in new_folders:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


class _Ownership:
    """The owner's file, open and locked; a context manager that renews it and removes it at the end."""

    def __init__(self, path: Path, what: str, way_on: str) -> None:
        self._path, self._what, self._way_on = path.absolute(), what, way_on
        self._handle = -1
        self._own = Owner.this_process()
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        self._folder = self._path.parent.stat()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="owner", daemon=True)

    def __enter__(self) -> None:
        self._renewing.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(OSError):
            if Owner.read(self._path) == self._own:
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            _held.pop(self._handle, None)
            os.close(self._handle)
            self._handle = -1

    def _take(self) -> None:
        has_lock = self._lock()
        before = Owner.read(self._path)
        if before and not before.is_dead_here and not (has_lock and before.machine == self._own.machine):
            self._outwait(before)
        content = json.dumps(asdict(self._own), indent=4).encode() + b"\n"
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)
        if not has_lock:
            time.sleep(_SETTLING)
            if (now := Owner.read(self._path)) != self._own:
                raise self._refusal(now)

    def _lock(self) -> bool:
        """Open the file and lock it; False where there are no locks."""
        while True:
            self._handle = self._open()
            _held[self._handle] = self
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._outwait_lock(Owner.read(self._path))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._handle), self._path.stat()):
                    return True
            self._close()  # its owner has removed it in the meantime

    def _outwait_lock(self, before: Owner | None) -> None:
        """Return with the lock, or once its file is gone; OwnedError if its owner lives.

        One on this machine does. A file server frees the locks of a host that is gone after a while, Linux's after 90
        seconds; a host that is not renews the file's time until then.
        """
        if before is None or before.machine == self._own.machine:
            raise self._refusal(before) from None
        log(f"{self._what}: is locked by {before}; waiting at most {PATIENCE:.0f} s for a sign of life")
        with contextlib.suppress(FileNotFoundError):  # it has ended
            first, end = _time_of(self._path), time.monotonic() + PATIENCE
            while time.monotonic() < end:
                time.sleep(RENEWAL / 10)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                self._refuse_if_alive(first, before)
            raise self._refusal(Owner.read(self._path)) from None

    def _open(self) -> int:
        attempts = 100
        while True:
            attempts -= 1
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileExistsError as error:  # what should be a folder is something else
                is_link = Path(error.filename).is_symlink() and not Path(error.filename).exists()
                why = f"{error.filename} links to what is not there" if is_link else os.strerror(errno.ENOTDIR)
                raise NotADirectoryError(errno.ENOTDIR, why, error.filename) from error
            except FileNotFoundError:  # an owner that ended removed the folder in between
                if not attempts:
                    raise

    def _outwait(self, before: Owner) -> None:
        """Return once an owner has shown no sign of life for `PATIENCE`; OwnedError as soon as it shows one."""
        first, began, said = _time_of(self._path), time.monotonic(), False
        while True:
            # by the file system's clock, which may have been set back since; so for no longer than that from now on
            waited = max(_now_of(self._path) - first, time.monotonic() - began)
            if (left := PATIENCE - waited) <= 0:
                return
            if not said:
                log(f"{self._what}: may be in use by {before}; waiting at most {left:.0f} s for a sign of life")
                said = True
            time.sleep(min(left, RENEWAL / 10))
            if not self._path.exists():
                return
            self._refuse_if_alive(first, before)

    def _refuse_if_alive(self, first: float, before: Owner) -> None:
        """OwnedError if the file's time is no longer `first`, or its owner another one than `before`."""
        if _time_of(self._path) != first or Owner.read(self._path) != before:
            raise self._refusal(Owner.read(self._path)) from None

    def _refusal(self, owner: Owner | None) -> OwnedError:
        return OwnedError(f"{self._what}: is in use by {owner or 'another process'}; {self._way_on}")

    def _renew(self) -> None:
        """Show signs of life until the end; end the process if another one has taken over meanwhile."""
        while not self._ended.wait(RENEWAL):
            now = Owner.read(self._path)
            if now and now != self._own and not self._ended.is_set():  # this process was suspended for minutes, say
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {self._refusal(now)} (it took over from this process)\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)  # nothing more may be written
            with contextlib.suppress(OSError):
                if now is None:
                    self._take_again()
                os.utime(self._handle)

    def _take_again(self) -> None:
        """After someone has deleted the owner's file, but not its folder."""
        before = self._handle
        if self.whereabouts():
            return
        try:
            self._take()
        except OwnedError:  # by whom, the file says
            self._close()
            self._handle = before
        else:
            _held.pop(before)
            os.close(before)

    def is_of(self, path: Path) -> bool:
        """Whether it is of this file."""
        return self._path == path.absolute()

    def whereabouts(self) -> str:
        """See `whereabouts`."""
        try:
            if os.path.samestat(self._folder, self._path.parent.stat()):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # a network file system that does not answer, which says nothing
            return ""
        with contextlib.suppress(OSError):  # where the kernel says it
            now = Path(f"/proc/self/fd/{self._handle}").readlink()
            if now.exists():
                return f"was moved to {now.parent}"
        return "was deleted or moved"


def whereabouts(path: Path) -> str:
    """What has happened to the folder of a file that this process owns.

    Args:
        path: the owner's file, as given to `owned`.

    Returns:
        Words such as "was moved to /there"; empty if it is in its place, or not owned by this process.
    """
    owners = (ownership for ownership in list(_held.values()) if ownership.is_of(path))
    return next((ownership.whereabouts() for ownership in owners), "")


def _time_of(path: Path) -> float:
    """When a file was last changed, by its file system's clock; opened anew, since network file systems cache it."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _now_of(path: Path) -> float:
    """The present, by the clock of the file system on which a file is."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with probe.open("wb") as file:
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
        return _time_of(probe)
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
