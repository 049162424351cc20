"""Requests to stop: what is noted, what ends the process, and when; in real processes, since signals belong to those."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROJECT

from imagenet_swa import stop
from imagenet_swa.stop import StopRequest

LISTEN = """
import signal, sys, threading, time
from imagenet_swa import stop
from imagenet_swa.stop import request
stop._GRACE_SECONDS = 1.0
request.listen()
request.is_heeded = {heeded}
print("ready", flush=True)
"""
LOOK = """
start = time.monotonic()
while request.reason is None and time.monotonic() - start < 30:
    time.sleep(0.01)
print(request.reason, flush=True)
"""
# The main thread locks a mutex twice and stays in C for ever, as in a collective whose other ranks are gone.
HANG = """
import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
for call in (libc.pthread_mutex_init, libc.pthread_mutex_lock, libc.pthread_mutex_lock):
    call(mutex, *([None] if call is libc.pthread_mutex_init else []))
"""


@contextmanager
def process(code: str, *, heeded: bool = True, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that listens and then runs the code."""
    running = subprocess.Popen(
        [sys.executable, "-c", LISTEN.format(heeded=heeded) + code],
        cwd=PROJECT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell starts in the background
    )
    try:
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        yield running
    finally:
        running.kill()
        running.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_noted(number: signal.Signals):
    """Each of the four signals is noted under its name, and the process goes on."""
    with process(LOOK) as running:
        running.send_signal(number)
        out, err = running.communicate(timeout=20)
    assert (running.returncode, out, err) == (0, f"{number.name}\n", "")


def test_the_first_is_kept():
    """What came first is the reason, whatever comes after it."""
    with process(LOOK + "time.sleep(0.3); print(request.reason, flush=True)") as running:
        running.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=20)
    assert out == "SIGUSR1\nSIGUSR1\n"


def test_one_press_that_comes_twice():
    """Two interrupts within half a second, from the terminal and from a launcher, are one press: noted, nothing ends."""
    with process(LOOK + "time.sleep(2); print('on', flush=True)") as running:
        running.send_signal(signal.SIGINT)
        time.sleep(0.15)
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=20)
    assert (running.returncode, out) == (0, "SIGINT\non\n")


def test_a_second_press():
    """An interrupt more than half a second after the first raises KeyboardInterrupt at once."""
    code = LOOK + "try:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)"
    with process(code) as running:
        running.send_signal(signal.SIGINT)
        time.sleep(0.7)
        start = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=20)
    assert (running.returncode, out) == (0, "SIGINT\ninterrupted\n")
    assert time.monotonic() - start < 10


def test_a_second_press_where_the_process_hangs():
    """Where the main thread sits in C code that does not return, as in a collective, a second press ends the process with code
    130 within seconds.
    """
    with process(HANG) as running:
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 130


def test_before_the_run_looks():
    """A request to a process that has not come to its first step, and waits for others, ends it with code 85 and a line."""
    with process("time.sleep(60)", heeded=False) as running:
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=20)
    assert running.returncode == 85
    assert err == "imagenet-swa: stopped: by SIGTERM before the first step; the same command goes on\n"


def test_a_run_that_comes_to_look_in_time():
    """A request before the first step to a process that then comes to it is left to the run."""
    with process("time.sleep(0.5); request.is_heeded = True; time.sleep(4); print(request.reason)", heeded=False) as running:
        running.send_signal(signal.SIGUSR2)
        out, err = running.communicate(timeout=20)
    assert (running.returncode, out, err) == (0, "SIGUSR2\n", "")


def test_a_launcher_that_starts_all_again(tmp_path: Path):
    """Under the supervisor, a TERM that nobody asked it for is the launcher's, since another process is lost: no request to stop;
    the process ends within seconds, as one that lost the others.
    """
    with process("time.sleep(60)", IMAGENET_SWA_STATUS=str(tmp_path), RANK="3") as running:
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == 1
    assert '"lost_others": true' in (tmp_path / "rank-3.json").read_text()
    (tmp_path / "asked").touch()
    with process(LOOK, IMAGENET_SWA_STATUS=str(tmp_path), RANK="3") as running:
        running.send_signal(signal.SIGTERM)
        assert running.communicate(timeout=20)[0] == "SIGTERM\n"


def test_time_limit(monkeypatch: pytest.MonkeyPatch):
    """max_minutes asks for a stop after so many minutes and not before; none never does."""
    now = [1000.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    request = StopRequest()
    for minutes, seconds, wanted in ((None, 1e9, None), (1.5, 89.0, None), (1.5, 91.0, "max_minutes 1.5")):
        request.limit(minutes)
        now[0] = 1000.0 + seconds
        assert request.reason == wanted


def test_a_signal_comes_before_the_limit(monkeypatch: pytest.MonkeyPatch):
    """Where both ask for it, the signal is named."""
    now = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    request = StopRequest()
    request.limit(1)
    request._note(signal.SIGTERM, None)
    now[0] = 100.0
    assert request.reason == "SIGTERM"


def test_helpers_of_a_process_ignore_it():
    """A child that serves this process, such as a worker that decodes, ignores what asks the job to stop."""
    code = "import sys; from imagenet_swa.stop import ignore_in_child; ignore_in_child(); print('ready', flush=True); "
    code += "sys.stdin.read(); print('alive')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdin=-1, stdout=-1, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for number in stop.SIGNALS:
        child.send_signal(number)
    out, _ = child.communicate("", timeout=10)
    assert (child.returncode, out) == (0, "alive\n")
