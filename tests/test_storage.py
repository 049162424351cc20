"""Bytes by path, local and in S3: against open(), glob and a local S3 server, with every kind of failure."""

import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.config import InputError
from imagenet_swa.data import storage
from imagenet_swa.data.sources import Source, scan

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 100_000, np.uint8))


def fails(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The message of the ReadError or InputError that the call raises, which must be one line."""
    with pytest.raises((storage.ReadError, InputError)) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture(params=["local", "s3"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, bytes], str]:
    """Writes a file below a folder, or an object into a bucket, and returns its path."""
    if request.param == "s3":
        return request.getfixturevalue("bucket").put

    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return write


def test_a_read_is_a_slice(put: Callable[[str, bytes], str]):
    """Whole files and ranges are the slices of the content, in a folder and in a bucket, by every way to read."""
    path, empty = put("a/file name+é.bin", CONTENT), put("empty", b"")
    assert storage.read(path) == CONTENT
    assert storage.read(path, size=len(CONTENT)) == CONTENT
    assert storage.read(path, offset=99_000) == CONTENT[99_000:]
    assert storage.read(empty) == storage.read(empty, size=0) == b""
    assert (storage.size_of(path), storage.size_of(empty)) == (len(CONTENT), 0)
    random = np.random.default_rng(1)
    for _ in range(20):
        offset = int(random.integers(1, len(CONTENT)))
        size = int(random.integers(0, len(CONTENT) - offset + 1))
        assert storage.read(path, offset=offset, size=size) == CONTENT[offset : offset + size]
    for offset, size in ((0, 10), (99_990, 100), (100_000, 5), (200_000, 5), (0, 200_000)):
        assert storage.read_range(path, offset, size) == CONTENT[offset : offset + size]
    with storage.open_to_read(path) as stream:
        stream.seek(50_000)
        assert stream.read(100) == CONTENT[50_000:50_100]
        assert stream.read() == CONTENT[50_100:]


def test_another_length_is_an_error(put: Callable[[str, bytes], str]):
    """A file shorter or longer than the index says, and a range that ends after its file, are errors, not fewer bytes."""
    path = put("file", b"12345")
    assert "4 bytes" not in fails(storage.read, path, size=6)
    assert "5 bytes are there where the index says 6; it changed since `imagenet-swa index`" in fails(storage.read, path, size=6)
    assert "where the index says 4" in fails(storage.read, path, size=4)
    assert "2 bytes are there where the index says 5" in fails(storage.read, path, offset=3, size=5)
    assert "0 bytes are there where the index says 5" in fails(storage.read, path, offset=30, size=5)


def test_what_is_not_there(put: Callable[[str, bytes], str]):
    """A missing file or object is said to be missing by every way to read, whatever words its name holds."""
    path = put("bucket/file", b"1") + ".other"
    for call in (storage.read, storage.size_of, storage.open_to_read, lambda path: storage.read_range(path, 0, 1)):
        assert fails(call, path) == "no such file or object"


def test_local_failures_in_words(tmp_path: Path):
    """A folder and a name longer than file systems take are told in the system's words."""
    assert fails(storage.read, str(tmp_path)) == "is a directory"
    assert fails(storage.read, str(tmp_path / ("x" * 300))) == "file name too long"


def test_names_are_joined(tmp_path: Path):
    """Below a prefix names are joined with one slash; an absolute local name stays itself."""
    assert storage.join("s3://bucket/a/", "b/c") == storage.join("s3://bucket/a", "b/c") == "s3://bucket/a/b/c"
    assert storage.join("/data", "b/c") == "/data/b/c"
    assert storage.join("/data", str(tmp_path)) == str(tmp_path)


# ------------------------------------------------------------------------------------------------------------ patterns


def test_braces_count_and_choose():
    """{000..146} counts with the width of its start, {a,b} chooses, several multiply, and the order is that of writing."""
    assert storage.expand("t-{098..101}.tar") == ["t-098.tar", "t-099.tar", "t-100.tar", "t-101.tar"]
    assert storage.expand("t-{8..10}.tar") == ["t-8.tar", "t-9.tar", "t-10.tar"]
    assert storage.expand("{b,a}/{0..1}") == ["b/0", "b/1", "a/0", "a/1"]
    assert storage.expand("plain.tar") == ["plain.tar"]
    assert storage.expand("s3://bucket/t-{0..1}.tar") == ["s3://bucket/t-0.tar", "s3://bucket/t-1.tar"]
    assert len(storage.expand("t-{0000..1023}.tar")) == 1024


@pytest.mark.parametrize("pattern", ["{0..1000000}.tar", "{0..999999999999999}.tar", "{0..999}{0..999}{0..1}.tar"])
def test_braces_that_make_too_many_names(pattern: str):
    """More than a million names are a mistake, and found before memory is full of them."""
    assert "makes more than 1,000,000 names" in fails(storage.expand, pattern)
    assert len(storage.expand("{0..99}{0..99}.tar")) == 10_000


def test_sizes_and_times(put: Callable[[str, bytes], str]):
    """Size and time of a file or object; what is not there has none."""
    before = time.time()
    size, changed = storage.size_and_time_of(put("x", b"abc"))
    assert size == 3
    assert abs(changed / 1e9 - before) < 10
    assert fails(storage.size_and_time_of, put("y", b"") + ".other") == "no such file or object"


NAMES = ("train-0.tar", "train-1.tar", "train-10.tar", "trainx0.tar", "val-0.tar", "train-0.tar.idx", "train-a.tar", "t+0.tar")
PATTERNS = (
    "train-*.tar",
    "train-?.tar",
    "train?0.tar",
    "*.tar",
    "nothing-*.tar",
    "t+*.tar",
    "{train,val}-*.tar",
    "train-[01].tar",
)


def test_patterns_match_alike_here_and_in_s3(tmp_path: Path, bucket: "Bucket"):
    """A pattern names the same files in a folder and in a bucket: those that the shell's rules say, sorted."""
    folder = tmp_path / "x"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(b"1")
        bucket.put(f"x/{name}", b"1")
    bucket.put("x/deeper/train-9.tar", b"1")
    (folder / "deeper").mkdir()
    for pattern in PATTERNS:
        parts = ["train-*.tar", "val-*.tar"] if pattern.startswith("{") else [pattern]
        wanted = [path.name for part in parts for path in sorted(folder.glob(part))]
        assert [Path(path).name for path in storage.expand(f"{folder}/{pattern}")] == wanted
        assert [path.removeprefix(f"{bucket.url}/x/") for path in storage.expand(f"{bucket.url}/x/{pattern}")] == wanted, pattern
    local = [Path(path).name for path in storage.list_files(str(folder))]
    assert local == [path.rpartition("/")[2] for path in storage.list_files(f"{bucket.url}/x")] == sorted(NAMES)


def test_a_folder_with_pattern_signs_in_its_name(tmp_path: Path):
    """Listing a folder takes its name as it is."""
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    (folder / "f").touch()
    assert storage.list_files(str(folder)) == [str(folder / "f")]


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("{}.,0123ab*"), max_size=12))
def test_any_pattern_ends(text: str):
    """Whatever braces a pattern has, it is a list of paths without more braces than were left open."""
    if re.search(r"\{\d{4,}|\d{4,}\}", text) is None and "*" not in text:
        for path in storage.expand(text):
            assert re.search(r"\{[^{}]*\}", path) is None


# ------------------------------------------------------------------------------------------------------- S3's failures


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def attempts(prefix: str) -> list[tuple[Callable[[], object], str]]:
    """Every use of S3, and the path that its message has to name."""

    def scanned(path: str, list_file: str | None = None) -> Callable[[], object]:
        return lambda: scan(Source("train", path, list_file), num_classes=3)

    return [
        (scanned(prefix), prefix),
        (scanned(f"{prefix}/t-*.tar"), f"{prefix}/t-*.tar"),
        (scanned(f"{prefix}/t-{{0..1}}.tar"), f"{prefix}/t-0.tar"),
        (scanned(prefix, f"{prefix}/list.txt"), f"{prefix}/list.txt"),
    ]


ACCESS_DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'


def test_wildcards_in_the_folder_of_an_s3_pattern(bucket: "Bucket"):
    """In S3 * ? [ are for the last part, and nothing stands for the bucket; braces choose folders."""
    for part in ("a*", "a?", "[ab]"):
        assert "in S3 the signs * ? [ may stand in the last part only" in fails(storage.expand, f"{bucket.url}/{part}/x-*.tar")
    assert storage.expand(f"{bucket.url}/{{a,b}}/x.tar") == [f"{bucket.url}/a/x.tar", f"{bucket.url}/b/x.tar"]
    for pattern in ("s3://imag*/x.tar", "s3://{a,b}/x.tar"):
        assert "a pattern cannot stand for the bucket" in fails(scan, Source("train", pattern), num_classes=3)


def test_access_denied(s3_settings: pytest.MonkeyPatch):
    """Where S3 denies access every message names the path and the variables to check."""
    with answering(403, ACCESS_DENIED) as address:
        s3_settings.setenv("AWS_ENDPOINT_URL", address)
        for call, named in attempts("s3://images/a"):
            message = fails(call)
            assert named in message
            assert "S3 denies access; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE" in message


def test_nobody_answers(s3_settings: pytest.MonkeyPatch):
    """At an address where nobody listens every message comes within seconds, and names the path, address and variable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    s3_settings.setenv("AWS_ENDPOINT_URL", address)
    for call, named in attempts("s3://images/a"):
        start = time.monotonic()
        message = fails(call)
        assert time.monotonic() - start < 60
        assert named in message
        assert f"S3 cannot be reached at {address}; check AWS_ENDPOINT_URL and the network" in message


def test_no_such_host(s3_settings: pytest.MonkeyPatch):
    """A name that no name server knows is an address that cannot be reached."""
    s3_settings.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000")
    assert "cannot be reached at http://no-such-host.invalid:9000" in fails(storage.read, "s3://images/a")


def test_missing_keys_and_buckets(bucket: "Bucket"):
    """A missing object, prefix or bucket is named, with what was wanted."""
    bucket.put("a/other", b"1")
    for prefix in (f"{bucket.url}/a", f"{bucket.url}/nowhere", "s3://nobody/a"):
        (folder, pattern, braces, listed) = (fails(call) for call, _ in attempts(prefix))
        if prefix.endswith("images/a"):
            assert f"{prefix} holds no .tar shards; wanted some, or data.train_list" in folder
        else:
            assert f"cannot list the shards {prefix}: " in folder
            assert "no such bucket" in folder
        assert f"no shards match {prefix}/t-*.tar" in pattern
        assert f"cannot read the shard {prefix}/t-0.tar: no such file or object" in braces
        assert f"cannot read the list {prefix}/list.txt: no such file or object" in listed


def test_a_path_without_a_bucket():
    """s3:// alone is refused with the form that was wanted."""
    assert "wanted s3://bucket/key" in fails(storage.read, "s3:///key")
