"""One job per run folder: a lock that a dead job does not hold for ever.

The file `run.lock` names its holder, who has it locked with flock, which the system takes from a dead process at once. But flock
may not reach from one machine to another, and may outlive a machine that died. So the holder also counts up a number in the file,
its heartbeat; a holder elsewhere whose file stands still is dead. Clocks of two machines are never compared.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from imagenet_swa.config.errors import InputError

BEATS_OF_SILENCE = 3  # after which a holder elsewhere is dead, where flock does not say that it lives
BEATS_DESPITE_FLOCK = 6  # the same where flock does
_LOOKS_PER_BEAT = 4
_MAX_BYTES = 4096
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
Holder = dict[str, Any]


class RunLock:
    """The right to write into a run folder, from `acquire` to `release` or in a `with` block.

    Args:
        folder: the run folder, which exists.
        heartbeat_seconds: time between two signs of life.
        on_lost: called once, in another thread and with a line for people, when another job took the folder over since this one
            was suspended or cut off for many heartbeats. Nothing may be written from then on.
        say: shows a line to people.
    """

    def __init__(
        self, folder: Path, *, heartbeat_seconds: float = 10.0, on_lost: Callable[[str], None], say: Callable[[str], None] = print
    ) -> None:
        self._path = folder / "run.lock"
        self._seconds, self._on_lost, self._say = heartbeat_seconds, on_lost, say
        self._descriptor = -1  # of the file that this process has locked
        self._me: Holder = {}
        self._end, self._thread = threading.Event(), threading.Thread()

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock: at once from nobody or from a dead process of this machine, after a while from a dead one elsewhere.

        Raises:
            InputError: another job holds it, or the folder cannot be written into.
        """
        assert self._descriptor < 0, "this job holds the lock already"
        self._me = _this_process()
        try:
            self._descriptor = self._take()
        except OSError as error:
            raise InputError(f"cannot take the lock {self._path} of the run folder: {error.strerror}") from None
        _held.add(self)
        for left_behind in self._path.parent.glob(f"{self._path.name}.*"):  # by a job that was killed while it took over
            with suppress(OSError):
                left_behind.unlink()
        self._end, self._thread = threading.Event(), threading.Thread(target=self._live, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        self._end.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if self._descriptor >= 0:
            with suppress(OSError):  # the next job finds the file of a process that has ended
                if _read(self._path)[1].get("token") == self._me["token"]:
                    self._path.unlink()
            self._forget()

    def is_held(self) -> bool:
        """Whether nobody has taken the lock over; reads the file, so that one can ask before something is overwritten."""
        try:
            return self._descriptor >= 0 and not self._is_other(_read(self._path)[1])
        except OSError:
            return True  # unknown

    def _is_other(self, holder: Holder) -> bool:
        return bool(holder) and holder["token"] != self._me["token"]

    def _forget(self) -> None:
        _held.discard(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _live(self) -> None:
        """Beat until the end, or until somebody else's name stands in the file."""
        while not self._end.wait(self._seconds):
            with suppress(OSError):  # a full disk or a lost server: the run goes on
                content, holder = _read(self._path)
                if self._is_other(holder):
                    self._on_lost(f"the run folder {self._path.parent} was taken over by {_describe(holder)}; this job must end")
                    return
                self._me["beat"] += 1
                if content is None:  # somebody deleted it
                    old, self._descriptor = self._descriptor, self._create(self._path)
                    os.close(old)
                else:
                    self._write(self._descriptor)

    # ---------------------------------------------------------------------------------------------------------- take

    def _take(self) -> int:
        for _ in range(100):
            with suppress(FileExistsError):
                return self._create(self._path)
            with suppress(FileNotFoundError), _opened(self._path, os.O_RDWR) as file:  # else it was released this moment
                descriptor = self._take_from(file)
                if descriptor is not None:
                    return descriptor
            time.sleep(0.01)
        raise OSError(errno.EBUSY, "it keeps changing")

    def _take_from(self, file: int) -> int | None:
        """The descriptor of the lock that replaces the one in an open file; None where another look is needed."""
        content = os.pread(file, _MAX_BYTES, 0)
        holder = _parse(content)
        is_free = _flock(file) if holder else None  # an empty file is another job's that is about to flock it
        if holder.get("place") == self._me["place"]:
            if is_free is False:
                raise self._refusal(holder)
            if is_free or not Path(f"/proc/{holder.get('pid')}").exists():
                return self._replace(file, content)
        self._watch(content, holder, BEATS_DESPITE_FLOCK if is_free is False else BEATS_OF_SILENCE)
        if not holder and _flock(file) is False:
            raise self._refusal(holder)
        descriptor = self._replace(file, content)
        if descriptor is not None:
            time.sleep(self._seconds)  # another machine may take over at the same moment: the last one has it
            if self._is_other(_read(self._path)[1]):
                os.close(descriptor)
                return None
        return descriptor

    def _watch(self, content: bytes, holder: Holder, num_beats: int) -> None:
        """Return when the file has stood still for so long or is another's; raise InputError where its holder lives."""
        who = _describe(holder)
        self._say(f"{self._path} names {who}; watching it for up to {num_beats * self._seconds:g} s for a sign of life")
        for _ in range(num_beats * _LOOKS_PER_BEAT):  # looks, not seconds: this process may be suspended too
            time.sleep(self._seconds / _LOOKS_PER_BEAT)
            now, holder_now = _read(self._path)
            if now != content:
                if holder and holder_now.get("token") == holder["token"]:
                    raise self._refusal(holder)
                return
        self._say(f"no sign of life from {who}: taking the run folder over")

    def _replace(self, file: int, content: bytes) -> int | None:
        """Put a new file in place of an unchanged one: who held the old one cannot write into the new one."""
        if not os.path.samestat(os.fstat(file), self._path.stat()) or os.pread(file, _MAX_BYTES, 0) != content:
            return None
        partial = self._path.with_name(f"{self._path.name}.{self._me['token']}")
        descriptor = self._create(partial)
        try:
            partial.replace(self._path)
        except OSError:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        return descriptor

    def _create(self, path: Path) -> int:
        """A new file, locked, that names this process. Raises FileExistsError: only one process can, on all file systems."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _flock(descriptor)
            self._write(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _write(self, descriptor: int) -> None:
        os.pwrite(descriptor, json.dumps(self._me).encode(), 0)  # never shorter than what it overwrites
        os.fsync(descriptor)  # for readers on other machines

    def _refusal(self, holder: Holder) -> InputError:
        return InputError(
            f"the run folder {self._path.parent} is in use by {_describe(holder)}; wait for that job, stop it, or choose another "
            f"output; delete {self._path} only if you are sure that the job has ended"
        )


# A fork of the holder must not hold the lock: it may outlive it.
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock._forget() for lock in list(_held)])


@contextmanager
def _opened(path: Path, how: int) -> Iterator[int]:
    descriptor = os.open(path, how | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Whether the file was free and is now locked; None where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def _read(path: Path) -> tuple[bytes | None, Holder]:
    """The file, opened anew so that it is the server's; None where there is none."""
    try:
        with _opened(path, os.O_RDONLY) as file:
            content = os.pread(file, _MAX_BYTES, 0)
            return content, _parse(content)
    except FileNotFoundError:
        return None, {}


def _parse(content: bytes) -> Holder:
    """What a lock file says; nothing where it is no lock file."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("token"), str) else {}


def _this_process() -> Holder:
    job = next((os.environ[name] for name in _JOB_VARIABLES if name in os.environ), None)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    return about | {"place": _place(), "token": secrets.token_hex(8), "beat": 0}


def _place() -> str:
    """Where flock and process numbers can be trusted: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _describe(holder: Holder) -> str:
    """The holder for people, whatever its file says."""
    if not holder:
        return "a job that did not write down who it is"
    text = {name: "".join(filter(str.isprintable, str(value)))[:80] for name, value in holder.items()}
    job = f" (job {text['job']})" if holder.get("job") else ""
    return f"process {text.get('pid')} on {text.get('host')}{job}, started {text.get('since')}"
