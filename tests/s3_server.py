"""A local S3 server, moto's, for tests that name `pytest_plugins = ["s3_server"]`; they skip where it is not installed."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagenet_swa.data import storage

START_SECONDS = 30
VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")


class Bucket:
    """An empty bucket of the local server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = f"s3://{name}"

    def put(self, key: str, content: bytes) -> str:
        """Write an object; returns its path."""
        _ask("PUT", f"{self.name}/{urllib.parse.quote(key)}", content)
        return f"{self.url}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Write all files below a folder; returns the path of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{prefix}"


def _ask(method: str, path: str, content: bytes | None = None) -> None:
    """Unsigned: moto looks at nobody's keys. Not by pyarrow, whose uploads in parts moto does not understand."""
    request = urllib.request.Request(
        f"{os.environ['AWS_ENDPOINT_URL']}/{path}", content, {"Content-Type": "image/jpeg"}, method=method
    )
    urllib.request.urlopen(request, timeout=10).close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forget_clients() -> None:
    """Clients and open objects are kept for the life of a process; they know the address and the keys of their time."""
    storage._s3.cache_clear()
    storage._remote_file.cache_clear()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a moto server."""
    beside = Path(sys.executable).with_name("moto_server")
    program = str(beside) if beside.exists() else shutil.which("moto_server")
    if program is None:
        pytest.skip("no moto_server; pip install 'moto[server]'")
    port, log = free_port(), tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out)
    try:
        _wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"moto_server did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def s3_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment with made-up keys and no address yet, and no client of an earlier test."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    yield monkeypatch
    forget_clients()


@pytest.fixture
def bucket(s3_server: str, s3_settings: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, which this process reaches by the variables that all AWS tools know."""
    s3_settings.setenv("AWS_ENDPOINT_URL", s3_server)
    _ask("POST", "moto-api/reset")
    _ask("PUT", "images")
    return Bucket("images")
