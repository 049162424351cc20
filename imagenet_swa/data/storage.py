"""Bytes of local files and of objects in S3 by path: `/folder/file` or `s3://bucket/key`."""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from imagenet_swa.config import InputError

WHOLE = -1  # as a size: up to the end, however far that is
NOT_THERE = "no such file or object"
MAX_PATHS = 1_000_000  # of one pattern
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe among images would be waited for, perhaps for ever
_READ_AHEAD = 16 * 2**20  # one request to S3 while an object is read through


class ReadError(OSError):
    """Bytes that cannot be had; the message is the reason in words."""


def is_remote(path: str) -> bool:
    """Whether a path names an object in S3."""
    return path.startswith("s3://")


def join(root: str, name: str) -> str:
    """A name below a folder or an S3 prefix."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, name)


def read(path: str, *, offset: int = 0, size: int = WHOLE) -> bytes:
    """`size` bytes from `offset` on; with offset 0, all of a file that is to have that size.

    Raises:
        ReadError: with the reason: not there, no right, another length than `size` says.
    """
    try:
        one_more = int(offset == 0 and size != WHOLE)  # so that a file which has grown is noticed
        data = _read_any(path, offset, size + one_more)
    except OSError as error:
        raise ReadError(reason_of(error)) from None
    if size != WHOLE:
        _check_length(len(data), size)
    return data


def read_into(path: str, room: memoryview, *, offset: int = 0, size: int) -> None:
    """`read` of a local file whose size is known, into the first `size` bytes of `room`, which has one byte more."""
    wanted = room[: size + (offset == 0)]  # one more, so that a file which has grown is noticed
    num_bytes = 0
    try:
        descriptor = os.open(path, _READ)
        try:
            while num_bytes < len(wanted) and (more := os.preadv(descriptor, [wanted[num_bytes:]], offset + num_bytes)):
                num_bytes += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ReadError(reason_of(error)) from None
    _check_length(num_bytes, size)


def _check_length(num_bytes: int, size: int) -> None:
    if num_bytes != size:
        raise ReadError(f"{num_bytes} bytes are there where the index says {size}; it changed since `imagenet-swa index`")


def read_range(path: str, offset: int, size: int) -> bytes:
    """Those of `size` bytes from `offset` on that are there. Raises ReadError."""
    try:
        return _read_any(path, offset, size)
    except OSError as error:
        raise ReadError(reason_of(error)) from None


def _read_any(path: str, offset: int, size: int) -> bytes:
    return _read_remote(path, offset, size) if is_remote(path) else _read_local(path, offset, size)


def _read_local(path: str, offset: int, size: int) -> bytes:
    descriptor = os.open(path, _READ)
    try:
        if size == WHOLE:
            size = os.fstat(descriptor).st_size - offset
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def _read_remote(path: str, offset: int, size: int) -> bytes:
    file = _remote_file(path)
    there = max(0, file.size() - offset)  # reading from beyond the end would be an error of its own
    return file.read_at(there if size == WHOLE else min(size, there), offset) if there else b""


def open_to_read(path: str) -> IO[bytes]:
    """A seekable stream. Reads ahead in S3, where each request takes long. Raises ReadError."""
    try:
        if not is_remote(path):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ReadError("it is no regular file")
            return Path(path).open("rb")
        key = path.removeprefix("s3://")
        file = _s3(key.partition("/")[0]).open_input_file(key)
        return io.BufferedReader(file, _READ_AHEAD)  # pyright: ignore[reportArgumentType]  # it has what the reader calls
    except OSError as error:
        raise ReadError(str(error) if isinstance(error, ReadError) else reason_of(error)) from None


def size_of(path: str) -> int:
    """Bytes. Raises ReadError."""
    try:
        return _remote_file(path).size() if is_remote(path) else Path(path).stat().st_size
    except OSError as error:
        raise ReadError(reason_of(error)) from None


def size_and_time_of(path: str) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns. Raises ReadError."""
    try:
        if not is_remote(path):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        key = path.removeprefix("s3://")
        info = _s3(key.partition("/")[0]).get_file_info(key)
        if info.size is None:
            raise FileNotFoundError(path)
        return info.size, info.mtime_ns or 0
    except OSError as error:
        raise ReadError(reason_of(error)) from None


def reason_of(error: OSError) -> str:
    """An operating system's or S3's error in words, with what to do where the words alone would not say it."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return NOT_THERE
    if "AWS Error" in text or "bucket" in text.lower():
        kind = next(iter(re.findall(r"AWS Error (\w+)", text)), "")
        if kind in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED_CLIENT"):
            return "S3 denies access; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and the bucket's policy"
        if kind == "NETWORK_CONNECTION":
            return f"S3 cannot be reached at {_endpoint() or 'AWS'}; check AWS_ENDPOINT_URL and the network"
        return f"S3 says {kind.lower().replace('_', ' ')}" if kind else " ".join(text.split())[:160]
    return (error.strerror or text).lower()


@contextmanager
def explained() -> Iterator[None]:
    """The operating system's refusals as InputErrors that name the path."""
    try:
        yield
    except OSError as error:
        path = "the data" if error.filename is None else os.fsdecode(error.filename)
        raise InputError(f"cannot read {path}: {reason_of(error)}; give yourself the right to read it, or take it out") from None


def expand(pattern: str) -> list[str]:
    """Paths that a pattern names, sorted: `{000..146}` counts, `{a,b}` chooses, `*` and `?` match what is there.

    Raises:
        ReadError: a folder of S3 that cannot be listed.
        InputError: more than a million names, or in S3 a wildcard that is not in the last part.
    """
    paths: list[str] = []
    texts = list(islice(_braces(pattern), MAX_PATHS + 1))
    if len(texts) > MAX_PATHS:
        raise InputError(f"{pattern[:200]} makes more than {MAX_PATHS:,} names; check the numbers in its braces")
    for text in texts:
        paths += _matches(text) if any(sign in text for sign in "*?[") else [text]
    return paths


def _braces(pattern: str) -> Iterator[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", found[1])
    if numbers:
        first, last = numbers.groups()
        choices = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))  # perhaps far too many
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob(pattern))
    folder, _, name = pattern.rpartition("/")
    if any(sign in folder for sign in "*?["):
        raise InputError(
            f"{pattern}: in S3 the signs * ? [ may stand in the last part only, not in the folder's; use {{a,b}} there"
        )
    return [path for path in list_files(folder) if fnmatchcase(path.rpartition("/")[2], name)]


def list_files(folder: str, *, missing_ok: bool = True) -> list[str]:
    """Files directly in a folder or below an S3 prefix, sorted. Raises ReadError."""
    try:
        if not is_remote(folder):
            return sorted(path for path in glob(os.path.join(escape(folder), "*")) if os.path.isfile(path))
        from pyarrow.fs import FileSelector, FileType

        key = folder.removeprefix("s3://").rstrip("/")
        found = _s3(key.partition("/")[0]).get_file_info(FileSelector(key, allow_not_found=missing_ok))
        return sorted(f"s3://{info.path}" for info in found if info.type == FileType.File)
    except FileNotFoundError:
        raise ReadError("no such bucket or prefix" if is_remote(folder) else NOT_THERE) from None
    except OSError as error:
        raise ReadError(reason_of(error)) from None


def sizes_below(prefix: str) -> dict[str, int]:
    """Sizes of all objects below a prefix of S3, by their names below it: a request for each thousand. Raises ReadError."""
    from pyarrow.fs import FileSelector, FileType

    key = prefix.removeprefix("s3://").rstrip("/")
    try:
        found = _s3(key.partition("/")[0]).get_file_info(FileSelector(key, recursive=True))
    except FileNotFoundError:
        raise ReadError("no such bucket or prefix") from None
    except OSError as error:
        raise ReadError(reason_of(error)) from None
    return {info.path.removeprefix(f"{key}/"): info.size for info in found if info.type == FileType.File}


def files_below(
    root: bytes, top: bytes, endings: tuple[bytes, ...], *, with_sizes: bool = True
) -> tuple[list[bytes], np.ndarray, dict[str, int]]:
    """Names below the root and sizes of the local files of these endings below one folder of it, in order of folder, then name;
    and the modification time of every folder among them. A link back to a folder on its own way is not followed.
    """
    waiting: list[tuple[bytes, tuple[bytes, ...]]] = [(top, ())]  # folders, and the real ones that links led out of
    folders = {}
    while waiting:
        folder, left = waiting.pop()
        path = os.path.join(root, folder)
        time, files = os.stat(path).st_mtime_ns, []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    passed = (*left, os.path.realpath(path)) if entry.is_symlink() else left
                    if not (entry.is_symlink() and _is_within(os.path.realpath(entry.path), passed)):
                        waiting.append((os.path.join(folder, entry.name), passed))
                elif entry.name.lower().endswith(endings):
                    files.append((entry.name, _size(entry) if with_sizes else WHOLE))
        folders[folder] = time, sorted(files)
    ordered = sorted(folders.items(), key=lambda item: os.fsdecode(item[0]))
    names = [os.path.join(folder, name) for folder, (_, files) in ordered for name, _ in files]
    sizes = np.array([size for _, (_, files) in ordered for _, size in files], np.int64)
    return names, sizes, {os.fsdecode(folder): time for folder, (time, _) in ordered}


def _is_within(target: bytes, passed: tuple[bytes, ...]) -> bool:
    """Whether a link leads back to where the walk came through, which would never end."""
    return any(os.path.commonpath([target, folder]) == target for folder in passed)


def _size(entry: os.DirEntry[bytes]) -> int:
    """-1 for a link to nothing, which the loader names when it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return WHOLE


@lru_cache(maxsize=4096)
def _remote_file(path: str) -> Any:
    """An open object; opening asks S3 for its size, reading a range of it is one more request."""
    key = path.removeprefix("s3://")
    return _s3(key.partition("/")[0]).open_input_file(key)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache(maxsize=16)
def _s3(bucket: str) -> Any:
    """A client of pyarrow's, which takes keys from where all AWS tools do, but the address of another server from us."""
    from pyarrow import fs

    if not bucket:
        raise InputError("an S3 path without a bucket; wanted s3://bucket/key")
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=3)
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 15, "retry_strategy": retries}
    endpoint = _endpoint()
    if endpoint is not None:
        options["endpoint_override"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(**options, **({"region": region} if region else {}))
