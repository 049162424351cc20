"""The torchvision backend against torchvision's own transforms and PIL, and its worker processes against none."""

import io
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import index_folder, index_list, index_names, preprocessing, run
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import processes_with
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import BadImageError, BadImages, Batch
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import Indices, crop_windows, draw_crops, training_batches
from imagenet_swa.data.torch_loader import TorchvisionLoader

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def make_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> TorchvisionLoader:
    arguments: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "num_workers": 0, "prefetch": 2}
    return TorchvisionLoader(index, work, **arguments | changes)


def pixels(batches: Iterable[Batch]) -> NDArray[np.float64]:
    """(n, H, W, 3) of all batches together."""
    return np.concatenate([batch.images.permute(0, 2, 3, 1).cpu().numpy() for batch in batches]).astype(np.float64)


@pytest.fixture(scope="module")
def index(image_folder: Path) -> ImageIndex:
    return index_folder(image_folder / "train")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Files of all the kinds that ImageNet has, of awkward sizes."""
    folder = tmp_path_factory.mktemp("kinds")
    random = np.random.default_rng(0)

    def image(height: int, width: int, channels: int = 3) -> Image.Image:
        grey_levels = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
        return Image.fromarray(grey_levels[..., 0] if channels == 1 else grey_levels, {4: "CMYK"}.get(channels))

    for height, width in ((256, 257), (256, 259), (259, 256), (100, 141), (41, 700), (700, 41), (1, 9), (9, 1), (36, 36)):
        image(height, width).save(folder / f"{height}x{width}.JPEG")
    image(300, 200, 1).save(folder / "grey.JPEG")
    image(300, 200, 4).save(folder / "cmyk.JPEG")
    image(300, 200).save(folder / "png.JPEG", format="PNG")
    image(300, 200).convert("RGBA").save(folder / "alpha.png")
    image(300, 200).convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    image(300, 200).save(folder / "turned by EXIF.JPEG", exif=exif)
    names = sorted(os.listdir(folder))
    return index_names(folder, [os.fsencode(name) for name in names])


def check_evaluation(index: ImageIndex, work: Preprocessing) -> None:
    """Each value is (grey level / 255 - mean) / std after torchvision's Resize and CenterCrop."""
    resize = transforms.Resize(work.resize, MODES[work.interpolation])
    transform = transforms.Compose([resize, transforms.CenterCrop(work.image_size)])
    batches = np.array_split(np.arange(len(index)), 3)
    got = pixels(make_loader(index, work).evaluation_stream(batches))
    for number, values in enumerate(got):
        with Image.open(index.path(number)) as file:
            grey_levels = np.asarray(transform(file.convert("RGB")))
        wanted = (grey_levels / 255 - np.array(work.mean)) / np.array(work.std)
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [(224, 256), (32, 36), (33, 36), (36, 36)])
def test_evaluation_is_torchvisions(kinds: ImageIndex, interpolation: str, sizes: tuple[int, int]) -> None:
    """An evaluation image is what torchvision's reference preprocessing makes of the file, to the last grey level."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image_size, resize = sizes
    check_evaluation(kinds, preprocessing(image_size=image_size, resize=resize, interpolation=interpolation, mean=mean, std=std))


@pytest.mark.realdata
def test_evaluation_of_imagenet_is_torchvisions(real_data: Path) -> None:
    """The same on ImageNet's own files."""
    work = preprocessing(image_size=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    check_evaluation(index_list(real_data / "train.txt", real_data / "train"), work)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), flip=st.booleans(), filter_=st.sampled_from(list(MODES)))
def test_training_crops_are_pils(kinds: ImageIndex, seed: int, epoch: int, flip: bool, filter_: str) -> None:
    """A training image is the window that PIL cuts, resizes and mirrors, to the last grey level."""
    work = preprocessing(train_interpolation=filter_, horizontal_flip=flip)
    numbers = np.arange(len(kinds))
    got = pixels(make_loader(kinds, work, seed=seed).training_stream([numbers], epoch=epoch))
    draws = draw_crops(
        numbers, seed=seed, epoch=epoch, area=work.crop_area, aspect=work.crop_aspect, horizontal_flip=work.horizontal_flip
    )
    images = []
    for number in numbers:
        with Image.open(kinds.path(int(number))) as file:
            images.append(file.convert("RGB"))
    heights, widths = (np.array([getattr(image, side) for image in images]) for side in ("height", "width"))
    windows = crop_windows(draws, heights, widths, aspect=work.crop_aspect)
    for i, (image, (top, left, height, width)) in enumerate(zip(images, windows.tolist(), strict=True)):
        crop = image.crop((left, top, left + width, top + height)).resize((32, 32), PIL_FILTERS[filter_])
        np.testing.assert_allclose(got[i], np.asarray(ImageOps.mirror(crop) if draws.flip[i] else crop), atol=1e-3)
    assert flip or not draws.flip.any()


# ------------------------------------------------------------------------------------------- one stream for everybody


@pytest.mark.parametrize("num_workers,prefetch", [(1, 1), (2, 2)])
def test_worker_processes_change_nothing(index: ImageIndex, num_workers: int, prefetch: int) -> None:
    """Any number of decoding processes gives the same batches in the same order."""
    batches = np.split(np.random.default_rng(0).permutation(24), [1, 5, 12, 20])
    alone = list(make_loader(index, preprocessing()).training_stream(batches, epoch=1))
    loader = make_loader(index, preprocessing(), num_workers=num_workers, prefetch=prefetch)
    for got, wanted in zip(loader.training_stream(batches, epoch=1), alone, strict=True):
        assert torch.equal(got.images, wanted.images) and torch.equal(got.labels, wanted.labels)
        assert got.indices.tolist() == wanted.indices.tolist()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_global_batches_are_the_same_for_any_number_of_processes(index: ImageIndex, data: st.DataObject) -> None:
    """Ranks and the split into batches decide nothing about the pixels; a late start gives the tail."""
    world_size = data.draw(st.sampled_from([1, 2, 4]), "world size")
    batch_size = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if 8 // world_size % n == 0]), "batch size")
    first_step = data.draw(st.integers(0, 2), "first step")
    seed = data.draw(st.integers(0, 2**63 - 1), "seed")

    def global_batches(world_size: int, batch_size: int, first_step: int) -> NDArray[np.float64]:
        parts = []
        for rank in range(world_size):
            mine = training_batches(
                24,
                seed=seed,
                epoch=2,
                global_batch_size=8,
                batch_size_per_device=batch_size,
                rank=rank,
                world_size=world_size,
                first_step=first_step,
            )
            loader = make_loader(index, preprocessing(), seed=seed)
            shown = pixels(loader.training_stream(mine.reshape(-1, batch_size), epoch=2))
            parts.append(shown.reshape(3 - first_step, 8 // world_size, 32, 32, 3))
        return np.concatenate(parts, axis=1)

    np.testing.assert_array_equal(global_batches(world_size, batch_size, first_step), global_batches(1, 8, 0)[first_step:])


def test_seeds_and_epochs_show_other_crops(index: ImageIndex) -> None:
    """The same image is cropped differently under another seed and in another epoch."""
    everything = [np.arange(24)]
    keys = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))
    shows = [pixels(make_loader(index, preprocessing(), seed=s).training_stream(everything, epoch=e)) for s, e in keys]
    for i, one in enumerate(shows):
        for other in shows[:i]:
            assert (np.abs(one - other).mean(axis=(1, 2, 3)) > 1).all()


def test_streams_in_alternation_do_not_disturb_each_other(index: ImageIndex) -> None:
    """Two streams over one loader give what each gives alone, also where they take turns."""
    loader, batches = make_loader(index, preprocessing()), np.array_split(np.arange(24), 5)
    training, evaluation = pixels(loader.training_stream(batches, epoch=0)), pixels(loader.evaluation_stream(batches))
    turns = list(zip(loader.training_stream(batches, epoch=0), loader.evaluation_stream(batches), strict=True))
    np.testing.assert_array_equal(pixels(one for one, _ in turns), training)
    np.testing.assert_array_equal(pixels(other for _, other in turns), evaluation)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_leaves_torchs_random_numbers_alone(index: ImageIndex, num_workers: int) -> None:
    """What dropout draws does not depend on when a stream was started."""
    loader = make_loader(index, preprocessing(), num_workers=num_workers)
    before = torch.get_rng_state()
    list(loader.training_stream([np.arange(2)], epoch=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_abandoned_stream_stops_its_workers(index: ImageIndex) -> None:
    """Closed half-way, a stream ends its processes, and the loader is as it was."""
    loader, batches = make_loader(index, preprocessing(), num_workers=2), list(np.arange(24).reshape(12, 2))
    stream = loader.training_stream(batches, epoch=0)
    first = next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    getattr(stream, "close")()  # noqa: B009 (an Iterator that is a generator)
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)
    again = next(make_loader(index, preprocessing()).training_stream(batches, epoch=0))
    assert torch.equal(first.images, again.images)


# ------------------------------------------------------------------------------------------------------- bad images


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (4, 2)])
def test_a_bad_image_is_named(tmp_path: Path, num_workers: int, place: tuple[int, int]) -> None:
    """The error arrives from a worker process too, names the file, and comes after all good batches."""
    for i in range(16):
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(tmp_path / f"{i:03d}.JPEG")
    (tmp_path / "015.JPEG").write_bytes(b"no picture")
    index = index_names(tmp_path, [b"%03d.JPEG" % i for i in range(16)])
    batches = np.arange(15).reshape(5, 3)
    batches[place] = 15
    stream = make_loader(index, preprocessing(), num_workers=num_workers).evaluation_stream(list(batches))
    delivered: list[Batch] = []
    with pytest.raises(BadImageError, match=r"cannot decode the image .*/015\.JPEG: .*repair it") as error:
        for batch in stream:
            delivered.append(batch)
    assert len(delivered) == place[0]
    for batch, indices in zip(delivered, batches, strict=False):
        np.testing.assert_allclose(pixels([batch]).mean(axis=(1, 2, 3)), 10 * indices, atol=1.5)
    assert str(error.value).count("015.JPEG") == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_left_out(tmp_path: Path, num_workers: int) -> None:
    """Worker processes say what they could not decode and why; the rest of the batch arrives as it is without it."""
    for i in range(12):
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(tmp_path / f"{i:03d}.JPEG")
    index = index_names(tmp_path, [b"%03d.JPEG" % i for i in range(14)])
    (tmp_path / "012.JPEG").write_bytes(b"no picture")
    batches = [np.array([0, 12, 1]), np.array([2, 3, 4]), np.array([13, 12]), np.array([5, 6, 13])]
    log = tmp_path / "log.tsv"
    bad_images = BadImages(index, "skip", 2, split="train", log=log)
    shown = list(make_loader(index, preprocessing(), num_workers=num_workers, bad_images=bad_images).evaluation_stream(batches))
    assert [batch.left_out for batch in shown] == [(12,), (), (13, 12), (13,)]
    assert [batch.indices.tolist() for batch in shown] == [[0, 1], [2, 3, 4], [], [5, 6]]
    for batch in shown:
        assert batch.images.shape == (len(batch.indices), 3, 32, 32) and batch.labels.tolist() == batch.indices.tolist()
        np.testing.assert_allclose(pixels([batch]).mean(axis=(1, 2, 3)), 10 * batch.indices, atol=1.5)
    reasons = dict(line.split("\t")[1:] for line in log.read_text().splitlines())
    assert reasons["013.JPEG"] == "no such file or object" and "starts with b'no pictu'" in reasons["012.JPEG"]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_the_content_decides_not_the_name(tmp_path: Path, format_: str) -> None:
    """A file of any kind that both backends read may be called .JPEG."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8))
    folder = tmp_path / "class"
    folder.mkdir()
    image.save(folder / "image.JPEG", format=format_, **({"lossless": True} if format_ == "WEBP" else {}))
    got = pixels(make_loader(index_folder(tmp_path), preprocessing()).evaluation_stream([np.array([0])]))
    assert got.shape == (1, 32, 32, 3)
    if format_ != "JPEG":
        wanted = transforms.CenterCrop(32)(transforms.Resize(36)(image))
        np.testing.assert_allclose(got[0], np.asarray(wanted), atol=1e-3)


def test_formats_that_dali_does_not_read_are_refused(tmp_path: Path) -> None:
    """A GIF is refused here as there: which images are in an epoch does not depend on the backend."""
    folder = tmp_path / "class"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (50, 60)).save(buffer, "GIF")
    (folder / "image.JPEG").write_bytes(buffer.getvalue())
    indices: list[Indices] = [np.array([0])]
    with pytest.raises(BadImageError, match=r"image\.JPEG"):
        list(make_loader(index_folder(tmp_path), preprocessing()).evaluation_stream(indices))


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_gpu_batches(index: ImageIndex, num_workers: int) -> None:
    """On a GPU the batches hold the same numbers as on the CPU."""
    batches = [np.arange(5), np.arange(5, 24)]
    loader = make_loader(index, preprocessing(), device=torch.device("cuda", 0), num_workers=num_workers)
    wanted = make_loader(index, preprocessing()).training_stream(batches, epoch=0)
    for got, batch in zip(loader.training_stream(batches, epoch=0), wanted, strict=True):
        assert got.images.device == got.labels.device == torch.device("cuda", 0)
        assert got.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.images.cpu(), batch.images, rtol=0, atol=1e-3)
        assert torch.equal(got.labels.cpu(), batch.labels)


# A stream in its middle, and one whose error keeps its frames alive: neither is closed when the program ends.
LEFT_OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import index_folder, preprocessing
from small_loaders import torchvision_loader
index = index_folder(Path(sys.argv[2]))
loader = torchvision_loader(index, preprocessing(), num_workers=2)
half = loader.training_stream([[0, 1]] * 9, epoch=0)
next(half)
try:
    for _ in (failing := loader.training_stream([[0, 1], [2, 3]] * 4, epoch=0)):
        raise ValueError("of the taker")
except ValueError as error:
    sys.last_value = error
print("the end", flush=True)
"""


def test_a_stream_left_open_does_not_hold_up_the_end(image_folder: Path):
    """A process that ends in the middle of streams, as after an error, ends soon, and its worker processes with it."""
    marker = f"SWA_TEST_{uuid.uuid4().hex}"
    process = run(
        ["env", f"{marker}=1", sys.executable, "-c", LEFT_OPEN, Path(__file__).parent, image_folder / "train"], timeout=60
    )
    assert (process.returncode, process.stdout) == (0, "the end\n"), process.stderr
    assert processes_with(marker) == []
