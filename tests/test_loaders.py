"""Which loader a configuration gets, and what is said where it cannot have one; the made-up images."""

import io
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import preprocessing, run
from PIL import Image

from imagenet_swa.config import Config, DataConfig, InputError, ModelConfig, SpeedConfig
from imagenet_swa.data import dali, imagenet, loaders, resize
from imagenet_swa.data.batch import BadImageError, TooManyBadImagesError
from imagenet_swa.data.dali import DaliLoader
from imagenet_swa.data.index_cache import build_index
from imagenet_swa.data.loaders import build_indices, build_loaders
from imagenet_swa.data.sources import source_of
from imagenet_swa.data.synthetic import POOL_SIZE, SyntheticLoader, synthetic_index
from imagenet_swa.data.torch_loader import TorchvisionLoader
from imagenet_swa.runtime import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
THREE_CLASSES = ModelConfig(num_classes=3)


def runtime_on(device: torch.device = CPU, *, local_world_size: int = 1) -> Runtime:
    return Runtime(
        accelerator=cast("Any", None),
        rank=0,
        local_rank=0,
        world_size=local_world_size,
        local_world_size=local_world_size,
        device=device,
    )


@pytest.fixture
def config(image_folder: Path) -> Config:
    """Three classes, read from the folders of `image_folder`."""
    return Config(model=THREE_CLASSES, data=DataConfig(train=str(image_folder / "train"), val=str(image_folder / "val")))


def with_data(config: Config, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, **changes))


@pytest.fixture
def asked_of_dali(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that every DaliLoader of this test is built with; none is really built."""
    asked: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, index: Any, _: Any, **arguments: Any) -> None:
            asked.append({"index": index, **arguments})

    monkeypatch.setattr(dali, "DaliLoader", Recorder)
    return asked


# ------------------------------------------------------------------------------------------------------- which images


def test_folders_give_both_splits(config: Config) -> None:
    """Class folders become 24 training and 12 validation images with the labels of the folders' alphabetical order."""
    train, val = build_indices(config)
    assert (len(train), len(val)) == (24, 12)
    assert train.classes == val.classes == ("ant", "bee", "cat")
    for index in (train, val):
        for i in range(len(index)):
            assert Path(index.path(i)).is_file()
            assert Path(index.path(i)).parent.name == ("ant", "bee", "cat")[index.labels[i]]


def test_lists_give_their_own_labels(config: Config, image_folder: Path, tmp_path: Path) -> None:
    """A list's labels are taken as they stand, for one split or for both, and class folders are then not counted."""
    val_list = tmp_path / "val.txt"
    val_list.write_text("cat/0.JPEG 901\nant/1.JPEG 7\n")
    config = replace(with_data(config, val_list=str(val_list)), model=ModelConfig(num_classes=1000))
    with pytest.raises(InputError, match="3 class folders, but the network has 1000 outputs"):
        build_indices(config)  # the training folders are still numbered
    train_list = tmp_path / "train.txt"
    train_list.write_text("bee/3.JPEG 5\n")
    train, val = build_indices(with_data(config, train_list=str(train_list)))
    assert (train.labels.tolist(), val.labels.tolist()) == ([5], [901, 7])
    assert [val.path(i) for i in range(2)] == [str(image_folder / "val" / name) for name in ("cat/0.JPEG", "ant/1.JPEG")]


def test_made_up_images_need_no_data() -> None:
    """Synthetic data is there without any folder, in the numbers and with the classes that were asked for."""
    config = Config(model=THREE_CLASSES, data=DataConfig(synthetic=True, synthetic_num_images=(20, 7)))
    train, val = build_indices(config)
    assert (len(train), len(val)) == (20, 7)
    assert train.labels.tolist() == [i % 3 for i in range(20)]
    assert train.fingerprint != val.fingerprint
    built = build_loaders(config, (train, val), preprocessing(), runtime_on())
    assert isinstance(built.train, SyntheticLoader) and isinstance(built.val, SyntheticLoader)
    assert built.train.index is train and built.val.index is val


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_not_set(config: Config, split: str) -> None:
    """Without a folder the error names the setting and both ways out."""
    with pytest.raises(InputError, match=f"data.{split} is not set: pass --data.{split} FOLDER, or --data.synthetic"):
        build_indices(with_data(config, **{split: None}))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_that_is_not_there(config: Config, tmp_path: Path, split: str) -> None:
    """A folder that does not exist is named."""
    with pytest.raises(InputError, match=f"no such folder: {tmp_path}/nowhere"):
        build_indices(with_data(config, **{split: str(tmp_path / "nowhere")}))


def test_splits_with_different_classes(config: Config, image_folder: Path, tmp_path: Path) -> None:
    """Training and validation folders that do not match are refused, since their names give the labels."""
    shutil.copytree(image_folder / "val" / "ant", tmp_path / "ant")
    shutil.copytree(image_folder / "val" / "bee", tmp_path / "bee")
    shutil.copytree(image_folder / "val" / "cat", tmp_path / "cow")
    with pytest.raises(InputError, match="different class folders, such as 'cat'"):
        build_indices(with_data(config, val=str(tmp_path)))


def a_subset_of_imagenet(root: Path) -> Path:
    for name in imagenet.synsets()[::400]:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(root / name / "0.JPEG")
    return root


def test_a_subset_of_imagenet_is_refused_by_the_command(tmp_path: Path) -> None:
    """Three of ImageNet's class folders and a network of 1000 outputs: exit code 2 and one line with the way out."""
    folder = a_subset_of_imagenet(tmp_path / "images")
    flags = [f"--data.train={folder}", f"--data.val={folder}", "--model.name=resnet18", "--model.pretrained=false"]
    done = run(["imagenet-swa", "evaluate", *flags, f"--output={tmp_path / 'run'}"])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "3 class folders, a subset of ImageNet's 1000, but the network has 1000 outputs" in line
    assert "data.train_list" in line and "model.num_classes" in line
    assert done.stdout == "" and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ shards, kept indices, quarantine


def write_shards(folder: Path, images: Path, *, label: int | None = None) -> str:
    """Two tar shards of a folder of class folders, and the pattern that names them."""
    paths = sorted(images.rglob("*.JPEG"))
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in paths[shard::2]:
                number = ("ant", "bee", "cat").index(path.parent.name) if label is None else label
                key = f"{path.parent.name}-{path.stem}"
                for extension, content in (("jpg", path.read_bytes()), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{0..1}}.tar"


def test_shards_beside_folders(config: Config, image_folder: Path, tmp_path: Path) -> None:
    """One split may be shards and the other folders; a shard's labels are those of its members."""
    train, val = build_indices(with_data(config, val=write_shards(tmp_path, image_folder / "val")))
    assert (len(train), len(val)) == (24, 12) and val.classes is None
    for i in range(12):
        member = val.path(i).rpartition(":")[2]
        assert ("ant", "bee", "cat")[val.labels[i]] == member.partition("-")[0]
        name = member.removesuffix(".jpg").replace("-", "/")
        assert val.read(i) == (image_folder / "val" / f"{name}.JPEG").read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_of_shards_that_the_network_does_not_have(config: Config, image_folder: Path, tmp_path: Path, split: str) -> None:
    """A label beyond the network's outputs is refused, with the member that has it."""
    pattern = write_shards(tmp_path, image_folder / "val", label=3)
    with pytest.raises(InputError, match=rf"data\.{split}: .*\.tar:ant-0\.jpg has label 3, not in 0\.\.2 \(model\.num_classes\)"):
        build_indices(with_data(config, **{split: pattern}))


@pytest.fixture
def copied(config: Config, image_folder: Path, tmp_path: Path) -> Config:
    """The same on a copy of the images, with a folder of its own for indices."""
    shutil.copytree(image_folder, tmp_path / "images")
    folders = {split: str(tmp_path / "images" / split) for split in ("train", "val")}
    (tmp_path / "kept").mkdir()
    return with_data(config, **folders, index=tmp_path / "kept")


def test_a_kept_index_is_used(copied: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `imagenet-swa index` left an index, no file is looked for; the images are the same."""
    scanned = build_indices(copied)
    for split in loaders.SPLITS:
        build_index(source_of(copied.data, split), copied.data.index, num_classes=3)
    monkeypatch.setattr(loaders, "scan", lambda *_, **__: pytest.fail("read the data again"))
    found = build_indices(copied)
    assert [index.fingerprint for index in found] == [index.fingerprint for index in scanned]
    assert [found[1].path(i) for i in range(12)] == [scanned[1].path(i) for i in range(12)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stale_index_is_refused(copied: Config, split: str) -> None:
    """An index that is older than a change of the data is refused, with the file that came or went and the way out."""
    build_index(source_of(copied.data, split), copied.data.index, num_classes=3)
    Path(str(getattr(copied.data, split)), "bee", "1.JPEG").rename(Path(str(getattr(copied.data, split)), "bee", "9.JPEG"))
    with pytest.raises(InputError, match=r"older than the data: .*bee/[19]\.JPEG.*imagenet-swa index --rebuild") as error:
        build_indices(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept_index", [True, False])
def test_quarantine_takes_images_out(copied: Config, tmp_path: Path, kept_index: bool) -> None:
    """Images in quarantine are not in their split, in the other they are; the rest keeps order and labels."""
    before = build_indices(copied)
    if kept_index:
        build_index(source_of(copied.data, "train"), copied.data.index, num_classes=3)
    quarantine = tmp_path / "bad.tsv"
    quarantine.write_text("# bad\ntrain\tbee/3.JPEG\tcut short\nval\tant/0.JPEG\tempty\nval\tant/7.JPEG\tof the other split\n")
    train, val = build_indices(with_data(copied, quarantine=quarantine))
    for index, whole, gone in ((train, before[0], "bee/3.JPEG"), (val, before[1], "ant/0.JPEG")):
        wanted = [(whole.name(i), whole.labels[i]) for i in range(len(whole)) if whole.name(i) != gone]
        assert [(index.name(i), index.labels[i]) for i in range(len(index))] == wanted and len(wanted) == len(whole) - 1


def test_quarantine_of_everything(copied: Config, tmp_path: Path) -> None:
    """A list that leaves nothing of a split is refused by name."""
    quarantine = tmp_path / "bad.tsv"
    val = build_indices(copied)[1]
    quarantine.write_text("".join(f"val\t{val.name(i)}\tbad\n" for i in range(len(val))))
    with pytest.raises(InputError, match=r"bad\.tsv leaves no image of data\.val"):
        build_indices(with_data(copied, quarantine=quarantine))


# ------------------------------------------------------------------------------------------------------ which backend


@pytest.mark.parametrize(
    "asked_for,compiler,wanted",
    [("auto", True, True), ("auto", False, False), ("compiled", True, True), ("dali", True, False), ("dali", False, False)],
)
def test_who_resizes(
    config: Config,
    asked_of_dali: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    asked_for: str,
    compiler: bool,
    wanted: bool,
) -> None:
    """auto takes the compiled resize where it was built; dali never does."""
    monkeypatch.setattr(resize, "available", lambda: compiler)
    config = with_data(config, resize=asked_for)
    build_loaders(config, build_indices(config), preprocessing(), runtime_on())
    assert [asked["compiled_resize"] for asked in asked_of_dali] == [wanted] * 2


def test_a_compiled_resize_that_was_not_built(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """resize compiled without the compiled part is refused, with both ways out."""
    monkeypatch.setattr(resize, "available", lambda: False)
    config = with_data(config, resize="compiled")
    with pytest.raises(InputError, match=r"data\.resize is compiled.*install a C compiler.*set data\.resize to auto"):
        build_loaders(config, build_indices(config), preprocessing(), runtime_on())


def test_the_decoder_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader says who makes its pixels, since others make slightly other ones."""
    names = {}
    for compiler in (True, False):
        monkeypatch.setattr(resize, "available", lambda compiler=compiler: compiler)
        names[compiler] = build_loaders(config, build_indices(config), preprocessing(), runtime_on()).val.decoder
    assert names == {True: "DALI on the CPU, compiled resize", False: "DALI on the CPU"}
    chosen = with_data(config, backend="torchvision")
    assert "PIL" in build_loaders(chosen, build_indices(chosen), preprocessing(), runtime_on()).val.decoder


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_bad_images_go_where_the_configuration_says(copied: Config, tmp_path: Path, backend: str) -> None:
    """Policy, limit, split and log arrive in the loaders of both splits."""
    for split, name in (("train", "ant/0.JPEG"), ("val", "cat/2.JPEG")):
        (tmp_path / "images" / split / name).write_bytes(b"no picture")
    output = tmp_path / "run"
    output.mkdir()
    config = replace(with_data(copied, backend=backend, num_workers=0, on_bad_image="skip", max_bad_images=1), output=output)
    indices = build_indices(config)
    built = build_loaders(config, indices, preprocessing(), runtime_on())
    (batch,) = built.train.training_stream([np.arange(24)], epoch=0)
    assert batch.left_out == (0,) and len(batch.images) == 23
    (batch,) = built.val.evaluation_stream([np.arange(12)])
    assert batch.left_out == (10,) and len(batch.images) == 11
    log = output / "bad-images-rank-0.tsv"
    assert [line.split("\t")[:2] for line in log.read_text().splitlines()] == [["train", "ant/0.JPEG"], ["val", "cat/2.JPEG"]]
    cleaned = build_indices(with_data(config, quarantine=log))
    assert [len(index) for index in cleaned] == [23, 11]
    (tmp_path / "images" / "val" / "bee" / "1.JPEG").write_bytes(b"")
    with pytest.raises(TooManyBadImagesError, match=r"2 images cannot be decoded.*cat/2\.JPEG"):
        list(built.val.evaluation_stream([np.arange(12)]))


def test_dali_unless_told_otherwise(config: Config) -> None:
    """DALI decodes by default, torchvision on demand, and each split's loader has that split's images."""
    indices = build_indices(config)
    for backend, kind in ((None, DaliLoader), ("dali", DaliLoader), ("torchvision", TorchvisionLoader)):
        chosen = config if backend is None else with_data(config, backend=backend)
        built = build_loaders(chosen, indices, preprocessing(), runtime_on())
        assert type(built.train) is type(built.val) is kind
        assert built.train.index is indices[0] and built.val.index is indices[1]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("data", [{"backend": "dali"}, {"backend": "torchvision", "num_workers": 0}, {"synthetic": True}])
def test_seed_and_memory_order_arrive(config: Config, data: dict[str, Any], channels_last: bool) -> None:
    """Every backend shows other pixels under another seed, the same under the same, in the configured memory order."""
    config = replace(with_data(config, **data), speed=SpeedConfig(channels_last=channels_last))
    shown = []
    for seed in (0, 0, 1):
        seeded = replace(config, seed=seed)
        loader = build_loaders(seeded, build_indices(seeded), preprocessing(), runtime_on()).train
        shown.append(next(iter(loader.training_stream([np.arange(4)], epoch=0))).images)
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])
    assert shown[0].is_contiguous(memory_format=torch.channels_last) is channels_last
    assert shown[0].is_contiguous() is not channels_last


@pytest.mark.parametrize(
    "num_cpus,local_world_size,asked_for,wanted",
    [(8, 1, None, 8), (8, 4, None, 2), (9, 2, None, 4), (2, 4, None, 1), (8, 4, 3, 3), (8, 1, 0, 0)],
)
def test_number_of_workers(
    config: Config,
    asked_of_dali: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    num_cpus: int,
    local_world_size: int,
    asked_for: int | None,
    wanted: int,
) -> None:
    """Each of a machine's processes takes an equal share of its cores, at least one, unless a number is given."""
    monkeypatch.setattr(loaders, "num_cpus", lambda: num_cpus)
    config = with_data(config, num_workers=asked_for, prefetch=3)
    build_loaders(config, build_indices(config), preprocessing(), runtime_on(local_world_size=local_world_size))
    assert [asked["num_threads"] for asked in asked_of_dali] == [wanted] * 2
    assert [asked["prefetch"] for asked in asked_of_dali] == [3] * 2


def test_no_workers_at_all_will_do(config: Config) -> None:
    """With num_workers 0 both backends decode in the training process."""
    for backend in ("dali", "torchvision"):
        chosen = with_data(config, num_workers=0, backend=backend)
        loader = build_loaders(chosen, build_indices(chosen), preprocessing(), runtime_on()).val
        assert len(list(loader.evaluation_stream([np.arange(4), np.arange(4, 12)]))) == 2


@pytest.mark.parametrize(
    "device,decode,wanted",
    [(CPU, "auto", False), (CPU, "cpu", False), (GPU, "auto", True), (GPU, "gpu", True), (GPU, "cpu", False)],
)
def test_where_dali_decodes(
    config: Config, asked_of_dali: list[dict[str, Any]], device: torch.device, decode: str, wanted: bool
) -> None:
    """auto decodes where the process computes; cpu always on the CPU."""
    config = with_data(config, decode=decode)
    build_loaders(config, build_indices(config), preprocessing(), runtime_on(device))
    assert [(asked["decode_on_gpu"], asked["device"]) for asked in asked_of_dali] == [(wanted, device)] * 2


def test_decoding_on_a_gpu_that_is_not_there(config: Config) -> None:
    """decode gpu without a GPU is refused, with the way out."""
    config = with_data(config, decode="gpu")
    with pytest.raises(InputError, match=r"data\.decode is gpu, but no GPU was found; set it to auto or cpu"):
        build_loaders(config, build_indices(config), preprocessing(), runtime_on())


def test_only_dali_decodes_on_the_gpu(config: Config) -> None:
    """decode gpu with the torchvision backend is refused rather than ignored."""
    config = with_data(config, decode="gpu", backend="torchvision")
    with pytest.raises(InputError, match=r"data\.decode is gpu, but only DALI decodes there"):
        build_loaders(config, build_indices(config), preprocessing(), runtime_on())


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for module in ("imagenet_swa.data.dali", "imagenet_swa.data.dali_pipeline"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_torchvision_and_made_up_images_need_no_dali(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DALI installed the other two loaders work."""
    without_dali(monkeypatch)
    for changes in ({"backend": "torchvision", "num_workers": 0}, {"synthetic": True}):
        chosen = with_data(config, **changes)
        loader = build_loaders(chosen, build_indices(chosen), preprocessing(), runtime_on()).val
        assert len(next(iter(loader.evaluation_stream([np.arange(4)]))).images) == 4


@pytest.mark.parametrize("cuda,extra", [("12.8", "dali-cuda12"), ("13.0", "dali-cuda13"), (None, "dali-cuda13")])
def test_dali_is_not_installed(config: Config, monkeypatch: pytest.MonkeyPatch, cuda: str | None, extra: str) -> None:
    """The error says which extra fits this torch, and that there is another backend; the project has that extra."""
    without_dali(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(InputError) as error:
        build_loaders(config, build_indices(config), preprocessing(), runtime_on())
    message = str(error.value)
    assert f"pip install 'imagenet-swa[{extra}]'" in message and "--data.backend torchvision" in message
    assert "\n" not in message
    assert f"\n{extra} = [" in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_command_without_dali(image_folder: Path, tmp_path: Path) -> None:
    """A user without DALI gets exit code 2 and one line, no traceback."""
    flags = [f"--data.train={image_folder / 'train'}", f"--data.val={image_folder / 'val'}", f"--output={tmp_path / 'run'}"]
    flags += ["--model.name=resnet18", "--model.pretrained=false", "--model.num_classes=3"]
    program = "import sys; sys.modules['nvidia.dali'] = None; from imagenet_swa.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run([sys.executable, "-c", program, "evaluate", *flags])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("imagenet-swa: error: NVIDIA DALI is not installed: pip install 'imagenet-swa[dali-cuda")


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_the_command_names_a_bad_image(image_folder: Path, tmp_path: Path, backend: str) -> None:
    """A bad file ends the command with exit code 2 and its name, from both backends, decoding processes included."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    (root / "val" / "bee" / "2.JPEG").write_bytes(b"no picture")
    flags = [f"--data.train={root / 'train'}", f"--data.val={root / 'val'}", f"--data.backend={backend}", "--data.num_workers=1"]
    flags += ["--model.name=test_efficientnet", "--model.pretrained=false", "--model.num_classes=3"]
    flags += ["--preprocessing.image_size=32", f"--output={tmp_path / 'run'}"]
    done = run(["imagenet-swa", "evaluate", *flags])
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("imagenet-swa: error")]
    assert len(errors) == 1 and f"cannot decode the image {root / 'val' / 'bee' / '2.JPEG'}" in errors[0]
    assert "Traceback" not in done.stderr and "top-1" not in done.stdout


def test_a_bad_image_is_bad_input_that_one_rank_knows_of() -> None:
    """The command line treats it as the user's input, and lets the rank that met it speak."""
    error = BadImageError("a/b.JPEG", "the file is empty")
    assert isinstance(error, InputError) and error.concerns_one_rank and not InputError("x").concerns_one_rank
    assert str(error).startswith(
        "cannot decode the image a/b.JPEG: the file is empty; set data.on_bad_image to skip to go on without it, or repair it"
    )


# ---------------------------------------------------------------------------------------------------- made-up images


def synthetic(seed: int = 0, *, channels_last: bool = True, device: torch.device = CPU) -> SyntheticLoader:
    return SyntheticLoader(synthetic_index(100, 7), preprocessing(), seed=seed, device=device, channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)])
def test_a_synthetic_batch_looks_like_a_real_one(channels_last: bool, device: torch.device) -> None:
    """float32 images of the right size and memory order, int64 labels and indices in the order of the lists."""
    loader = synthetic(channels_last=channels_last, device=device)
    batches = [np.array([99, 3, 3]), np.array([5])]
    streams: tuple[Callable[[], Any], ...] = (
        lambda: loader.training_stream(batches, epoch=2),
        lambda: loader.evaluation_stream(batches),
    )
    for stream in streams:
        for batch, indices in zip(stream(), batches, strict=True):
            assert batch.images.shape == (len(indices), 3, 32, 32) and batch.images.dtype == torch.float32
            assert batch.images.device == batch.labels.device == device
            assert batch.images.is_contiguous(memory_format=torch.channels_last) is channels_last
            assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [i % 7 for i in indices]
            assert batch.indices.tolist() == indices.tolist()
    assert list(loader.training_stream([], epoch=0)) == []


def test_synthetic_pictures_follow_from_seed_epoch_and_index() -> None:
    """An image's picture does not depend on its batch; it is another in the next epoch and under another seed."""
    order = np.random.default_rng(0).permutation(100)
    parts = list(synthetic().training_stream(np.array_split(order, 7), epoch=3))
    together = torch.empty(100, 3, 32, 32)
    for batch in parts:
        together[torch.from_numpy(batch.indices)] = batch.images
    (whole,) = synthetic().training_stream([np.arange(100)], epoch=3)
    assert torch.equal(together, whole.images)
    (next_epoch,) = synthetic().training_stream([np.arange(100)], epoch=4)
    (other_seed,) = synthetic(seed=1).training_stream([np.arange(100)], epoch=3)
    for other in (next_epoch, other_seed):
        assert not any(torch.equal(a, b) for a, b in zip(whole.images, other.images, strict=True))
    assert len({image.numpy().tobytes() for image in whole.images}) == POOL_SIZE
    (one,), (two,) = (synthetic().evaluation_stream([np.arange(100)]) for _ in range(2))
    assert torch.equal(one.images, two.images)


def test_a_synthetic_batch_is_its_takers_own() -> None:
    """Writing into a batch does not change the pictures of later ones."""
    loader, batches = synthetic(), [np.arange(8)]
    (first,) = loader.evaluation_stream(batches)
    before = first.images.clone()
    first.images.zero_()
    (second,) = loader.evaluation_stream(batches)
    assert torch.equal(second.images, before)


def test_evaluation_needs_no_training_images(config: Config) -> None:
    """Without training images, evaluation alone is given the validation images for both, and training an error."""
    alone = with_data(config, train=None)
    train, val = build_indices(alone, evaluation_only=True)
    assert train is val and len(val) == 12
    with pytest.raises(InputError, match=r"data\.train is not set"):
        build_indices(alone)


def test_quarantined_names_that_nothing_has(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a quarantine list that name no image of the split, as paths instead of names would, are told in a line."""
    quarantine = tmp_path / "quarantine.tsv"
    quarantine.write_text("train\tant/0.JPEG\tempty\ntrain\t/data/ant/1.JPEG\tempty\n")
    train, val = build_indices(with_data(config, quarantine=quarantine))
    assert (len(train), len(val)) == (23, 12)
    assert capsys.readouterr().err == f"imagenet-swa: warning: 1 line(s) of {quarantine} name no image of data.train\n"


def test_an_index_folder_that_is_not_there(config: Config, tmp_path: Path) -> None:
    """A misspelt data.index is not taken for one without indices."""
    with pytest.raises(InputError, match=r"data\.index .*nowhere is no folder; run `imagenet-swa index`"):
        build_indices(with_data(config, index=tmp_path / "nowhere"))
