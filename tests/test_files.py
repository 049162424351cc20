"""Files that are whole or not there."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from imagenet_swa.files import existing, write_atomically


def test_write_atomically(tmp_path: Path):
    """The new text replaces the old one, and nothing else is left behind."""
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    write_atomically(path, "new ± text")
    assert path.read_text() == "new ± text"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """On a full disk, or cut before the rename, readers still see the whole old file."""
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if name == "fsync" else Path, name, fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("content", ["new ± text", b"\xff bytes"])
def test_text_and_bytes(tmp_path: Path, content: str | bytes):
    """Text becomes UTF-8, bytes stay what they are."""
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a path with missing parts the longest part that exists, also where the path is relative."""
    assert existing(tmp_path / "not" / "there") == tmp_path == existing(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert existing(Path("not/there")) == tmp_path
