"""Files made to harm: no code of theirs runs, nothing is written or read outside their folder, each gets one clear line."""

import hashlib
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import QUICK_RUN, one_line, write
from pyarrow import parquet
from safetensors.torch import save
from test_fuzz import JPEG, a_tar, bounded, network, read_journal, some_capture, some_checkpoint, some_journal, some_run

from imagenet_swa.analysis.captures import RunWeights, check_fits
from imagenet_swa.arguments import parse_config
from imagenet_swa.checkpoint import load_snapshot, what_is_wrong
from imagenet_swa.cli import main
from imagenet_swa.config import InputError, ModelConfig
from imagenet_swa.data.index import load_index, make_index, save_index
from imagenet_swa.data.index_cache import find_index
from imagenet_swa.data.sources import Source, scan
from imagenet_swa.data.storage import ReadError
from imagenet_swa.models import create_network, read_weights
from imagenet_swa.report import load_run
from imagenet_swa.report.findings import finding_blocks
from imagenet_swa.report.single import write_report
from imagenet_swa.study import load_grid

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that hostile code would make."""
    return tmp_path / "canary"


class Runs:
    """Its pickle runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command says as it refuses its input: one line, exit code 2."""
    capsys.readouterr()
    with bounded(60):
        assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("imagenet-swa: error: ")]
    assert len(lines) == 1 and "Traceback" not in said.err
    return lines[0]


# -------------------------------------------------------------------------------------------------------------- weights


def header(about: Any, data: bytes = b"") -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


HOSTILE_SAFETENSORS = {
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "large header": struct.pack("<Q", 90_000_000) + b"{}",
    "no header": b"\x01",
    "nothing": b"",
    "overlapping": header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "beyond the end": header({"a": tensor([2**40], 0, 2**42)}, bytes(8)),
    "overflow": header({"a": tensor([2**62, 2**62], 0, 8)}, bytes(8)),
    "negative": header({"a": tensor([-1], 0, 8)}, bytes(8)),
    "backwards": header({"a": tensor([2], 8, 0)}, bytes(8)),
    "unknown kind": header({"a": tensor([2], 0, 8, "PICKLE")}, bytes(8)),
    "nested": header(b'{"a":' * 50_000, bytes(8)),
    "no mapping": header([1]),
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_safetensors(tmp_path: Path, content: bytes):
    """Headers that lie are refused by name, whatever they claim to need."""
    path = write(tmp_path, {"w.safetensors": content}) / "w.safetensors"
    with bounded():
        assert f"{path} is not a valid safetensors file" in one_line(read_weights, path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("wrapped", ["bare", "zip", "legacy"])
def test_pickles_do_not_run(tmp_path: Path, canary: Path, name: str, wrapped: str, capsys: pytest.CaptureFixture[str]):
    """A pickle that runs a command does not, under whatever name and in whatever of torch's formats it comes."""
    bad = {"w": torch.ones(2), "x": Runs(canary)}
    path = tmp_path / name
    if wrapped == "bare":
        path.write_bytes(pickle.dumps(bad))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=wrapped == "zip")
    assert str(path) in lines_of(capsys, "evaluate", *QUICK_RUN, f"--model.weights={path}")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Runs(canary)))  # the proof that it would have
    assert canary.exists()


def test_compressed_pth_is_not_unpacked(tmp_path: Path):
    """A .pth whose members are compressed, as torch never writes them, could unpack to a thousand times its size."""
    torch.save({"w": torch.zeros(10)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as good, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bad:
        for member in good.namelist():
            bad.writestr(member, good.read(member))
    assert torch.load(tmp_path / "b.pth", weights_only=True)["w"].tolist() == [0] * 10  # torch would unpack it
    assert "is compressed inside" in one_line(read_weights, tmp_path / "b.pth")


def state(**changes: Any) -> dict[str, Any]:
    return OrderedDict(network().state_dict() | changes)


HOSTILE_WEIGHTS = {
    "NaN": (state(**{"0.bias": torch.full((4,), float("nan"))}), "0.bias holds infinite values or NaN"),
    "infinite variance": (state(**{"1.running_var": torch.tensor([1, 1, float("inf"), 1])}), "1.running_var holds infinite"),
    "other shape": (state(**{"0.bias": torch.zeros(5)}), r"0.bias has shape (5,), wanted (4,)"),
    "endless by stride": (state(**{"0.bias": torch.zeros(1).expand(2**50)}), "0.bias has shape"),
    "integers": (state(**{"0.bias": torch.zeros(4, dtype=torch.int64)}), "0.bias is torch.int64, wanted torch.float32"),
    "complex": (state(**{"0.bias": torch.zeros(4, dtype=torch.complex64)}), "0.bias is torch.complex64, wanted"),
    "sparse": (state(**{"0.bias": torch.zeros(4).to_sparse()}), "0.bias is sparse, quantized or without values"),
    "without values": (state(**{"0.bias": torch.zeros(4, device="meta")}), "0.bias is sparse, quantized or without values"),
    "one more": (state(**{"\x1b[2Jmore\n": torch.zeros(4)}), r"1 unexpected (such as \x1b[2Jmore\n)"),
    "no tensor": ({"0.bias": "text"}, "holds no dict of tensors"),
    "a list": ([1, 2], "holds no dict of tensors"),
}


@pytest.mark.parametrize(("weights", "words"), HOSTILE_WEIGHTS.values(), ids=HOSTILE_WEIGHTS)
def test_weights_that_do_not_fit(tmp_path: Path, weights: Any, words: str):
    """Weights of other shapes or kinds, that are no numbers, or that claim to be endless never get into a network."""
    torch.save(weights, tmp_path / "w.pth")
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with bounded():
        message = one_line(lambda: check_fits(target, read_weights(tmp_path / "w.pth"), "the file"))
    assert words in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights"])
def test_networks_take_no_files(canary: Path, name: str):
    """model.kwargs cannot make a library load a file or fetch one."""
    words = one_line(create_network, ModelConfig(name="test_efficientnet", pretrained=False, kwargs={name: str(canary)}))
    assert f"model.kwargs may not set {name}" in words


# ------------------------------------------------------------------------------------------------------- configurations

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
HOSTILE_YAML = {
    "tag": ("model: !!python/object/apply:os.system ['touch CANARY']\n", "could not determine a constructor"),
    "tag of a type": ("seed: !!python/name:os.system\n", "could not determine a constructor"),
    "laughs": (LAUGHS, "aliases stand for too much"),
    "laughs in a setting": (
        "model:\n  kwargs:\n" + LAUGHS.replace("a", "    a", 1).replace("\na", "\n    a"),
        "aliases stand for",
    ),
    "itself": ("model:\n  kwargs: &a {x: *a}\n", "stands for nothing before it"),
    "nested": (f"model: {{kwargs: {'[' * 5000}{']' * 5000}}}\n", "nest"),  # in PyYAML's words, which its versions differ in
    "nested by aliases": (
        "model: {kwargs: {a0: &a0 [1], " + ", ".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 90)) + "}}\n",
        "nested",
    ),
    "twice": ("seed: 1\nseed: 2\n", "line 1 and below: seed is there twice"),
    "zero byte": ('output: "a\\0b"\n', "zero byte"),
    "digits": (f"seed: {'9' * 6000}\n", ""),
    "binary": ("\x01\x02", ""),
    "long": ("# " + "x" * 2**20 + "\n", "more than 1,048,576"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE_YAML.values(), ids=HOSTILE_YAML)
@pytest.mark.parametrize("kind", ["configuration", "section", "grid", "run"])
def test_yaml(tmp_path: Path, canary: Path, text: str, words: str, kind: str, capsys: pytest.CaptureFixture[str]):
    """YAML that names code, grows, turns in circles or says a thing twice is refused wherever YAML is read."""
    path = write(tmp_path, {"config.yaml": text.replace("CANARY", str(canary)).encode()}) / "config.yaml"
    arguments: dict[str, list[str | Path]] = {
        "configuration": ["schedule", tmp_path / "x.png", f"--config={path}"],
        "section": ["schedule", tmp_path / "x.png", "--swa", path],
        "grid": ["study", path],
        "run": ["report", tmp_path],
    }
    message = lines_of(capsys, *arguments[kind])
    if kind == "configuration":
        assert words in message
    assert not canary.exists() and not (tmp_path / "x.png").exists()


def test_settings_build_no_classes(tmp_path: Path, canary: Path):
    """A value that names a class and its arguments stays a value: in a file, a flag, a list, within others."""
    spec = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {canary}", "shell": True}}
    for kwargs in ({"x": spec}, {"x": [spec]}, {"x": {"y": spec}}, spec):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"kwargs": kwargs}}))
        for flag in (
            f"--config={tmp_path / 'c.yaml'}",
            f"--model.kwargs={json.dumps(kwargs)}",
            f"--model={json.dumps({'kwargs': kwargs})}",
        ):
            config = parse_config([flag], "imagenet-swa train", "")
            assert config.model.kwargs == kwargs
    parse_config(["--model.kwargs.x.class_path=subprocess.Popen"], "imagenet-swa train", "")
    assert not canary.exists()


def test_no_configuration_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Folders, devices and files too large to be one are refused at once."""
    for path in (tmp_path, "/dev/zero"):
        assert str(path) in lines_of(capsys, "schedule", tmp_path / "x.png", "--config", path)
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(2**40)
    assert "huge.yaml has more than" in lines_of(capsys, "schedule", tmp_path / "x.png", "--config", tmp_path / "huge.yaml")


def test_grid_values_stay_on_their_line(tmp_path: Path):
    """The launcher reads a flag a line; a value with a line of its own in it would be one more flag."""
    grid = {"base": "base.yaml", "output": "runs", "runs": {"a": {"data.train": "x\n--output=/elsewhere"}}}
    write(tmp_path, {"base.yaml": b"seed: 1\n", "grid.yaml": yaml.safe_dump(grid).encode()})
    assert "is no setting on one line" in one_line(load_grid, tmp_path / "grid.yaml")
    for name in ("../x", "/x", "a/b", "-x", ""):
        write(tmp_path, {"grid.yaml": yaml.safe_dump(grid | {"runs": {name: {}}}).encode()})
        assert "cannot be a folder's name" in one_line(load_grid, tmp_path / "grid.yaml")


# ---------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("entry", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "SECRET", "a/..//../secret.jpg"])
@pytest.mark.parametrize("missing_ok", [False, True])
def test_lists_stay_below_their_root(tmp_path: Path, entry: str, missing_ok: bool):
    """An entry that leads out of the root, by `..` or from /, is refused by name, and nothing of its file is shown."""
    write(tmp_path, {"secret.jpg": b"root:x:0", "root/a/1.jpg": b"1"})
    entry = entry.replace("SECRET", str(tmp_path / "secret.jpg"))
    (tmp_path / "list.txt").write_text(f"a/1.jpg 0\n{entry} 1\n")
    source = Source("train", str(tmp_path / "root"), str(tmp_path / "list.txt"), missing_ok)
    message = one_line(lambda: scan(source, num_classes=10))
    assert f"not below {tmp_path / 'root'}; set data.train to a folder that all its images lie below" in message
    assert "root:x" not in message


def test_lists_may_be_absolute_below_their_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Absolute paths below the root are read, `..` that stays below it too, and with the root / any path."""
    write(tmp_path, {"root/a/1.jpg": b"1"})
    (tmp_path / "list.txt").write_text(f"{tmp_path}/root/a/1.jpg 0\na/../a/1.jpg 1\n")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "root", "root", "root/", "./root"):
        index, _ = scan(Source("train", str(root), str(tmp_path / "list.txt")), num_classes=10)
        assert [index.read(i) for i in range(2)] == [b"1", b"1"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/root/a/1.jpg 0\n")
    assert len(scan(Source("train", "/", str(tmp_path / "list.txt")), num_classes=10)[0]) == 1


def test_pipes_and_devices_are_no_images(tmp_path: Path):
    """A pipe or a device is not waited for: in a list, among class folders, as a shard."""
    write(
        tmp_path,
        {"train/a/1.jpg": JPEG, "list.txt": b"a/pipe.jpg 0\n", "shards/train-1.tar": a_tar({"1.jpg": b"", "1.cls": b"0"})},
    )
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    with bounded():
        source = Source("train", str(tmp_path / "train"), str(tmp_path / "list.txt"))
        assert "names the device or pipe" in one_line(lambda: scan(source, num_classes=10))
        index, _ = scan(Source("train", str(tmp_path / "train")), num_classes=10)
        assert index.read(0) == JPEG
        with pytest.raises(ReadError):
            index.read(1)
        (tmp_path / "shards/train-1.tar").unlink()
        os.mkfifo(tmp_path / "shards/train-1.tar")
        assert "no regular file" in one_line(lambda: scan(Source("train", f"{tmp_path}/shards/train-1.tar"), num_classes=10))


# ---------------------------------------------------------------------------------------------------------- tar, parquet


def raw_tar(*members: tuple[str, bytes, Callable[[tarfile.TarInfo], None]], kind: Any = tarfile.GNU_FORMAT) -> bytes:
    """A tar whose headers say what they like."""
    data = b""
    for name, content, change in members:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        change(member)
        data += member.tobuf(kind, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)
    return data + bytes(1024)


def sized(size: int) -> Callable[[tarfile.TarInfo], None]:
    return lambda member: setattr(member, "size", size)


def typed(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname = kind, target

    return change


HOSTILE_TARS = {
    "out of the folder": raw_tar(("../../out.jpg", JPEG, sized(len(JPEG)))),
    "out, deep": raw_tar(("a/../../../out.jpg", JPEG, sized(len(JPEG)))),
    "absolute": raw_tar(("/PLACE/out.jpg", JPEG, sized(len(JPEG)))),
    "escape codes": raw_tar(("a/\x1b[2Jx.jpg", JPEG, sized(len(JPEG)))),
    "symbolic link": raw_tar(("a/1.jpg", b"", typed(tarfile.SYMTYPE, "/etc/passwd"))),
    "hard link": raw_tar(("a/1.jpg", b"", typed(tarfile.LNKTYPE, "../../etc/passwd"))),
    "device": raw_tar(("a/1.jpg", b"", typed(tarfile.CHRTYPE))),
    "pipe": raw_tar(("a/1.jpg", b"", typed(tarfile.FIFOTYPE))),
    "negative size": raw_tar(("a/1.jpg", b"", sized(-1024)), ("a/1.cls", b"0", sized(1))),
    "circle": raw_tar(("a/0.jpg", b"", sized(0)), ("a/1.txt", b"", sized(-512))),
    "huge size": raw_tar(("a/1.jpg", b"1", sized(2**60))),
    "huge label": raw_tar(("a/1.jpg", b"1", sized(1)), ("a/1.cls", b"0", sized(2**50))),
    "huge long name": raw_tar(("././@LongLink", b"x", lambda m: (setattr(m, "size", 2**50), setattr(m, "type", b"L"))[0])),
    "huge pax": raw_tar(("pax", b"x", lambda m: (setattr(m, "size", 2**50), setattr(m, "type", b"x"))[0])),
    "pax without end": raw_tar(*[("pax", b"12 path=abc\n", typed(b"x"))] * 3000),
    "pax of a negative size": raw_tar(("pax", b"14 size=-4096\n", typed(b"x")), ("a/1.jpg", b"", sized(0))),
    "pax of letters": raw_tar(("pax", b"zz path=abc\n", typed(b"x")), ("a/1.jpg", b"", sized(0))),
    "sparse": raw_tar(
        ("pax", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", typed(b"x")), ("a/1.jpg", b"99999999\n", sized(9))
    ),
    "nested label": raw_tar(("a/1.jpg", JPEG, sized(len(JPEG))), ("a/1.json", b"[" * 99_999, sized(99_999))),
    "nothing": b"",
    "zeros": bytes(10240),
}


@pytest.mark.parametrize("content", HOSTILE_TARS.values(), ids=HOSTILE_TARS)
@pytest.mark.parametrize("how", ["shards", "folder", "read"])
def test_tar(tmp_path: Path, content: bytes, how: str, capsys: pytest.CaptureFixture[str]):
    """Names, links and headers made to harm: a tar is refused in one line, and no file appears anywhere else."""
    path = write(tmp_path / "in" / "deep", {"train.tar": content.replace(b"/PLACE", str(tmp_path).encode()[:6])}) / "train.tar"
    out = tmp_path / "out" / "deep"
    if how == "read":
        try:
            with bounded():
                scan(Source("train", str(path)), num_classes=10)
        except InputError as error:
            assert "\n" not in str(error)
    else:
        arguments = ("prepare", path, out, "--num_classes=1", f"--format={how}", "--num_workers=0")
        lines_of(capsys, *arguments)
    places = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert places <= {"in/deep/train.tar", "out/deep/prepare-train.journal", "out/deep/train.txt.partial"}


@pytest.mark.parametrize(
    "name", ["../../out.jpg", "/tmp/out.jpg", "a/../../out.jpg", "x\x1b[2J.jpg", "n" * 300 + ".jpg", "a.jpg/b.jpg"]
)
def test_parquet_names(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    """The path beside an image in a parquet file never leads a copy out of the output."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([{"bytes": JPEG, "path": "a.jpg"}, {"bytes": JPEG, "path": name}], kind)
    parquet.write_table(pa.table({"image": rows, "label": pa.array([0, 0])}), tmp_path / "x.parquet")
    before = set(Path("/tmp").glob("out.jpg"))
    arguments = ["prepare", str(tmp_path / "x.parquet"), str(tmp_path / "o" / "p"), "--num_classes=1", "--format=folder"]
    assert main([*arguments, "--num_workers=0"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    written = list(tmp_path.rglob("*.jpg"))
    assert all(path.is_relative_to(tmp_path / "o" / "p" / "train") for path in written)
    assert set(Path("/tmp").glob("out.jpg")) == before


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (pa.array([{"bytes": 1, "path": "a.jpg"}]), pa.array([0])),
        (pa.array([{"bytes": JPEG, "path": 5}]), pa.array([0])),
        (pa.array([[1]]), pa.array([0])),
        (pa.array([{"bytes": JPEG, "path": "a.jpg"}]), pa.array(["0"])),
        (
            pa.array([{"bytes": None, "path": "/etc/passwd"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            pa.array([0]),
        ),
    ],
)
def test_parquet_kinds(tmp_path: Path, image: pa.Array, label: pa.Array, capsys: pytest.CaptureFixture[str]):
    """Columns of other kinds, and a path without bytes, which nothing then reads, are refused."""
    parquet.write_table(pa.table({"image": image, "label": label}), tmp_path / "x.parquet")
    lines_of(capsys, "prepare", tmp_path / "x.parquet", tmp_path / "out", "--num_classes=1", "--num_workers=0")


# ------------------------------------------------------------------------------------------------------ indices, journals


@pytest.mark.parametrize(
    ("names", "labels", "sizes", "state"),
    [
        ([b"../secret"], [0], [1], {}),
        ([b"/etc/passwd"], [0], [1], {}),
        ([b"a\0b"], [0], [1], {}),
        ([b"a"], [-1], [1], {}),
        ([b"a"], [0], [-5], {}),
        ([b"a"], [0], [1], {"kind": "folder"}),
        ([b"a"], [0], [1], {"kind": "folder", "folder_times": 3}),
        ([b"a"], [0], [1], []),
        ([b"a"], [0], [1], {"kind": 1}),
    ],
)
def test_index(tmp_path: Path, names: list[bytes], labels: list[int], sizes: list[int], state: Any):
    """An index that has its fingerprint may still be made to harm: names that lead out and impossible numbers are refused."""
    write(tmp_path, {"train/a/1.jpg": b"1"})
    save_index(make_index("/x", names, labels, sizes, ("a",)), state, tmp_path / "train.index.arrow")
    message = one_line(find_index, Source("train", str(tmp_path / "train")), None)
    assert "build it again" in message or "build the index again" in message


def test_index_of_shards(tmp_path: Path):
    """Shards outside the root, and images in shards that there are not, are refused."""
    for shards, number in ((("../x.tar",), 0), (("x.tar",), 7)):
        places = {"shards": shards, "shard_numbers": np.array([number], np.int32), "offsets": np.array([0], np.int64)}
        save_index(make_index("/x", [b"a"], [0], [1], None, **places), {"kind": "shards"}, tmp_path / "i.arrow")
        assert "is damaged" in one_line(load_index, str(tmp_path / "i.arrow"), str(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"file": "../../x.tar"}, {"file": "/x.tar"}, {"num_images": -1}, {"num_file_bytes": 2**70}, {"x": 1}]
)
def test_journal_of_prepare(tmp_path: Path, changes: dict[str, Any]):
    """A journal cannot make `prepare` look for, cut or trust files elsewhere."""
    first, unit = some_journal()["prepare-train.journal"].splitlines()
    unit = json.dumps(json.loads(unit) | changes).encode()
    write(tmp_path, {"prepare-train.journal": first + b"\n" + unit + b"\n"})
    assert "is damaged in line 2" in one_line(read_journal, tmp_path)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def sealed(folder: Path, files: dict[str, bytes], manifest: Callable[[dict[str, str]], Any] = lambda digests: digests) -> Path:
    """A checkpoint whose manifest agrees with what it holds."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return write(folder, files | {"manifest.json": json.dumps(manifest(digests)).encode()})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A checkpoint's, but for its manifest."""
    monkeypatch.setenv("IMAGENET_SWA_FUZZ_FOLDER", str(tmp_path / "made"))
    return {name: content for name, content in some_checkpoint().items() if name != "manifest.json"}


def test_checkpoint_is_read(tmp_path: Path, files: dict[str, bytes]):
    """The checkpoint that the others are made of is a good one."""
    assert what_is_wrong(sealed(tmp_path / "c", files)) is None
    assert load_snapshot(tmp_path / "c").progress["step"] == 3


@pytest.mark.parametrize("name", ["../../key", "/etc/passwd", "x" * 10_000, "\0"])
def test_manifest_names_no_other_files(tmp_path: Path, files: dict[str, bytes], name: str):
    """A manifest that lists files elsewhere is refused before they are looked at."""
    path = sealed(tmp_path / "c" / "c", files, lambda digests: digests | {name: "0" * 64})
    assert what_is_wrong(path) == "its manifest.json is missing or damaged"
    assert name not in one_line(load_snapshot, path)


NAN = save({"w": torch.tensor([1, float("nan")])})
HOSTILE_CHECKPOINTS = {
    "NaN weights": ({"weights.safetensors": NAN}, "holds w with infinite or NaN values"),
    "NaN momentum": ({"momentum.safetensors": NAN}, "holds w with infinite or NaN values"),
    "NaN average": ({"average.safetensors": NAN}, "holds w with infinite or NaN values"),
    "NaN statistics": ({"statistics.safetensors": NAN}, "holds w with infinite or NaN values"),
    "pickle": ({"weights.safetensors": pickle.dumps({"w": 1})}, "cannot be read"),
    "nested": ({"progress.json": b"[" * 200_000}, "cannot be read"),
    "no progress": ({"progress.json": b"[1]"}, "another version"),
    "no step": ({"progress.json": b'{"format": 2, "identity": {}}'}, "does not say of which run and step"),
    "no identity": ({"progress.json": b'{"format": 2, "step": 3, "identity": 1}'}, "does not say of which run and step"),
}


@pytest.mark.parametrize(("changes", "words"), HOSTILE_CHECKPOINTS.values(), ids=HOSTILE_CHECKPOINTS)
def test_checkpoint(tmp_path: Path, files: dict[str, bytes], changes: dict[str, bytes], words: str):
    """A checkpoint whose digests are right may still be made to harm: it is refused in one line."""
    path = sealed(tmp_path / "c", files | changes)
    assert what_is_wrong(path) is None
    assert words in one_line(load_snapshot, path)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that its report reads."""
    return write(tmp_path / "run", some_run())


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    content = load(path.read_text())
    path.write_text(dump(edit(content) or content))


def setting(*keys: str | int, value: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


HOSTILE_RUNS = {
    "name of a result": ("results.json", setting(0, "name", value="../../x")),
    "epoch as a format": ("results.json", setting(0, "epoch", value="%n")),
    "endless epoch": ("results.json", setting(0, "epoch", value=float("inf"))),
    "top-1 that is none": ("results.json", setting(0, "top1", value=float("nan"))),
    "results of numbers": ("results.json", lambda _: [1]),
    "epochs": ("config.yaml", setting("swa", "num_epochs", value="10")),
    "rate": ("config.yaml", setting("swa", "lr_max", value=float("nan"))),
    "name": ("config.yaml", setting("model", "name", value=["x"])),
    "no sections": ("config.yaml", setting("swa", value=[1])),
    "data": ("environment.json", setting("data", value={"train": 1, "val": 2})),
    "versions": ("environment.json", setting("versions", value=[1])),
}


@pytest.mark.parametrize(("file", "edit"), HOSTILE_RUNS.values(), ids=HOSTILE_RUNS)
def test_run_files(run: Path, file: str, edit: Callable[[Any], Any]):
    """What no run writes is refused with its file's name before anything is made of it."""
    change(run / file, edit)
    assert str(run / file) in one_line(load_run, run)


@pytest.mark.parametrize("file", ["results.json", "environment.json", "config.yaml", "metrics.jsonl"])
def test_deep_huge_or_endless_run_files(run: Path, file: str):
    """Nesting without end, a pipe, and a file of a terabyte end in one line each; a line of metrics is left out."""
    (run / file).write_bytes(b"[" * 200_000)
    with bounded():
        if file == "metrics.jsonl":
            assert load_run(run).metrics == []
        else:
            one_line(load_run, run)
        with (run / file).open("wb") as sparse:
            sparse.truncate(2**40)
        assert "more than" in one_line(load_run, run)
        (run / file).unlink()
        os.mkfifo(run / file)
        if file != "metrics.jsonl":
            assert "no regular file" in one_line(load_run, run)


def test_a_step_of_a_line_takes_no_memory(run: Path):
    """A step of 10^15 in metrics.jsonl is drawn with as many points as any other."""
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1000000000000000, "epoch": 1}\n')
    with bounded(60):
        write_report(run)


def test_reports_show_text_as_text(run: Path):
    """Names from a run become neither tags nor links nor formulas in its report."""
    evil = 'resnet50<script>alert(1)</script>[x](javascript:1)$\\frac"\n# b'
    change(run / "config.yaml", setting("model", "name", value=evil))
    (run / "ensemble" / "ensemble.md").write_text("<script>alert(2)</script>\n\n- [x](javascript:2)\n\n![<b>](http://x/y.png)\n")
    write_report(run)
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "alert(1)" in page and "<script" not in page and "<b>" not in page
    assert "alert(2)" in text and "<script" not in text and "](javascript" not in text and "\n# b" not in text


def test_reports_hold_no_other_files(run: Path, tmp_path: Path):
    """Pictures of a run's texts are taken from its own folder alone, by name and by link, and only if they are pictures."""
    picture = b"\x89PNG\r\n\x1a\n" + b"secret"
    write(tmp_path, {"key": b"secret", "other.png": picture, "run/ensemble/text.png": b"secret", "run/ensemble/own.png": picture})
    (run / "ensemble" / "link.png").symlink_to(tmp_path / "other.png")
    (run / "landscape" / "line.png").symlink_to(tmp_path / "other.png")
    names = ("../../key", "../../other.png", str(tmp_path / "key"), "link.png", "text.png", "own.png")
    (run / "ensemble" / "ensemble.md").write_text("\n\n".join(f"![x]({name})" for name in names))
    shown = [block.path for block in finding_blocks(run) if hasattr(block, "path")]  # pyright: ignore[reportAttributeAccessIssue]
    assert shown == [run / "ensemble" / "own.png"]


def test_reports_do_not_write_through_links(run: Path, tmp_path: Path):
    """Links that lie where a report writes are replaced, what they point at stays."""
    write(tmp_path, {"victim": b"untouched"})
    for name in ("report.html", "report.md", "report.json", "trajectory.png"):
        (run / name).symlink_to(tmp_path / "victim")
        (run / f"{name}.partial").symlink_to(tmp_path / "victim")
    write_report(run)
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert not any((run / name).is_symlink() for name in ("report.html", "trajectory.png"))


@pytest.mark.parametrize(
    "about",
    [{"num_averaged": 10**12}, {"num_averaged": "1"}, {"num_averaged": -1}, {"epoch": None}, {"step": 1.5}, {"epoch": [[]]}],
)
def test_captures(run: Path, about: dict[str, Any]):
    """What a capture says of itself is checked before anything is counted by it."""
    (run / "swa.safetensors").write_bytes(some_capture(**about))
    with bounded():
        assert "swa.safetensors is not a capture of a run" in one_line(RunWeights.load, run)


def test_captures_nested(run: Path):
    """Metadata nested without end is refused."""
    (run / "swa.safetensors").write_bytes(save(network().state_dict(), {"imagenet_swa": "[" * 200_000}))
    assert "swa.safetensors is not a capture of a run" in one_line(RunWeights.load, run)


def test_predictions(run: Path):
    """Predictions of other kinds, or with an image twice, give a report that says so."""
    for table in (
        {"index": [0, 0, 1, 2], "label": [0] * 4, "top5": [[0]] * 4},
        {"index": ["a"] * 4, "label": [0] * 4, "top5": [[0]] * 4},
        {"index": [0, 1, 2, 3], "label": [None] * 4, "top5": [["x"]] * 4},
        {"index": [0, 1, 2, 3], "label": [0] * 4, "top5": [[]] * 4},
    ):
        parquet.write_table(pa.table(table), run / "predictions" / "swa-epoch-02.parquet")
        write_report(run)
        assert "No comparison image by image" in (run / "report.md").read_text()
