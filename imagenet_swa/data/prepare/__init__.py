"""`imagenet-swa prepare`: the images of a split from anywhere to tar shards, or class folders, with an index.

The output depends on the source and the settings alone, to the last byte but for the times of files that its index holds:
neither the number of workers nor interruptions leave a trace. A unit of it, a shard or as many files, is written, flushed,
renamed and then noted in a journal, from which the same command goes on.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import __version__ as pillow_version

from imagenet_swa.config import InputError, TrainingError, require
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex, save_index
from imagenet_swa.data.index_cache import index_path
from imagenet_swa.data.prepare.archives import Item, Origin, key_of, open_origin
from imagenet_swa.data.prepare.copies import Copy, Recipe, UndecodableError, make_copy, pixel_difference
from imagenet_swa.data.prepare.journal import Journal
from imagenet_swa.data.prepare.report import describe, make_report
from imagenet_swa.data.prepare.units import FolderOutput, ShardOutput, Unit, digest_of
from imagenet_swa.data.restart import add_restart_markers
from imagenet_swa.data.sources import Source, Track, scan, untracked
from imagenet_swa.data.workers import in_order
from imagenet_swa.files import write_atomically

_MIB = 2**20
_FREE = (
    "source",
    "output",
    "list_file",
    "labels",
    "num_workers",
    "on_bad_image",
    "max_bad_images",
    "num_compared",
)  # without effect on the output


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What `prepare` reads, writes, and does to the images in between"""

    source: str
    """Images of one split: class folders, tar shards or a pattern of them (also `s3://`); the official
    ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, or another tar of class folders; parquet files of the Hub's
    ILSVRC/imagenet-1k, their folder or a pattern; with `list_file`, the folder that its paths start from."""
    output: Path
    """Folder that gets `train/` or `val/` with the images, an index and a report beside it."""
    split: Literal["train", "val"] = "train"
    """Which split this is; names the output, and chooses among files in a folder of archives or parquet files."""
    list_file: str | None = None
    """Text file (or `s3://` object) with a line `path label` per image of the source."""
    labels: Path | None = None
    """For an archive without labels: ILSVRC2012_devkit_t12.tar.gz or the folder it was unpacked to (read with SciPy), or a
    text file of lines `file label`, `file synset`, or one label or synset per image in the sorted order of names."""
    num_classes: int = 1000
    """Number of outputs of the network that the labels are for."""
    format: Literal["shards", "folder"] = "shards"
    """shards: tar files as WebDataset has them; folder: a file per image, and a list of them."""
    shorter_side: int | None = None
    """Shrink images to this length of the shorter side, pixels (Lanczos, 4:2:0 JPEG); default: keep the bytes."""
    quality: int = 90
    """JPEG quality of shrunk images, 1..95."""
    keep_small: bool = True
    """Keep the bytes of images that are no larger than `shorter_side`, or that would not take fewer bytes; false
    re-encodes every image, small ones in their own size."""
    restart_markers: bool = False
    """Add restart markers to JPEGs, which leaves every pixel as it is and lets the loader decode only what it crops."""
    shard_size: int = 256
    """MiB after which a new shard begins."""
    num_workers: int | None = None
    """Processes that read and encode; 0 works in this one; default: one per core."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read, or be decoded where that is needed, does: stop, or be left out and named."""
    max_bad_images: int = 100
    """With on_bad_image skip: the most images that may be left out."""
    num_compared: int = 512
    """Images, evenly spaced, whose pixels are compared with the source where they were re-encoded. (All copies with
    restart markers are compared.)"""

    def __post_init__(self) -> None:
        require(bool(self.source), "source is empty; give a folder, an archive, shards or parquet files")
        for name, low, high in (("quality", 1, 95), ("num_classes", 1, None), ("shard_size", 1, None), ("shorter_side", 1, None)):
            value = getattr(self, name)
            wanted = f"at least {low}" if high is None else f"{low}..{high}"
            require(value is None or (value >= low and value <= (high or value)), f"{name} must be {wanted}, got {value}")
        for name in ("num_workers", "max_bad_images", "num_compared"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be 0 or more, got {value}")
        require(
            self.list_file is None or self.labels is None,
            "list_file and labels exclude each other: list_file names the images, labels belong to an archive",
        )

    @property
    def recipe(self) -> Recipe:
        """What is done to an image."""
        return Recipe(
            shorter_side=self.shorter_side,
            quality=self.quality,
            keep_small=self.keep_small,
            restart_markers=self.restart_markers,
        )

    @property
    def target(self) -> Path:
        """Folder of the shards or of the class folders."""
        return self.output / self.split


@dataclass(frozen=True)
class PrepareResult:
    """What was written: the index, the flags that name it to the other commands, the report's numbers."""

    index: ImageIndex
    flags: tuple[str, ...]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Done:
    """An image on its way from a worker to the writer; `difference` where it was measured."""

    item: Item
    num_bytes_before: int
    copy: Copy
    difference: tuple[int, int] | None


@dataclass(frozen=True)
class _Bad:
    item: Item
    reason: str


def prepare(settings: PrepareSettings, track: Track[Any] = untracked, say: Callable[[str], None] = print) -> PrepareResult:
    """Write the output, or the rest of it; read it back and compare; write its index and a report.

    Raises:
        InputError: a source, labels or an output that cannot be used, or a bad image.
        TrainingError: what was written reads back differently.
        OSError: the disk is full.
    """
    if settings.restart_markers:
        add_restart_markers(b"")  # raises where it was not compiled
    _check_places(settings)
    origin = open_origin(
        settings.source,
        split=settings.split,
        list_file=settings.list_file,
        labels=settings.labels,
        num_classes=settings.num_classes,
        track=track,
    )
    say(f"{settings.split}: {settings.source}, {origin.words}")
    with Journal(settings.output, settings.split) as journal:
        output = _open_output(settings, origin)
        journal.begin(_identity(settings) | {f"source's {name}": value for name, value in origin.identity.items()}, output)
        if journal.units:
            say(f"going on after {journal.num_consumed:,} images that are finished")
        start, num_before = time.monotonic(), journal.num_consumed
        for unit in _write(settings, origin, output, journal, track):
            journal.add(unit)
        seconds = time.monotonic() - start
        num_worked = journal.num_consumed - num_before
        if num_worked:
            say(f"{num_worked:,} images in {seconds:.1f} s, {num_worked / seconds:.0f} images/s")
        output.finish()
        index = _verify(settings, output.list_file, journal.units, track)
        report = make_report(
            journal.units, index, split=settings.split, source=settings.source, words=origin.words, settings=_identity(settings)
        )
    write_atomically(settings.output / f"prepare-{settings.split}.json", json.dumps(report, indent=2) + "\n")
    flags = [f"--data.{settings.split}={settings.target}"]
    if output.list_file is not None:
        flags.append(f"--data.{settings.split}_list={output.list_file}")
    for line in describe(report):
        say(line)
    say(f"to use it: {' '.join(flags)}")
    return PrepareResult(index, tuple(flags), report)


# --------------------------------------------------------------------------------------------------- places and settings


def _check_places(settings: PrepareSettings) -> None:
    """Refuse to write into what is read."""
    require(not str(settings.output).startswith("s3:"), f"output {settings.output}: wanted a local folder")
    if storage.is_remote(settings.source):
        return
    source, target = Path(settings.source).resolve(), settings.target.resolve()
    way_out = "choose another output"
    require(
        target != source and target not in source.parents, f"source {source} lies in {target}, which is to be written; {way_out}"
    )
    inside = source.is_dir() and settings.list_file is None and source in target.parents
    require(not inside, f"output {target} lies inside the source {source}; {way_out}")


def _open_output(settings: PrepareSettings, origin: Origin) -> ShardOutput | FolderOutput:
    try:
        settings.target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {settings.target}: {storage.reason_of(error)}; choose another output") from None
    if settings.format == "shards":
        return ShardOutput(settings.target, settings.split)
    return FolderOutput(settings.target, origin.folders)


def _identity(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that the output's bytes depend on, besides the source."""
    names = [field.name for field in dataclass_fields(settings) if field.name not in _FREE]
    identity = {name: getattr(settings, name) for name in names}
    return identity | ({"pillow": pillow_version} if settings.shorter_side is not None else {})


# -------------------------------------------------------------------------------------------------------------- writing


def _write(
    settings: PrepareSettings, origin: Origin, output: ShardOutput | FolderOutput, journal: Journal, track: Track[Any]
) -> Iterator[Unit]:
    """The units that are missing, each when it is on disk under its final name."""
    first = journal.num_consumed
    tasks = (
        (item, _is_compared(number, settings.num_compared, origin.num_images))
        for number, item in enumerate(origin.items(first), first)
    )
    work = partial(_work, settings.recipe)
    results = in_order(work, tasks, settings.num_workers)
    keys = {key_of(name) for name in output.names(journal.units)}
    num_bad = sum(len(unit.bad) for unit in journal.units)
    unit = output.begin(len(journal.units))
    try:
        for done in track(results, max(0, origin.num_images - first), f"{settings.split}: images"):
            unit.num_consumed += 1
            if isinstance(done, _Bad):
                num_bad += 1
                _stop_on_bad(settings, done, num_bad)
                unit.bad.append([done.item.name, done.reason])
                continue
            name = _new_name(done)
            key = key_of(output.placed(name, done.item.label))
            require(key not in keys, f"two images would get the name {name} (from {done.item.name}); rename one of them")
            keys.add(key)
            output.add(unit, name, done.item.label, done.copy.data)
            _count(unit, done)
            if unit.num_bytes >= settings.shard_size * _MIB:
                output.commit(unit)
                yield unit
                unit = output.begin(unit.number + 1)
        if unit.num_consumed:
            output.commit(unit)
            yield unit
    finally:
        results.close()
        output.discard()


def _is_compared(number: int, num_compared: int, num_images: int) -> bool:
    """Evenly spaced among all images, as far as their number is known."""
    return number * num_compared % num_images < num_compared


def _work(recipe: Recipe, task: tuple[Item, bool]) -> _Done | _Bad:
    """Read and copy one image, in a worker."""
    item, compare = task
    try:
        if isinstance(item.content, bytes):
            data = item.content
        else:
            path, offset, size = item.content
            data = storage.read(path, offset=offset, size=size)
        copy = make_copy(data, recipe)
        difference = pixel_difference(data, copy.data) if compare and copy.outcome == "re_encoded" else None
    except (storage.ReadError, UndecodableError) as error:
        return _Bad(item._replace(content=b""), str(error))
    except ArithmeticError as error:
        raise TrainingError(f"{item.name}: {error}; set restart_markers to false, and please report this image") from None
    return _Done(item._replace(content=b""), len(data), copy, difference)


def _stop_on_bad(settings: PrepareSettings, bad: _Bad, num_bad: int) -> None:
    if settings.on_bad_image == "stop":
        raise InputError(f"bad image {bad.item.name}: {bad.reason}; replace it, or leave such out with on_bad_image skip")
    if num_bad > settings.max_bad_images:
        raise InputError(
            f"bad image {bad.item.name}: {bad.reason}; it is number {num_bad}, max_bad_images allows {settings.max_bad_images}"
        )


def _new_name(done: _Done) -> str:
    """The source's name; `.jpg` where the bytes became a JPEG that the extension denies."""
    stem, extension = os.path.splitext(done.item.name)
    is_named_jpeg = extension.lower() in (".jpg", ".jpeg")
    return done.item.name if is_named_jpeg or done.copy.outcome != "re_encoded" else f"{stem}.jpg"


def _count(unit: Unit, done: _Done) -> None:
    unit.num_bytes_before += done.num_bytes_before
    unit.counts[done.copy.outcome] += 1
    unit.counts["restart_markers"] += done.copy.restart_markers
    if done.difference is not None:
        total, most = done.difference
        unit.counts["compared"] += 1
        unit.difference_sum += total
        unit.difference_max = max(unit.difference_max, most)


# -------------------------------------------------------------------------------------------------------- verification


def _verify(settings: PrepareSettings, list_file: Path | None, units: list[Unit], track: Track[Any]) -> ImageIndex:
    """Read everything back through a new index, which is saved once names, labels and bytes are those that were written."""
    require(any(unit.num_images for unit in units), f"{settings.source} gave no images")
    source = Source(settings.split, str(settings.target), None if list_file is None else str(list_file))
    index, state = scan(source, num_classes=settings.num_classes, track=track)
    ends = np.cumsum([unit.num_images for unit in units]).tolist()
    if ends[-1] != len(index):
        raise TrainingError(
            f"{settings.target} holds {len(index):,} images, {ends[-1]:,} were written; something else wrote there: empty "
            f"{settings.output} and run the same command again"
        )
    parts = (_slice(index, end - unit.num_images, end) for unit, end in zip(units, ends, strict=True))
    digests = in_order(digest_of, parts, settings.num_workers, chunk=1)
    tracked = track(digests, len(units), f"{settings.split}: reading back")
    for unit, end, digest in zip(units, ends, tracked, strict=True):
        if digest != unit.digest:
            first = unit.file or settings.target / index.name(end - unit.num_images)
            where = first if unit.file else f"one of the {unit.num_images:,} images from {first} on"
            raise TrainingError(
                f"{where} reads back differently from what was written; delete {first} and run the same command again"
            )
    save_index(index, state, Path(index_path(source, None)))
    return index


def _slice(index: ImageIndex, start: int, end: int) -> list[Item]:
    """Images start..end of an index by name, label and place."""
    return [Item(index.name(i), int(index.labels[i]), index.location(i)) for i in range(start, end)]
