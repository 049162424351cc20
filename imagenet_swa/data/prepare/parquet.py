"""Images in parquet files as the Hub's `ILSVRC/imagenet-1k` has them: a column `image` of bytes and path, a column `label`."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from imagenet_swa.config import InputError, require
from imagenet_swa.data import storage
from imagenet_swa.data.sources import EXTENSIONS
from imagenet_swa.plain import printable

_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
_ROWS = 64  # held in memory at a time
_WANTED = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})


def parquet_files(path: str, split: str) -> list[str]:
    """Files of a pattern, or those of a split in a folder, where the names' start says it; [] for another kind of source."""
    try:
        if path.endswith(".parquet"):
            found = storage.expand(path)
            require(bool(found), f"no files match {path} (quote the pattern, so that the shell leaves it alone)")
            return found
        if not storage.is_remote(path) and not Path(path).is_dir():
            return []
        for folder in (path, storage.join(path, "data")):  # the Hub's repositories have them in data/
            found = [file for file in storage.list_files(folder) if file.endswith(".parquet")]
            if found:
                return _of_split(found, folder, split)
    except storage.ReadError as error:
        raise InputError(f"cannot list {path}: {error}") from None
    return []


def _of_split(files: list[str], folder: str, split: str) -> list[str]:
    starts = ("train",) if split == "train" else ("val",)  # `validation-` too
    found = [file for file in files if os.path.basename(file).startswith(starts)]
    require(
        bool(found),
        f"{folder} holds {len(files)} parquet files, such as {os.path.basename(files[0])}, none whose name starts with "
        f"{starts[0]!r}; set split, or give a pattern such as '{folder}/*.parquet'",
    )
    _, _, total = os.path.basename(found[0]).removesuffix(".parquet").partition("-of-")
    number = total.partition("-")[0]
    require(
        not number.isdecimal() or int(number) == len(found),
        f"{folder} holds {len(found)} of {number} parquet files of {split}; fetch the others, or give a pattern to take these",
    )
    return found


class ParquetImages:
    """The images of parquet files in the order of the files and of their rows. Only footers are read here."""

    def __init__(self, files: list[str], num_classes: int) -> None:
        self._files, self._num_classes = files, num_classes
        numbers = []
        for path in files:
            with _open_parquet(path) as table:
                numbers.append(table.metadata.num_rows)
        require(min(numbers) >= 0, f"{files[0]} or another of these parquet files is damaged; fetch them again")
        self._starts = [0, *np.cumsum(numbers).tolist()]
        require(len(self) > 0, f"{files[0]} and {len(files) - 1} other parquet files hold no rows")
        self.identity = {
            "files": [os.path.basename(path) for path in files],
            "bytes": sum(storage.size_of(path) for path in files),
            "rows": len(self),
        }

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, start: int) -> Iterator[tuple[str, int, bytes]]:
        """Name, label and bytes of each image from number `start` on, a batch of rows in memory at a time."""
        for path, (first, end) in zip(self._files, pairwise(self._starts), strict=True):
            if end > start:
                yield from _rows(path, first, start, self._num_classes)


def _open_parquet(path: str) -> parquet.ParquetFile:
    """A file whose columns are the Hub's."""
    try:
        table = parquet.ParquetFile(storage.open_to_read(path))
        got = table.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split())[:120])
        raise InputError(f"cannot read the parquet file {path}: {reason}; fetch it again") from None
    for field in _WANTED:
        position = got.get_field_index(field.name)
        if position < 0 or not _same_kind(got.field(position).type, field.type):
            columns = printable(", ".join(f"{column.name}: {column.type}" for column in got)[:300])
            wanted = ", ".join(f"{column.name}: {column.type}" for column in _WANTED)
            raise InputError(f"{path} has the columns {columns}; wanted {wanted}, as in the Hub's ILSVRC/imagenet-1k")
    return table


def _same_kind(got: pa.DataType, wanted: pa.DataType) -> bool:
    if not pa.types.is_struct(wanted):
        return pa.types.is_integer(got)
    if not pa.types.is_struct(got):
        return False
    kinds = {got.field(number).name: got.field(number).type for number in range(got.num_fields)}
    are_bytes = pa.types.is_binary(kinds.get("bytes", pa.null())) or pa.types.is_large_binary(kinds.get("bytes", pa.null()))
    return are_bytes and any(check(kinds.get("path", pa.int8())) for check in _TEXTS)


def _rows(path: str, first: int, start: int, num_classes: int) -> Iterator[tuple[str, int, bytes]]:
    """A file's rows from number `start` of the whole on, where its own first one has number `first`."""
    with _open_parquet(path) as table:
        try:
            for group in range(table.num_row_groups):
                end = first + table.metadata.row_group(group).num_rows
                if end > start:
                    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=["image", "label"]):
                        rows = zip(batch.column("image"), batch.column("label").to_pylist(), strict=True)
                        for number, (image, label) in enumerate(rows, start=first):
                            if number >= start:
                                yield _row(f"{path}: row {number}", number, image.as_py(), label, num_classes)
                        first += batch.num_rows
                first = end
        except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            reason = printable(" ".join(str(error).split())[:120])
            raise InputError(f"cannot read the parquet file {path}: {reason}; fetch it again") from None


def _row(where: str, number: int, image: dict[str, Any] | None, label: int | None, num_classes: int) -> tuple[str, int, bytes]:
    data = (image or {}).get("bytes")
    if data is None:
        raise InputError(f"{where} holds no image bytes (a path alone is not enough); wanted parquet files with embedded images")
    if label is None or label < 0:
        raise InputError(f"{where} has no label ({label}), as the Hub's test split has none; give train or validation files")
    if label >= num_classes:
        raise InputError(f"{where} has label {label}, not in 0..{num_classes - 1} (num_classes)")
    name = (image or {}).get("path") or ""
    if not name.lower().endswith(EXTENSIONS):
        name = f"{number:08d}" + (".png" if data.startswith(b"\x89PNG") else ".jpg")
    return (os.path.basename(name) if name.startswith("/") else name), label, data
