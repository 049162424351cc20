"""Looks at every image of a split or both before a run does, and lists those that no loader can decode.

A quick look reads the first and the last few KiB of each image, and all of those that look odd; a full one decodes them all.
"""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imagenet_swa.config import Config, InputError, require
from imagenet_swa.data import imagenet
from imagenet_swa.data.examine import digests_of, look_at
from imagenet_swa.data.findings import SPLITS, UNDECODABLE, VerifyResult, tell, write_results
from imagenet_swa.data.index import ImageIndex, Location, check_classes, check_labels, check_same_classes
from imagenet_swa.data.index_cache import find_index, read_quarantine
from imagenet_swa.data.sources import Source, Track, broken_shards, scan, source_of, untracked
from imagenet_swa.data.workers import begin_worker

_IMAGES_PER_TASK = 256
_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_SUFFIXES |= {".ppm": "PPM", ".pgm": "PPM"}


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How closely to look, and where to write what was found"""

    full: bool = False
    """Decode every image to its last pixel; default: read the first and last bytes, and decode what looks odd."""
    output: Path = Path("verify")
    """Folder of verify.md, verify.json and quarantine.tsv."""
    num_workers: int | None = None
    """Processes that read and decode; default: one per core; 0: none but this one."""

    def __post_init__(self) -> None:
        require(
            self.num_workers is None or self.num_workers >= 0, f"verify.num_workers must be 0 or more, got {self.num_workers}"
        )


def verify(
    config: Config, settings: VerifySettings, track: Track[Any] = untracked, say: Callable[[str], None] = print
) -> VerifyResult:
    """Look at every image of the splits that are set, one or both; write verify.md, verify.json and quarantine.tsv.

    Raises:
        InputError: no data named, or the results cannot be written.
    """
    require(
        not config.data.synthetic, "data.synthetic is set: made-up images have nothing to verify; set data.train and data.val"
    )
    named = [split for split in SPLITS if getattr(config.data, split) is not None]
    require(bool(named), "no images to verify: set data.train, data.val, or both")
    sources = [source_of(config.data, split) for split in named]
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {settings.output}: {error.strerror}; set verify.output to another") from None
    result = VerifyResult(settings.full)
    indices = {source.split: _index_of(source, config, result, track) for source in sources}
    found = {split: index for split, index in indices.items() if index is not None}
    check_labels_and_counts(found, config.model.num_classes, result)
    keys = {}
    with _mapping(settings.num_workers) as mapping:
        for split, index in found.items():
            keys[split] = _look_at_images(index, split, config.data.quarantine, result, mapping, track)
        _find_duplicates(found, keys, result, mapping, track)
    write_results(result, settings.output)
    tell(result, settings.output, say)
    return result


def _index_of(source: Source, config: Config, result: VerifyResult, track: Track[Any]) -> ImageIndex | None:
    """A split's images, by its index where that fits the data; None, and a finding, where they cannot be listed."""
    try:
        index = find_index(source, config.data.index)
        if index is not None:
            return index
    except InputError as error:
        result.add(source.split, "stale_index", source.path, str(error))
    try:
        return scan(replace(source, missing_ok=True), num_classes=config.model.num_classes, track=track)[0]
    except InputError as error:
        for path, reason in broken_shards(source) or [(source.path, str(error))]:
            result.add(source.split, "unusable", path, reason)
        return None


# -------------------------------------------------------------------------------------------------- labels and counts


def check_labels_and_counts(indices: dict[str, ImageIndex], num_classes: int, result: VerifyResult) -> None:
    """Class order, numbers of images, and labels against the WordNet ids in names."""
    for split, index in indices.items():
        for check in (check_classes, check_labels):
            try:
                check(index, split, num_classes)
            except InputError as error:
                result.add(split, "classes", index.root, str(error))
        if num_classes == imagenet.NUM_CLASSES:
            _check_names(index, split, result)
            _check_counts(index, split, result)
        for name, times in _repeated_names(index):
            result.add(split, "listed_twice", name, f"{times} times")
    if len(indices) == len(SPLITS):
        try:
            check_same_classes(indices["train"], indices["val"])
        except InputError as error:
            result.add("train and val", "classes", indices["train"].root, str(error))


def _check_names(index: ImageIndex, split: str, result: VerifyResult) -> None:
    """`n01440764/...` and `n01440764_10026.JPEG` say their class, which the label has to be."""
    found = pc.extract_regex(index.names, r"(?:^|/)(?P<synset>n\d{8})[_/]").field("synset")  # pyright: ignore
    order = pa.array([synset.encode() for synset in imagenet.synsets()], found.type)
    said = pc.index_in(found, value_set=order).fill_null(-1).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    for i in np.flatnonzero((said >= 0) & (said != index.labels)):
        result.add(split, "wrong_label", index.listed_name(int(i)), f"has label {index.labels[i]}, its name says {said[i]}")


def _check_counts(index: ImageIndex, split: str, result: VerifyResult) -> None:
    """Of data that look like all of ImageNet-1k: the numbers of images must be ImageNet's."""
    wanted = {"train": imagenet.NUM_TRAIN, "val": imagenet.NUM_VAL}[split]
    low, high = {"train": (732, 1300), "val": (50, 50)}[split]
    in_range = index.labels[(index.labels >= 0) & (index.labels < imagenet.NUM_CLASSES)]
    counts = np.bincount(in_range, minlength=imagenet.NUM_CLASSES)
    if not counts.all() or len(index) < 0.9 * wanted:
        missing = f", {np.count_nonzero(counts == 0)} classes have none" if not counts.all() else ""
        result.add(split, "subset", index.root, f"{len(index):,} images of {wanted:,}{missing}")
        return
    if len(index) != wanted:
        result.add(split, "wrong_count", index.root, f"{len(index):,} images, ImageNet-1k has {wanted:,}")
    for label in np.flatnonzero((counts < low) | (counts > high)):
        bounds = f"{low}" if low == high else f"{low} to {high}"
        result.add(split, "wrong_count", imagenet.synsets()[label], f"{counts[label]} images of class {label}, wanted {bounds}")


def _repeated_names(index: ImageIndex) -> list[tuple[str, int]]:
    """Of files. Members of a shard have different names, which may come again in the next shard."""
    if index.shard_numbers is not None:
        return []
    counted = index.names.value_counts()
    repeated = counted.filter(pc.greater(counted.field("counts"), 1)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return sorted((os.fsdecode(entry["values"]), entry["counts"]) for entry in repeated)


# ------------------------------------------------------------------------------------------------------------ all images

Mapping = Callable[[Callable[[list[Location]], list[Any]], Iterable[list[Location]]], Iterator[list[Any]]]


@contextmanager
def _mapping(num_workers: int | None) -> Iterator[Mapping]:
    """`map` over worker processes, with a few tasks under way for each."""
    if num_workers == 0:
        yield map
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = num_workers or cores
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([look_at.__module__])
    pool = ProcessPoolExecutor(number, context, begin_worker, (dict(os.environ),))

    def over_workers(function: Callable[..., Any], tasks: Iterable[list[Location]]) -> Iterator[list[Any]]:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > 3 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield over_workers
    except BrokenProcessPool:
        raise InputError("a worker process died, perhaps for want of memory; set verify.num_workers to fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(index: ImageIndex, images: Iterable[int] | None = None) -> tuple[int, Iterator[list[Location]]]:
    """The number of tasks, and the tasks: places of a few hundred images each."""
    chosen = range(len(index)) if images is None else list(images)
    starts = range(0, len(chosen), _IMAGES_PER_TASK)
    return len(starts), ([index.location(i) for i in chosen[start : start + _IMAGES_PER_TASK]] for start in starts)


def _look_at_images(
    index: ImageIndex, split: str, quarantine: Path | None, result: VerifyResult, mapping: Mapping, track: Track[Any]
) -> NDArray[np.void]:
    """Add what is odd about a split's images to the result. Returns the images' digests, (N,) of 16 bytes."""
    left_out = set() if quarantine is None else set(read_quarantine(quarantine, split))
    unneeded, formats, sizes, digests, number = set(left_out), Counter[str](), [], [], 0
    count, tasks = _tasks(index)
    looks = mapping(partial(look_at, full=result.full), tasks)
    for part in track(looks, count, f"{split}: hundreds of images"):
        for look in part:
            name = index.listed_name(number)
            for kind, detail in look.odd:
                is_left_out = kind in UNDECODABLE and os.fsencode(name) in left_out
                result.add(split, "quarantined" if is_left_out else kind, name, detail)
                if kind in UNDECODABLE:
                    unneeded.discard(os.fsencode(name))
                    reason = " ".join(f"{kind.replace('_', ' ')}: {detail}".split())
                    result.quarantine.append((split, name, reason))
            named = _SUFFIXES.get(os.path.splitext(name)[1].lower())
            if look.format and named not in (None, look.format):
                result.add(split, "other_format", name, f"content {look.format}, name {named}")
            formats[look.format] += bool(look.format)
            digests.append(look.key.ljust(16, b"\0"))
            number += 1
        sizes += [(look.width, look.height) for look in part if look.format]
    for name in sorted(unneeded):
        result.add(split, "needless_quarantine", os.fsdecode(name))
    result.summaries[split] = _summary(index, formats, sizes)
    return np.frombuffer(b"".join(digests), "V16")


def _summary(index: ImageIndex, formats: Counter[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    widths, heights = np.array(sizes or [(0, 0)]).T
    in_bytes = index.sizes[index.sizes >= 0]
    return {
        "images": len(index),
        "classes": len(np.unique(index.labels)),
        "formats": {name: number for name, number in sorted(formats.items()) if number},
        "width": [int(v) for v in (widths.min(), np.median(widths), widths.max())],
        "height": [int(v) for v in (heights.min(), np.median(heights), heights.max())],
        "bytes": int(in_bytes.sum()),
    }


def _find_duplicates(
    indices: dict[str, ImageIndex],
    keys: dict[str, NDArray[np.void]],
    result: VerifyResult,
    mapping: Mapping,
    track: Track[Any],
) -> None:
    """Files with the same bytes. A quick look's keys only say which could be the same; those are then read whole."""
    images = [(split, i) for split in indices for i in range(len(indices[split]))]
    groups = _equal(np.concatenate([keys[split] for split in indices]) if indices else np.zeros(0, "V16"))
    if not result.full and groups:
        candidates = sorted(k for group in groups for k in group)
        digests: dict[int, bytes] = {}
        for split in indices:
            chosen = [k for k in candidates if images[k][0] == split]
            count, tasks = _tasks(indices[split], [images[k][1] for k in chosen])
            parts = track(mapping(digests_of, tasks), count, f"{split}: candidates for duplicates")
            digests |= dict(zip(chosen, (digest for part in parts for digest in part), strict=True))
        groups = [
            [group[k] for k in same]
            for group in groups
            for same in _equal(np.frombuffer(b"".join(digests[k] for k in group), "V16"))
        ]
    for group in groups:
        members = [(*images[k], indices[images[k][0]].listed_name(images[k][1])) for k in group]
        _add_duplicates(members, indices, result)
    num_leaked = result.count("leak")
    if num_leaked and 2 * num_leaked > len(indices["val"]):
        detail = f"has {num_leaked:,} of its {len(indices['val']):,} images in train too; set data.val to the validation images"
        result.add("train and val", "mostly_leaked", indices["val"].root, detail)


def _equal(keys: NDArray[np.void]) -> list[list[int]]:
    """Positions of equal keys, for every key that occurs more than once and is not all zeros (no file)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    groups: list[list[int]] = []
    for start in np.flatnonzero(same & ~np.concatenate([[False], same[:-1]])) if len(same) else ():
        end = start + 1
        while end < len(keys) and ordered[end] == ordered[start]:
            end += 1
        if bytes(ordered[start]) != bytes(16):
            groups.append(sorted(int(k) for k in order[start:end]))
    return sorted(groups)


def _add_duplicates(members: list[tuple[str, int, str]], indices: dict[str, ImageIndex], result: VerifyResult) -> None:
    """One case for each further copy in a split, and one for each image of val that is in train too."""
    first = {}
    for split, i, name in members:
        label = indices[split].labels[i]
        if split in first:
            other, other_label = first[split]
            labels = "" if label == other_label else f", with label {label} and {other_label}"
            result.add(split, "duplicates", name, f"the same as {other}{labels}")
        else:
            first[split] = name, label
        if split == "val" and "train" in first:
            result.add("train and val", "leak", name, f"the same as train's {first['train'][0]}")
