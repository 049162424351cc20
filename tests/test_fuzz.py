"""Every parser of files that others may have written, against thousands of damaged ones: it reads them or refuses them in one
line; no other exception, no hang, no memory beyond a bound, nothing written.

IMAGENET_SWA_FUZZ_EXAMPLES is the number of examples per parser (default: what the suite has time for). Counts are printed:
pytest -s tests/test_fuzz.py.
"""

import io
import json
import os
import resource
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save
from scipy.io import savemat
from torch import nn

from imagenet_swa.analysis.captures import RunWeights
from imagenet_swa.analysis.points import read_journals
from imagenet_swa.arguments import parse_config
from imagenet_swa.checkpoint import Checkpoints, Snapshot, load_snapshot, what_is_wrong
from imagenet_swa.config import Config, InputError, ModelConfig, SwaConfig, to_plain
from imagenet_swa.data.imagenet import synsets
from imagenet_swa.data.index import load_index, make_index, save_index
from imagenet_swa.data.index_cache import find_index, read_quarantine
from imagenet_swa.data.prepare.archives import open_origin
from imagenet_swa.data.prepare.journal import FORMAT, Journal
from imagenet_swa.data.prepare.labels import read_labels
from imagenet_swa.data.prepare.units import ShardOutput, Unit
from imagenet_swa.data.sources import Source, scan
from imagenet_swa.models import load_weights, read_weights
from imagenet_swa.plain import parse_json, parse_yaml
from imagenet_swa.report import load_run, table_rows
from imagenet_swa.report.findings import finding_blocks
from imagenet_swa.report.single import write_report
from imagenet_swa.study import load_grid
from imagenet_swa.weight_files import check_finite

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NUM_EXAMPLES = int(os.environ.get("IMAGENET_SWA_FUZZ_EXAMPLES", "40"))
SECONDS = 10  # for one file
SLOW = ("configuration", "run, for reports")  # a fifth of a second each
ROOM = 3 * 2**30  # bytes of addresses beyond those in use
COUNTS: dict[str, Counter[str]] = {}

Read = Callable[[Path], object]
Valid = Callable[[], dict[str, bytes]]


# ---------------------------------------------------------------------------------------------------------- valid files

JPEG = b"\xff\xd8\xff" + bytes(300) + b"\xff\xd9"


def a_tar(members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def some_pth() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": network().state_dict(), "epoch": 3}, buffer)
    return buffer.getvalue()


def some_old_pth() -> bytes:
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def some_capture(**about: Any) -> bytes:
    told = {"network": "x", "step": 2, "epoch": 1, "num_averaged": 1} | about
    return save(network().state_dict(), {"imagenet_swa": json.dumps(told)})


def some_parquet() -> bytes:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([{"bytes": JPEG, "path": f"n{i}.jpg"} for i in range(5)], kind)
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"image": rows, "label": pa.array([0, 1, 2, 0, 1])}), buffer)
    return buffer.getvalue()


def some_predictions() -> bytes:
    buffer = io.BytesIO()
    table = {"index": [0, 1, 2, 3], "label": [0, 1, 2, 3], "top5": [[0, 1, 2, 3, 4]] * 4}
    parquet.write_table(pa.table(table), buffer)
    return buffer.getvalue()


def some_meta() -> bytes:
    buffer, kinds = io.BytesIO(), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(buffer, {"synsets": np.array([(1, synsets()[0], 0), (2, synsets()[1], 0)], dtype=kinds)})
    return buffer.getvalue()


def some_run() -> dict[str, bytes]:
    config = Config(model=ModelConfig(name="resnet50.tv_in1k"), swa=SwaConfig(num_epochs=2, report_epochs=()))
    environment = {
        "data": {split: {"num_images": 4, "fingerprint": 64 * "f"} for split in ("train", "val")},
        **{"versions": {"torch": "2.10"}, "gpus": [], "cpu": "a CPU", "world_size": 1},
    }
    common = {"num_images": 4, "top1": 0.25, "top5": 0.5, "nll": 1.0}
    names = (("pretrained", 0), ("capture", 1), ("capture", 2), ("swa", 2), ("swa_without_pretrained", 2))
    results = [{"name": name, "epoch": epoch, "step": 10 * epoch} | common for name, epoch in names]
    lines = [{"kind": "train", "step": step, "epoch": step / 10, "lr": 0.1, "loss": 1.0} for step in (5, 10, 20)]
    point = dict.fromkeys(("train_loss", "test_error", "norm"), 0.5)
    landscape = {"points": {"swa": point}, "notes": ["a note"], "basis": "w", "widths": None}
    del landscape["widths"]
    return {
        "config.yaml": yaml.safe_dump(to_plain(config)).encode(),
        "environment.json": json.dumps(environment).encode(),
        "results.json": json.dumps(results).encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "predictions/pretrained.parquet": some_predictions(),
        "predictions/swa-epoch-02.parquet": some_predictions(),
        "landscape/line.json": json.dumps(landscape).encode(),
        "ensemble/ensemble.md": b"# a title\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n- one\n- two\n\n![x](y.png)\n",
        "swa.safetensors": some_capture(num_averaged=2, epoch=2, step=4),
        "captures/epoch-01.safetensors": some_capture(),
        "captures/epoch-02.safetensors": some_capture(num_averaged=2, epoch=2, step=4),
        "pretrained.safetensors": some_capture(num_averaged=0),
    }


def some_index() -> dict[str, bytes]:
    path = Path(os.environ["IMAGENET_SWA_FUZZ_FOLDER"]) / "made.arrow"
    index = make_index("/x", [b"a/1.jpg", b"b/2.jpg"], [0, 1], [3, 3], ("a", "b"))
    save_index(index, {"kind": "folder", "folder_times": {"a": 1, "b": 2}}, path)
    return {"train.index.arrow": path.read_bytes(), "train/a/1.jpg": b"123", "train/b/2.jpg": b"123"}


def some_journal() -> dict[str, bytes]:
    unit = vars(Unit(0, "train/train-000000.tar", 3, 3, 30, 30, 10240, digest="d"))
    return {
        "prepare-train.journal": b"".join(
            json.dumps(line).encode() + b"\n" for line in ({"format": FORMAT, "identity": {}}, unit)
        )
    }


def some_checkpoint() -> dict[str, bytes]:
    folder = Path(os.environ["IMAGENET_SWA_FUZZ_FOLDER"]) / "checkpoints"
    progress = {"step": 3, "num_averaged": 1, "world_size": 1, "identity": {"seed": 0}}
    path = Checkpoints(folder, keep=1).save(Snapshot(progress, {"w": torch.ones(2)}, {"w": torch.ones(2)}))
    return {file.name: file.read_bytes() for file in path.iterdir()}


SHARD = {"a/1.jpg": JPEG, "a/1.cls": b"0", "b/2.png": JPEG, "b/2.json": b'{"label": 1}'}
LONG = {f"{'long/' * 40}1.jpg": JPEG, f"{'long/' * 40}1.cls": b"2"}


# ------------------------------------------------------------------------------------------------------------- readers


def read_into_network(path: Path) -> None:
    target = network()
    load_weights(target, read_weights(path), str(path))
    check_finite(target.state_dict(), str(path))


def read_run(folder: Path) -> None:
    table_rows(load_run(folder))
    finding_blocks(folder)
    write_report(folder)


def read_captures(folder: Path) -> None:
    run = RunWeights.load(folder)
    for capture in (*run.captures, *run.captures_before):
        capture.load()


def read_index(folder: Path) -> None:
    load_index(str(folder / "train.index.arrow"), str(folder / "train"))
    find_index(Source("train", str(folder / "train")), None)


def read_origin(path: Path, num_classes: int = 1000) -> None:
    for item in open_origin(str(path), split="train", num_classes=num_classes).items(0):
        assert not item.name.startswith("/")


def read_journal(folder: Path) -> None:
    with Journal(folder, "train") as journal:
        (folder / "train").mkdir(exist_ok=True)
        journal.begin({}, ShardOutput(folder / "train", "train"))


def read_checkpoint(folder: Path) -> None:
    what_is_wrong(folder)
    load_snapshot(folder)


def read_config(path: Path) -> None:
    parse_config(["--config", str(path)], "imagenet-swa train", "")


def read_json_and_yaml(path: Path) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(path.read_bytes().decode("utf-8", "replace"))
        except ValueError as error:
            raise InputError(str(error).replace("\n", " ")) from None


def read_list(folder: Path) -> None:
    index, _ = scan(Source("train", str(folder), str(folder / "train.txt"), missing_ok=True), num_classes=10)
    for number in range(len(index)):
        assert Path(os.path.normpath(index.location(number).path)).is_relative_to(folder)


YAML_GRID = b"base: base.yaml\noutput: runs\nsettings:\n  swa.num_epochs: 4\nruns:\n  a: {swa.lr_max: 0.1}\n  b: {seed: 2}\n"
CONFIG = (
    b"seed: 1\nglobal_batch_size: 64\nmodel:\n  name: resnet50\n  kwargs: {drop_rate: 0.1, sizes: [1, 2]}\nswa: {num_epochs: 4}\n"
)
POINT = {
    "key": "k",
    "name": "n",
    "values": dict.fromkeys(("train_loss", "train_nll", "l2", "train_error", "test_error", "test_nll"), 1.0),
}
TRUTH, META = "devkit/data/ILSVRC2012_validation_ground_truth.txt", "devkit/data/meta.mat"

# Parser: valid files, the one that is damaged ("" : any of them), and the reading (of that file, or of the folder).
PARSERS: dict[str, tuple[Valid, str, Read]] = {
    "safetensors": (lambda: {"w.safetensors": save(network().state_dict())}, "w.safetensors", read_into_network),
    "pth": (lambda: {"w.pth": some_pth()}, "w.pth", read_into_network),
    "pth of old": (lambda: {"w.pth": some_old_pth()}, "w.pth", read_into_network),
    "configuration": (lambda: {"c.yaml": CONFIG}, "c.yaml", read_config),
    "grid": (lambda: {"grid.yaml": YAML_GRID, "base.yaml": CONFIG}, "grid.yaml", load_grid),
    "JSON, YAML": (lambda: {"x.json": json.dumps({"a": [1, {"b": None}], "c": "d"}).encode()}, "x.json", read_json_and_yaml),
    "list": (lambda: {"train.txt": b"a/1.jpg 0\nb c/2.jpg 1\n", "a/1.jpg": b"1"}, "train.txt/..", read_list),
    "quarantine": (lambda: {"q.tsv": b"train\ta/1.jpg\tbad\nval\tb\tc\n"}, "q.tsv", lambda path: read_quarantine(path, "train")),
    "shard": (lambda: {"x.tar": a_tar(SHARD)}, "x.tar", lambda path: scan(Source("train", str(path)), num_classes=10)),
    "shard, GNU": (
        lambda: {"x.tar": a_tar(SHARD | LONG)},
        "x.tar",
        lambda path: scan(Source("train", str(path)), num_classes=10),
    ),
    "shard, pax": (
        lambda: {"x.tar": a_tar(SHARD | LONG, tarfile.PAX_FORMAT)},
        "x.tar",
        lambda path: scan(Source("train", str(path)), num_classes=10),
    ),
    "archive": (lambda: {"x.tar": a_tar({"ant/1.jpg": JPEG, "bee/2.jpg": JPEG})}, "x.tar", partial(read_origin, num_classes=2)),
    "archive of archives": (lambda: {"x.tar": a_tar({f"{synsets()[0]}.tar": a_tar({"1.JPEG": JPEG})})}, "x.tar", read_origin),
    "labels": (
        lambda: {"labels.txt": b"a.jpg 1\nb.jpg n01440764\n"},
        "labels.txt",
        lambda path: read_labels(path, ["a.jpg"], 10),
    ),
    "development kit": (
        lambda: {"kit.tar.gz": a_tar({TRUTH: b"1\n2\n", META: some_meta()})},
        "kit.tar.gz",
        lambda path: read_labels(path, ["a.jpg", "b.jpg"], 1000),
    ),
    "parquet": (lambda: {"x.parquet": some_parquet()}, "x.parquet", read_origin),
    "index": (some_index, "train.index.arrow/..", read_index),
    "journal of prepare": (some_journal, "prepare-train.journal/..", read_journal),
    "journal of points": (
        lambda: {"points-rank-00.jsonl": json.dumps(POINT).encode() + b"\n"},
        "points-rank-00.jsonl/..",
        read_journals,
    ),
    "run, for reports": (some_run, "", read_run),
    "run, for analyses": (some_run, "", read_captures),
    "checkpoint": (some_checkpoint, "", read_checkpoint),
}


# -------------------------------------------------------------------------------------------------------------- damage

NASTY = st.sampled_from([
    *(b"\x00", b"\xff", b"../", b"/etc/passwd", b"\n", b"\x1b[2J"),
    *( b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true"),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff" * 8, b"\x80" + bytes(11), b"&a [*a]", b"!!python/object:os.system "),
    b"<<: ",
    *(b"\\ud800", b"999999999999", b"18446744073709551616", b"0.5", b"[null]", b'{"a": 1}', b"%s", b"$\\frac", b"<script>"),
])  # fmt: skip


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes flipped, cut, spliced, repeated, or what stands between separators replaced."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 5)):
            case 0 if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = draw(NASTY)
            case 3:
                end = draw(st.integers(at, len(data)))
                data[at:at] = data[at:end][: 2**16]
            case 4:
                del data[at : at + draw(st.integers(1, 600))]
            case _:
                _replace_token(data, at, draw(NASTY))
    return bytes(data)


def _replace_token(data: bytearray, at: int, by: bytes) -> None:
    """A value of JSON or YAML, a word or a field, as a whole."""
    ends = b",:{}[]\n\t \0"
    start, end = at, at
    while start > 0 and data[start - 1] not in ends:
        start -= 1
    while end < len(data) and data[end] not in ends:
        end += 1
    data[start:end] = by


@contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """A time limit, and one for memory where a runaway would otherwise take the machine's."""

    def stop(*_: object) -> None:
        pytest.fail(f"it still read after {seconds} s")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("parser", PARSERS)
def test_damaged_files_are_read_or_refused(
    parser: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    """Whatever bytes a file holds, its parser returns or raises an InputError of one line, soon, within bounds of memory, and
    nothing is there afterwards outside the folder it was given.
    """
    place = tmp_path_factory.mktemp("fuzz")
    monkeypatch.setenv("IMAGENET_SWA_FUZZ_FOLDER", str(tmp_path_factory.mktemp("made")))
    make, damaged, read = PARSERS[parser]
    valid, counts, number = make(), COUNTS.setdefault(parser, Counter()), iter(range(10**9))
    victim = write(place / "outside", {"victim": b"untouched"}) / "victim"
    into_folder = not damaged or damaged.endswith("/..")
    chosen = st.sampled_from(sorted(valid)) if not damaged else st.just(damaged.removesuffix("/.."))

    def attempt(name: str, content: bytes) -> None:
        folder = write(place / f"{next(number)}", valid | {name: content})
        try:
            with bounded():
                read(folder if into_folder else folder / name)
            counts["read"] += 1
        except InputError as error:
            counts["refused"] += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
        assert victim.read_bytes() == b"untouched" and [path.name for path in victim.parent.iterdir()] == ["victim"]
        _remove(folder)

    attempt(*next((name, content) for name, content in valid.items() if damaged.removesuffix("/..") in ("", name)))
    assert counts["read"] == 1, "the file that is to be damaged cannot be read itself"
    num_examples = NUM_EXAMPLES // 8 if parser in SLOW else NUM_EXAMPLES

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example),
        phases=(Phase.generate,) if NUM_EXAMPLES > 100 else (Phase.generate, Phase.shrink),
        derandomize=NUM_EXAMPLES <= 100,
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        name = data.draw(chosen)
        attempt(name, data.draw(damage(valid[name])))

    fuzz()
    print(f"{parser}: {counts.total():,} files, {counts['read']:,} read, {counts['refused']:,} refused")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
