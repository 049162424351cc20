"""Encoded images and their faults."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import index_folder, index_names
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_swa.data.encoded import EncodedImages, why_undecodable
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.sources import Source, scan


def encoded(kind: str, height: int = 40, width: int = 50, **options: Any) -> bytes:
    buffer = io.BytesIO()
    grey = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(grey).save(buffer, kind, **options)
    return buffer.getvalue()


def read(index: ImageIndex, wanted: Iterable[int], num_threads: int = 2) -> Any:
    with closing(EncodedImages(index, num_threads)) as images:
        return images.read_batch(np.fromiter(wanted, np.int64))


def test_bytes_and_sizes_of_files(image_folder: Path) -> None:
    """A batch holds the files' bytes and PIL's sizes, in the order that was asked for, repeated ones too."""
    index = index_folder(image_folder / "train")
    wanted = [5, 23, 0, 5, *range(23, -1, -1)]
    found = read(index, wanted)
    assert found.indices.tolist() == wanted and found.bad == {}
    for i, image, height, width in zip(wanted, found.images, found.heights, found.widths, strict=True):
        assert image.tobytes() == Path(index.path(i)).read_bytes()
        assert Image.open(index.path(i)).size == (width, height)


def test_shards_are_files(image_folder: Path, tmp_path: Path) -> None:
    """Members of tar shards are read as the files that they were."""
    files = index_folder(image_folder / "val")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(6 * shard, 6 * shard + 6):
                for extension, content in (("jpg", files.read(i)), ("cls", str(files.labels[i]).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    members = scan(Source("val", f"{tmp_path}/{{0,1}}.tar"), num_classes=3)[0]
    order = [11, 0, 5, 6, 3]
    one, other = read(files, order), read(members, order)
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert (one.heights == other.heights).all() and (one.widths == other.widths).all()


def test_no_images() -> None:
    """An empty batch is one."""
    found = read(index_names(Path("/nowhere"), [b"a"]), [])
    assert len(found.indices) == len(found.images) == len(found.heights) == len(found.widths) == 0 and found.bad == {}


@pytest.mark.parametrize("indexed", [True, False])
def test_bad_images_are_told_apart(tmp_path: Path, indexed: bool) -> None:
    """What cannot be used is in `bad` with the reason, in the order of the batch; all else is as it would be alone."""
    contents: dict[str, bytes | None] = {
        "good.JPEG": encoded("JPEG"),
        "missing": None,
        "text": b"404 Not Found",
        "turned": encoded("PNG", 30, 20),
        "empty": b"",
        "cut": encoded("JPEG")[:-40],
        "PNG without end": encoded("PNG")[:-12],
        "GIF": encoded("GIF"),
        "more at the end": encoded("JPEG", 60, 10) + b"\0" * 3000,
    }
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    sizes = [len(content or b"0123") if indexed else -1 for content in contents.values()]
    index = make_index(str(tmp_path), [name.encode() for name in contents], range(9), sizes)  # pyright: ignore[reportArgumentType]
    found = read(index, [8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert found.indices.tolist() == [8, 3, 0]
    assert list(zip(found.heights, found.widths, strict=True)) == [(60, 10), (30, 20), (40, 50)]
    assert list(found.bad) == [7, 6, 5, 4, 2, 1]
    for i, words in {
        1: "no such file",
        2: "b'404 Not '",
        4: "0 bytes" if indexed else "empty",
        5: "truncated",
        6: "end is missing",
        7: "b'GIF8",
    }.items():
        assert words in found.bad[i] and "\n" not in found.bad[i]


def test_a_file_of_another_size_than_indexed(tmp_path: Path) -> None:
    """A file that grew or shrank since it was indexed is bad, and the reason says by how much."""
    sound = encoded("JPEG")
    (tmp_path / "grown").write_bytes(sound + b"1")
    (tmp_path / "shrunk").write_bytes(sound[:-1])
    (tmp_path / "same").write_bytes(sound)
    index = make_index(str(tmp_path), [b"grown", b"shrunk", b"same"], [0, 1, 2], [len(sound)] * 3)
    found = read(index, [0, 1, 2])
    assert found.indices.tolist() == [2] and list(found.bad) == [0, 1]
    for reason in found.bad.values():
        assert f"where the index says {len(sound)}" in reason and "imagenet-swa index" in reason


def test_more_pixels_than_pillow_takes(tmp_path: Path) -> None:
    """A JPEG whose header asks for more pixels than Pillow decodes is refused, not left to a decoder without limits."""
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (20_000).to_bytes(2, "big") * 2
    (tmp_path / "huge").write_bytes(data)
    assert "exceeds limit" in read(index_names(tmp_path, [b"huge"]), [0]).bad[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_why_undecodable(kind: str) -> None:
    """Sound images have no fault, halved ones have one, of which opening them need not know."""
    data = encoded(kind)
    assert why_undecodable(data) is None and why_undecodable(data, whole=False) is None
    assert why_undecodable(data[: len(data) // 2]) is not None
    assert why_undecodable(b"") == "the file is empty"


def whole_look(data: bytes) -> tuple[int, int] | None:
    """Height and width of a PNG as Pillow says them; None where it refuses the file when it opens it."""
    if why_undecodable(data, whole=False) is not None:
        return None
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


@settings(max_examples=150, deadline=None)
@given(
    place=st.integers(0, 60) | st.integers(-20, -1),
    value=st.integers(0, 255),
    mended=st.booleans(),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "1", "I;16"]),
)
@example(place=23, value=0, mended=True, mode="RGB")  # no height
@example(place=18, value=255, mended=True, mode="RGB")  # too wide to be decoded
@example(place=20, value=255, mended=True, mode="RGB")  # higher than any picture
@example(place=24, value=4, mended=True, mode="RGB")  # four bits of colour, of which there is no PNG
@example(place=26, value=1, mended=True, mode="RGB")  # another compression
@example(place=32, value=0, mended=False, mode="RGB")  # a wrong check sum
@example(place=40, value=0, mended=False, mode="RGB")  # no IDAT
def test_a_short_look_at_a_png_says_what_pillow_says(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, mended: bool, mode: str
) -> None:
    """Sizes of PNGs, and which are bad, are Pillow's, whatever byte of the header or the end is changed, its check sum or not."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)).convert(mode).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[place] = value
    if mended:
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    folder = tmp_path_factory.mktemp("png")
    (folder / "image").write_bytes(data)
    found, wanted = read(index_names(folder, [b"image"]), [0]), whole_look(bytes(data))
    assert [*zip(found.heights.tolist(), found.widths.tolist(), strict=True)] == ([wanted] if wanted else [])
    assert list(found.bad) == ([] if wanted else [0])
