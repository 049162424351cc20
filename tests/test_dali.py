"""The DALI backend against torchvision, PIL and numpy, and its stream against itself under other processes and threads."""

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import preprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import BadImageError, Batch, ImageLoader
from imagenet_swa.data.dali import DaliLoader
from imagenet_swa.data.index import ImageIndex, index_folder, index_list
from imagenet_swa.data.sampling import CropDraws, Indices, crop_windows, draw_crops, training_batches
from imagenet_swa.data.torch_loader import TorchvisionLoader

CPU = torch.device("cpu")
PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRANSFORM_FILTERS = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}
IMAGENET = {"image_size": 224, "resize": 256}


# ---------------------------------------------------------------------------------------------------------- helpers


def dali_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    arguments: dict[str, Any] = {"seed": 0, "device": CPU, "decode_on_gpu": False, "num_threads": 2, "prefetch": 2}
    return DaliLoader(index, work, **arguments | changes)


def torchvision_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> TorchvisionLoader:
    arguments: dict[str, Any] = {"seed": 0, "device": CPU, "num_workers": 0, "prefetch": 2}
    return TorchvisionLoader(index, work, **arguments | changes)


def index_of(folder: Path, names: Iterable[str]) -> ImageIndex:
    paths = [os.fsencode(name) for name in names]
    labels = np.arange(len(paths), dtype=np.int64)
    return ImageIndex(root=folder, relative_paths=pa.array(paths, pa.large_binary()), labels=labels, classes=None)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, channels) grey levels: large soft shapes and some noise, as in a photograph."""
    random = np.random.default_rng([seed, height, width, channels])
    shapes = random.integers(0, 256, (height // 16 + 2, width // 16 + 2, channels)).astype(np.uint8)
    planes = [
        Image.fromarray(np.ascontiguousarray(shapes[..., c])).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    noise = random.normal(0, 8, (height, width, channels))
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1) + noise, 0, 255).astype(np.uint8)


def in_pieces(indices: Iterable[int], size: int) -> list[Indices]:
    indices = np.fromiter(indices, np.int64)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def pixels(batches: Iterable[Batch]) -> NDArray[np.float32]:
    """(n, H, W, 3) of all batches together."""
    return np.concatenate([batch.images.permute(0, 2, 3, 1).cpu().numpy() for batch in batches])


def torchvision_pixels(path: str, work: Preprocessing) -> NDArray[np.float64]:
    """What the reference preprocessing of torchvision makes of a file for evaluation, grey levels (H, W, 3)."""
    transform = transforms.Compose(
        [
            transforms.Resize(work.resize, interpolation=TRANSFORM_FILTERS[work.interpolation], antialias=True),
            transforms.CenterCrop(work.image_size),
        ]
    )
    with Image.open(path) as file:
        return np.asarray(transform(file.convert("RGB")), np.float64)


def crop_draws(work: Preprocessing, indices: Indices, seed: int, epoch: int) -> CropDraws:
    flip = work.horizontal_flip
    return draw_crops(indices, seed=seed, epoch=epoch, area=work.crop_area, aspect=work.crop_aspect, horizontal_flip=flip)


def pil_training_pixels(index: ImageIndex, number: int, work: Preprocessing, seed: int, epoch: int) -> NDArray[np.float64]:
    """The image's crop cut out, resized and mirrored by PIL alone, grey levels (H, W, 3)."""
    draws = crop_draws(work, np.array([number]), seed, epoch)
    with Image.open(index.path(number)) as file:
        image = file.convert("RGB")
    window = crop_windows(draws, np.array([image.height]), np.array([image.width]), aspect=work.crop_aspect)
    top, left, height, width = map(int, window[0])
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((work.image_size, work.image_size), PIL_FILTERS[work.train_interpolation])
    return np.asarray(ImageOps.mirror(image) if draws.flip[0] else image, np.float64)


def check_close(
    got: NDArray[np.floating], wanted: list[NDArray[np.float64]], names: list[str], *, mean: float, largest: float | None
) -> None:
    """Each image's mean difference is at most `mean` grey levels, and no pixel's more than `largest`."""
    assert len(got) == len(wanted)
    difference = [np.abs(a - b) for a, b in zip(got, wanted, strict=True)]
    seen = {name: (round(float(d.mean()), 3), float(d.max())) for name, d in zip(names, difference, strict=True)}
    worst = [max(seen, key=lambda name: seen[name][k]) for k in (0, 1)]
    message = f"mean and maximum difference; the worst of {len(seen)}: {[(name, seen[name]) for name in worst]}"
    assert all(d.mean() <= mean for d in difference), message
    assert largest is None or all(d.max() <= largest + 1e-3 for d in difference), message


# ------------------------------------------------------------------------------------------------- generated images

# Height and width. With 256/224 the longer side minus 224 is odd for (256, 257), (256, 259), (333, 500), so that the crop
# starts at a half, which Python rounds to even: once down, once up.
SIZES = (
    (256, 257),
    (256, 259),
    (257, 256),
    (259, 256),
    (333, 500),
    (500, 333),
    (375, 500),
    (501, 375),
    (224, 224),
    (255, 255),
    (100, 141),
    (141, 100),
    (97, 803),
    (803, 97),
    (600, 899),
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """JPEGs of awkward sizes and kinds."""
    folder = tmp_path_factory.mktemp("generated")
    for height, width in SIZES:
        Image.fromarray(picture(height, width)).save(folder / f"{height}x{width}.JPEG", quality=92)
    base = Image.fromarray(picture(301, 407))
    Image.fromarray(picture(280, 330, 1)[..., 0]).save(folder / "grey.JPEG")
    base.save(folder / "progressive.JPEG", progressive=True)
    base.save(folder / "no chroma subsampling.JPEG", subsampling=0)
    base.save(folder / "PNG by the name of.JPEG", format="PNG")
    base.save(folder / "WebP by the name of.JPEG", format="WEBP")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right by 90 degrees to show
    base.save(folder / "turned by EXIF.JPEG", exif=exif)
    return index_of(folder, sorted(os.listdir(folder)))


def names_in(index: ImageIndex) -> list[str]:
    return [Path(index.path(i)).name for i in range(len(index))]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [IMAGENET, {"image_size": 225, "resize": 256}, {"image_size": 97, "resize": 130}])
def test_evaluation_pixels_are_torchvisions(generated: ImageIndex, interpolation: str, sizes: dict[str, int]) -> None:
    """DALI's evaluation image is torchvision's Resize and CenterCrop to 0.3 grey levels on average, bilinear to 1 at most."""
    work = preprocessing(interpolation=interpolation, **sizes)
    got = pixels(dali_loader(generated, work).evaluation_stream(in_pieces(range(len(generated)), 8)))
    wanted = [torchvision_pixels(generated.path(i), work) for i in range(len(generated))]
    check_close(got, wanted, names_in(generated), mean=0.3, largest=1 if interpolation == "bilinear" else None)


def test_evaluation_of_the_whole_shorter_side(generated: ImageIndex) -> None:
    """Without a margin around the crop the same holds, but for a few pixels at the image's border that differ by 2."""
    work = preprocessing(image_size=96, resize=96)
    got = pixels(dali_loader(generated, work).evaluation_stream(in_pieces(range(len(generated)), 8)))
    wanted = [torchvision_pixels(generated.path(i), work) for i in range(len(generated))]
    check_close(got, wanted, names_in(generated), mean=0.3, largest=2)
    inside = [image[1:-1, 1:-1] for image in wanted]
    check_close(got[:, 1:-1, 1:-1], inside, names_in(generated), mean=0.3, largest=1)


def test_a_crop_shifted_by_one_pixel_would_be_noticed(generated: ImageIndex) -> None:
    """The tolerance of the pixel laws is far below what a shift by one pixel makes."""
    work = preprocessing(**IMAGENET)
    for i in range(len(generated)):
        reference = torchvision_pixels(generated.path(i), work)
        assert np.abs(reference[1:] - reference[:-1]).mean() > 0.6


def test_exif_orientation_is_ignored(generated: ImageIndex) -> None:
    """A JPEG that asks to be turned is shown unturned, as torchvision's ImageFolder shows it."""
    names = names_in(generated)
    turned, plain = names.index("turned by EXIF.JPEG"), names.index("progressive.JPEG")
    work = preprocessing(**IMAGENET)
    loader = dali_loader(generated, work)
    as_file, same_picture = pixels(loader.evaluation_stream([np.array([turned, plain])]))
    assert np.abs(as_file - same_picture).mean() < 3  # one picture, encoded twice
    with Image.open(generated.path(turned)) as file:
        upright = ImageOps.exif_transpose(file)
    assert upright is not None and upright.size == (301, 407)
    (crops,) = loader.windows([np.array([turned])], epoch=0)
    draws = crop_draws(work, np.array([turned]), 0, 0)
    np.testing.assert_array_equal(crops, crop_windows(draws, np.array([301]), np.array([407]), aspect=work.crop_aspect))


@pytest.mark.realdata
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_pixels_of_imagenet_are_torchvisions(real_data: Path, interpolation: str) -> None:
    """On ImageNet's own files DALI agrees with torchvision to 0.3 grey levels on average, bilinear to 1 at most."""
    index = index_list(real_data / "train.txt", real_data / "train", 1000)
    assert len(index) == 154
    work = preprocessing(interpolation=interpolation, **IMAGENET)
    got = pixels(dali_loader(index, work).evaluation_stream(in_pieces(range(154), 32)))
    wanted = [torchvision_pixels(index.path(i), work) for i in range(154)]
    check_close(got, wanted, names_in(index), mean=0.3, largest=1 if interpolation == "bilinear" else None)


# ------------------------------------------------------------------------------------- kinds of files beyond the usual


def test_cmyk_differs_by_two_grey_levels_at_most(tmp_path: Path) -> None:
    """A CMYK JPEG has PIL's colours but for the rounding of the conversion."""
    Image.fromarray(picture(300, 400, 4), "CMYK").save(tmp_path / "cmyk.JPEG", quality=92)
    index, work = index_of(tmp_path, ["cmyk.JPEG"]), preprocessing(**IMAGENET)
    got = pixels(dali_loader(index, work).evaluation_stream([np.array([0])]))
    check_close(got, [torchvision_pixels(index.path(0), work)], ["cmyk"], mean=1, largest=2)


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    """A 16-bit PNG is shown as its upper eight bits."""
    grey = picture(300, 400, 1)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "8.png")
    index, work = index_of(tmp_path, ["16.png", "8.png"]), preprocessing(**IMAGENET)
    sixteen, eight = pixels(dali_loader(index, work).evaluation_stream([np.arange(2)]))
    assert np.abs(sixteen - eight).max() <= 1


@pytest.mark.parametrize("name", ["palette.png", "alpha.png", "bitmap.bmp", "portable.ppm", "tagged.tiff"])
def test_other_formats_of_the_index_decode_as_in_pil(tmp_path: Path, name: str) -> None:
    """Every kind of file that the index takes has PIL's pixels."""
    image = Image.fromarray(picture(300, 400, 4 if name == "alpha.png" else 3))
    (image.convert("P") if name == "palette.png" else image).save(tmp_path / name)
    index, work = index_of(tmp_path, [name]), preprocessing(**IMAGENET)
    got = pixels(dali_loader(index, work).evaluation_stream([np.array([0])]))
    check_close(got, [torchvision_pixels(index.path(0), work)], [name], mean=0.3, largest=1)


def test_flipped_bytes_show_what_pil_shows(tmp_path: Path) -> None:
    """Damage that a JPEG decoder cannot notice gives the same wrong pixels as in PIL."""
    buffer = io.BytesIO()
    Image.fromarray(picture(301, 407)).save(buffer, "JPEG", quality=90)
    data = bytearray(buffer.getvalue())
    (tmp_path / "sound.JPEG").write_bytes(data)
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    (tmp_path / "damaged.JPEG").write_bytes(data)
    index, work = index_of(tmp_path, ["sound.JPEG", "damaged.JPEG"]), preprocessing(**IMAGENET)
    got = pixels(dali_loader(index, work).evaluation_stream([np.arange(2)]))
    wanted = [torchvision_pixels(index.path(i), work) for i in range(2)]
    assert np.abs(wanted[0] - wanted[1]).mean() > 5
    check_close(got, wanted, ["sound", "damaged"], mean=0.3, largest=1)


@pytest.mark.parametrize("height,width", [(1, 1), (1, 60), (60, 1), (3, 2), (2, 900)])
def test_images_of_a_few_pixels(tmp_path: Path, height: int, width: int) -> None:
    """Even an image one pixel high goes through both streams, with torchvision's pixels."""
    Image.fromarray(picture(height, width)).save(tmp_path / "tiny.png")
    index, work = index_of(tmp_path, ["tiny.png"]), preprocessing()
    loader = dali_loader(index, work)
    got = pixels(loader.evaluation_stream([np.array([0])]))
    check_close(got, [torchvision_pixels(index.path(0), work)], ["tiny"], mean=0.3, largest=1)
    got = pixels(loader.training_stream([np.array([0])], epoch=0))
    check_close(got, [pil_training_pixels(index, 0, work, 0, 0)], ["tiny"], mean=0.3, largest=1)


NAMES = ("with space.JPEG", "Ünïcödé 象.JPEG", os.fsdecode(b"not \xff\xfe UTF-8.JPEG"), "quo'te\"s;&$(x).JPEG", "new\nline.JPEG")


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
def test_any_file_name_will_do(tmp_path: Path, make: Callable[..., ImageLoader]) -> None:
    """A picture is the same under any name that a file system allows."""
    for label, name in enumerate(("a plain.JPEG", *NAMES)):
        folder = tmp_path / f"{label} class é"
        folder.mkdir()
        Image.fromarray(picture(60, 70)).save(folder / name)
    index, work = index_folder(tmp_path), preprocessing()
    assert len(index) == len(NAMES) + 1
    (batch,) = make(index, work).evaluation_stream([np.arange(len(index))])
    assert batch.labels.tolist() == list(range(len(index)))
    got = pixels([batch])
    assert (got == got[0]).all() and got.std() > 10


# ---------------------------------------------------------------------------------------------------- random crops


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, NDArray[np.int64]]:
    """400 files that only say how large they are, and their heights and widths (400, 2)."""
    folder = tmp_path_factory.mktemp("headers")
    random = np.random.default_rng(1)
    sizes = random.integers(1, 3000, (400, 2))
    sizes[:30, 0], sizes[30:60, 1] = 1, 1
    sizes[60:80, 0], sizes[80:100, 1] = 60_000, 60_000
    sizes[100:130] = np.exp(random.uniform(0, np.log(65_500), (30, 2)))
    for i, (height, width) in enumerate(sizes):
        (folder / f"{i}.ppm").write_bytes(b"P6\n%d %d\n255\n" % (width, height) + bytes(64))
    return index_of(folder, [f"{i}.ppm" for i in range(len(sizes))]), sizes


CROPS = {
    "usual": {},
    "whole image": {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)},
    "narrow and wide": {"crop_area": (0.01, 1.0), "crop_aspect": (0.1, 10.0)},
    "one aspect": {"crop_area": (0.5, 0.9), "crop_aspect": (2.5, 2.5)},
    "always high": {"crop_area": (0.9, 1.0), "crop_aspect": (0.2, 0.3)},
}


@pytest.mark.parametrize("kind", CROPS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000), batch_size=st.integers(30, 400))
def test_crop_windows_are_numpys(
    headers: tuple[ImageIndex, NDArray[np.int64]], kind: str, seed: int, epoch: int, batch_size: int
) -> None:
    """DALI's arithmetic gives the windows of `sampling.crop_windows` to the pixel, for any size and shape of image."""
    index, sizes = headers
    work = preprocessing(**CROPS[kind])
    everything = np.arange(len(index))
    got = np.concatenate(list(dali_loader(index, work, seed=seed).windows(in_pieces(everything, batch_size), epoch=epoch)))
    draws = crop_draws(work, everything, seed, epoch)
    np.testing.assert_array_equal(got, crop_windows(draws, sizes[:, 0], sizes[:, 1], aspect=work.crop_aspect))
    top, left, height, width = got.T
    assert (np.minimum(top, left) >= 0).all() and (np.minimum(height, width) >= 1).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


def at_the_edges(sizes: NDArray[np.int64], seed: int) -> CropDraws:
    """Draws at which the last bit decides: sides that round up or down, places just before or at the next pixel."""
    random = np.random.default_rng(seed)

    def nudged(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values + random.integers(-2, 3, values.shape) * np.spacing(values)

    heights, widths = sizes.T
    root = np.sqrt((heights * widths).astype(np.float64))
    half_height, half_width = (np.floor(random.random(len(sizes)) * side) + 0.5 for side in (heights, widths))
    return CropDraws(
        width_factor=np.tile(nudged(half_width / root)[:, None], 10),
        height_factor=np.tile(nudged(half_height / root)[:, None], 10),
        top=np.clip(nudged(random.integers(1, 9, len(sizes)) / 9), 0, 1 - 2.0**-53),
        left=np.clip(nudged(random.integers(1, 100, len(sizes)) / 100), 0, 1 - 2.0**-53),
        flip=np.zeros(len(sizes), np.bool_),
    )


@pytest.mark.parametrize("seed", range(10))
def test_crop_windows_are_numpys_where_the_last_bit_decides(
    headers: tuple[ImageIndex, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also for sides at half a pixel and places at whole ones, DALI rounds as numpy does."""
    index, sizes = headers
    draws = at_the_edges(sizes, seed)
    monkeypatch.setattr("imagenet_swa.data.dali.draw_crops", lambda *_, **__: draws)
    (got,) = dali_loader(index, preprocessing()).windows([np.arange(len(index))], epoch=0)
    np.testing.assert_array_equal(got, crop_windows(draws, sizes[:, 0], sizes[:, 1], aspect=preprocessing().crop_aspect))


@pytest.mark.parametrize("kind", ["usual", "always high", "one aspect"])
def test_images_that_no_try_fits_get_the_central_window(headers: tuple[ImageIndex, NDArray[np.int64]], kind: str) -> None:
    """Where none of ten tries fits, DALI takes the largest central window, as torchvision does."""
    index, sizes = headers
    work = preprocessing(**CROPS[kind])
    got = np.concatenate(list(dali_loader(index, work).windows([np.arange(len(index))], epoch=0)))
    draws = crop_draws(work, np.arange(len(index)), 0, 0)
    fell_back = 0
    for i, (height, width) in enumerate(sizes.tolist()):
        root = (height * width) ** 0.5
        tries = zip(root * draws.height_factor[i], root * draws.width_factor[i], strict=True)
        if any(0.5 <= h < height + 0.5 and 0.5 <= w < width + 0.5 for h, w in tries):
            continue
        fell_back += 1
        low, high = work.crop_aspect
        h = height if width / height >= low else max(1, int(width / low + 0.5))
        w = width if width / height <= high else max(1, int(height * high + 0.5))
        assert got[i].tolist() == [(height - h) // 2, (width - w) // 2, h, w]
    assert 20 < fell_back < len(sizes)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_pixels_are_pils(generated: ImageIndex, interpolation: str) -> None:
    """A random crop is the one that PIL cuts, resizes and mirrors, to 0.3 grey levels on average.

    Bilinear to 1 at most but for the outermost pixels: where the filter reaches over the crop's border, DALI repeats the
    last pixel and PIL leaves out what is not there.
    """
    work = preprocessing(image_size=224, resize=224, train_interpolation=interpolation)
    everything = np.arange(len(generated))
    got = pixels(dali_loader(generated, work, seed=3).training_stream(in_pieces(everything, 5), epoch=2))
    wanted = [pil_training_pixels(generated, i, work, 3, 2) for i in range(len(generated))]
    check_close(got, wanted, names_in(generated), mean=0.3, largest=None)
    inside = [image[1:-1, 1:-1] for image in wanted]
    largest = 1 if interpolation == "bilinear" else None
    check_close(got[:, 1:-1, 1:-1], inside, names_in(generated), mean=0.3, largest=largest)
    flips = crop_draws(work, everything, 3, 2).flip
    assert 3 < flips.sum() < len(generated) - 3
    unmirrored = [image[:, ::-1] if flip else image for image, flip in zip(wanted, flips, strict=True)]
    far = np.array([np.abs(a - b).mean() > 2 for a, b in zip(got, unmirrored, strict=True)])
    np.testing.assert_array_equal(far, flips)


@pytest.mark.realdata
def test_training_pixels_of_imagenet_are_those_of_the_other_backend(real_data: Path) -> None:
    """Both backends show ImageNet's files through the same crops and flips, to 0.3 grey levels on average."""
    index = index_list(real_data / "train.txt", real_data / "train", 1000)
    work = preprocessing(**IMAGENET)
    batches = in_pieces(range(len(index)), 32)
    got = pixels(dali_loader(index, work, seed=1).training_stream(batches, epoch=3))
    wanted = pixels(torchvision_loader(index, work, seed=1).training_stream(batches, epoch=3)).astype(np.float64)
    check_close(got, list(wanted), names_in(index), mean=0.3, largest=None)
    inside = list(wanted[:, 1:-1, 1:-1])
    check_close(got[:, 1:-1, 1:-1], inside, names_in(index), mean=0.3, largest=1)


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
def test_no_flip_means_no_flip(generated: ImageIndex, make: Callable[..., ImageLoader]) -> None:
    """With horizontal_flip off, no image is mirrored; with it on, some are, and nothing else changes."""
    batch = [np.arange(len(generated))]
    without, work = (preprocessing(image_size=224, resize=224, horizontal_flip=flip) for flip in (False, True))
    straight, mixed = (pixels(make(generated, w).training_stream(batch, epoch=0)) for w in (without, work))
    flips = crop_draws(work, batch[0], 0, 0).flip
    assert 0 < flips.sum() < len(flips)
    np.testing.assert_array_equal(mixed, np.where(flips[:, None, None, None], straight[:, :, ::-1], straight))
    wanted = [pil_training_pixels(generated, i, without, 0, 0) for i in range(len(generated))]
    check_close(straight, wanted, names_in(generated), mean=0.3, largest=None)


# ------------------------------------------------------------------------------------------- one stream for everybody


@pytest.fixture(scope="module")
def small(image_folder: Path) -> ImageIndex:
    return index_folder(image_folder / "train")


def global_batches(
    index: ImageIndex, *, seed: int, epoch: int, world_size: int, batch_size_per_device: int, first_step: int = 0, **changes: Any
) -> NDArray[np.float32]:
    """The epoch's global batches of 8 put together from all ranks, (steps, 8, 32, 32, 3)."""
    parts = []
    for rank in range(world_size):
        batches = training_batches(
            len(index),
            seed=seed,
            epoch=epoch,
            global_batch_size=8,
            batch_size_per_device=batch_size_per_device,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
        )
        loader = dali_loader(index, preprocessing(), seed=seed, **changes)
        mine = pixels(loader.training_stream(batches.reshape(-1, batch_size_per_device), epoch=epoch))
        parts.append(mine.reshape(len(batches), 8 // world_size, *mine.shape[1:]))
    return np.concatenate(parts, axis=1)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_global_batches_are_the_same_for_any_number_of_processes_and_threads(small: ImageIndex, data: st.DataObject) -> None:
    """Ranks, threads, prefetching and the split into batches decide nothing about a single bit of the pixels."""
    seed, epoch = data.draw(st.integers(0, 2**63 - 1), "seed"), data.draw(st.integers(0, 50), "epoch")
    world_size = data.draw(st.sampled_from([1, 2, 4]), "world size")
    batch_size = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if 8 // world_size % n == 0]), "batch size")
    num_threads, prefetch = data.draw(st.integers(1, 3), "threads"), data.draw(st.integers(1, 4), "prefetch")
    whole = global_batches(small, seed=seed, epoch=epoch, world_size=1, batch_size_per_device=8)
    split = global_batches(
        small,
        seed=seed,
        epoch=epoch,
        world_size=world_size,
        batch_size_per_device=batch_size,
        num_threads=num_threads,
        prefetch=prefetch,
    )
    assert whole.shape == (3, 8, 32, 32, 3)
    np.testing.assert_array_equal(split, whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_started_late_is_the_tail_of_the_whole(small: ImageIndex, world_size: int) -> None:
    """From step k on, a new stream goes on exactly as one that ran from the start."""
    whole = global_batches(small, seed=5, epoch=1, world_size=world_size, batch_size_per_device=2)
    for step in range(3):
        tail = global_batches(small, seed=5, epoch=1, world_size=world_size, batch_size_per_device=2, first_step=step)
        np.testing.assert_array_equal(tail, whole[step:])


def test_seeds_and_epochs_show_other_crops(small: ImageIndex) -> None:
    """The same image is cropped differently under another seed and in another epoch."""
    everything = [np.arange(len(small))]
    shows = [
        pixels(dali_loader(small, preprocessing(), seed=seed).training_stream(everything, epoch=epoch))
        for seed, epoch in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))
    ]
    for i, one in enumerate(shows):
        for other in shows[:i]:
            assert (np.abs(one - other).mean(axis=(1, 2, 3)) > 1).all()


def test_streams_in_alternation_do_not_disturb_each_other(small: ImageIndex) -> None:
    """Two streams over one loader give what each gives alone, also where they take turns."""
    loader, batches = dali_loader(small, preprocessing()), in_pieces(range(len(small)), 4)
    training, evaluation = pixels(loader.training_stream(batches, epoch=0)), pixels(loader.evaluation_stream(batches))
    streams = loader.training_stream(batches, epoch=0), loader.evaluation_stream(batches)
    turns = [(next(streams[0]), next(streams[1])) for _ in batches]
    np.testing.assert_array_equal(pixels(one for one, _ in turns), training)
    np.testing.assert_array_equal(pixels(other for _, other in turns), evaluation)
    assert all(next(stream, None) is None for stream in streams)


def test_batches_stay_as_they_were(small: ImageIndex) -> None:
    """A batch that was handed out is the taker's own: later batches do not write over it."""
    stream = dali_loader(small, preprocessing()).evaluation_stream(in_pieces(range(len(small)), 4))
    first = next(stream)
    before = first.images.clone()
    rest = list(stream)
    assert torch.equal(first.images, before)
    assert not torch.equal(first.images, rest[0].images)


def test_an_abandoned_stream_does_no_harm(small: ImageIndex) -> None:
    """Streams closed half-way leave no threads behind and the loader as it was."""
    loader, batches = dali_loader(small, preprocessing()), in_pieces(range(len(small)), 2)
    wanted = pixels(loader.training_stream(batches, epoch=0))

    def num_threads() -> int:
        tasks = Path("/proc/self/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()

    before = num_threads()
    for _ in range(8):
        stream = loader.training_stream(batches, epoch=0)
        assert isinstance(stream, Iterator)
        next(stream)
        getattr(stream, "close")()  # noqa: B009 (an Iterator that is a generator)
    assert num_threads() <= before + 4
    np.testing.assert_array_equal(pixels(loader.training_stream(batches, epoch=0)), wanted)


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_what_a_batch_looks_like(
    small: ImageIndex, make: Callable[..., ImageLoader], channels_last: bool, mode: Literal["train", "evaluation"]
) -> None:
    """float32 images (n, 3, H, W) in the wanted memory order, int64 labels and indices, in the order of the lists."""
    loader = make(small, preprocessing(), channels_last=channels_last)
    batches = [np.array([7, 3, 3, 20]), np.array([1]), np.array([0, 23, 5])]
    stream = loader.training_stream(batches, epoch=0) if mode == "train" else loader.evaluation_stream(batches)
    order = torch.channels_last if channels_last else torch.contiguous_format
    for batch, indices in zip(stream, batches, strict=True):
        assert batch.images.shape == (len(indices), 3, 32, 32)
        assert batch.images.dtype == torch.float32 and batch.images.device == CPU
        assert batch.images.is_contiguous(memory_format=order)
        assert batch.images.is_contiguous() is not channels_last
        assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == small.labels[indices].tolist()
        assert batch.indices.dtype == np.int64 and batch.indices.tolist() == indices.tolist()


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
def test_the_memory_order_changes_no_number(small: ImageIndex, make: Callable[..., ImageLoader]) -> None:
    """channels_last and contiguous batches hold the same pixels."""
    batch = [np.arange(6)]
    one, other = (
        pixels(make(small, preprocessing(), channels_last=order).training_stream(batch, epoch=0)) for order in (True, False)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_normalisation(small: ImageIndex, make: Callable[..., ImageLoader], mode: str) -> None:
    """A value is (grey level / 255 - mean) / std of its channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def shown(work: Preprocessing) -> NDArray[np.float64]:
        loader, batch = make(small, work), [np.arange(6)]
        stream = loader.training_stream(batch, epoch=0) if mode == "train" else loader.evaluation_stream(batch)
        return pixels(stream).astype(np.float64)

    grey = shown(preprocessing())
    assert grey.min() >= 0 and 200 < grey.max() <= 255.001
    np.testing.assert_allclose(shown(preprocessing(mean=mean, std=std)), (grey / 255 - mean) / std, atol=2e-6)


@pytest.mark.parametrize("make", [dali_loader, torchvision_loader], ids=["dali", "torchvision"])
def test_no_lists_no_batches(small: ImageIndex, make: Callable[..., ImageLoader]) -> None:
    """A rank that has nothing to do gets an empty stream."""
    loader = make(small, preprocessing())
    assert list(loader.training_stream([], epoch=0)) == []
    assert list(loader.evaluation_stream([])) == []


def test_batches_may_grow(small: ImageIndex) -> None:
    """The batches' sizes may differ in any order; a single image's pixels do not depend on its batch."""
    loader = dali_loader(small, preprocessing())
    whole = pixels(loader.evaluation_stream([np.arange(24)]))
    for sizes in ([1, 5, 18], [18, 5, 1], [1] * 24):
        batches = np.split(np.arange(24), np.cumsum(sizes)[:-1])
        np.testing.assert_array_equal(pixels(loader.evaluation_stream(batches)), whole)


# ------------------------------------------------------------------------------------------------------- bad images


def _encoded(format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(96, 96)).save(buffer, format_, **options)
    return buffer.getvalue()


def _cut_in_the_middle(data: bytes) -> bytes:
    return data[: len(data) // 2]


BAD_CONTENTS: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"This is no picture.\n" * 20,
    "HTML": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "leading garbage": lambda: b"\r\n\r\n" + _encoded("JPEG"),
    "GIF": lambda: _encoded("GIF"),
    "header cut off": lambda: _encoded("JPEG")[:120],
    "first bytes only": lambda: _encoded("JPEG")[:8],
    "zero bytes": lambda: b"",
    "zeros": lambda: bytes(5000),
    "cut in the middle": lambda: _cut_in_the_middle(_encoded("JPEG")),
    "last bytes lost": lambda: _encoded("JPEG")[:-100],
    "progressive cut in the middle": lambda: _cut_in_the_middle(_encoded("JPEG", progressive=True)),
    "PNG cut in the middle": lambda: _cut_in_the_middle(_encoded("PNG")),
    "WebP cut in the middle": lambda: _cut_in_the_middle(_encoded("WEBP")),
}
BAD_KINDS = (*BAD_CONTENTS, "missing", "a directory", "a link to nothing")
REASONS = {
    "text": "starts with b'This is '",
    "HTML": "starts with b'<!DOCTYP'",
    "GIF": "starts with b'GIF8",
    "zero bytes": "the file is empty",
    "missing": "no such file",
    "a directory": "is a directory",
    "a link to nothing": "no such file",
    "cut in the middle": "damaged or cut short",
}
# The number of batches, and where among them the bad image is: (batch, place in the batch).
NUM_BATCHES, BATCH_SIZE = 5, 3
PLACES = ((0, 0), (2, 1), (4, 2))


def make_bad(path: Path, kind: str) -> None:
    if kind == "a directory":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind != "missing":
        path.write_bytes(BAD_CONTENTS[kind]())


def folder_with_one_bad_image(folder: Path, kind: str) -> ImageIndex:
    """Image 15 is the bad one; 0..14 are good."""
    names = [f"{i:03d}.JPEG" for i in range(15)]
    for i, name in enumerate(names):
        Image.fromarray(picture(60, 70, seed=i)).save(folder / name, quality=90)
    make_bad(folder / "the culprit.JPEG", kind)
    return index_of(folder, [*names, "the culprit.JPEG"])


def batches_with(bad: int, place: tuple[int, int]) -> list[Indices]:
    batches = np.arange(NUM_BATCHES * BATCH_SIZE).reshape(NUM_BATCHES, BATCH_SIZE).copy()
    batches[place] = bad
    return list(batches)


def expect_the_culprit(loader: ImageLoader, wanted: NDArray[np.float32], mode: str, place: tuple[int, int]) -> str:
    """All batches before the bad one come out right, then an error that names the bad file and no other."""
    batches = batches_with(15, place)
    stream = loader.training_stream(batches, epoch=0) if mode == "train" else loader.evaluation_stream(batches)
    delivered = []
    with pytest.raises(BadImageError) as error:
        for batch in stream:
            delivered.append(batch)
    assert len(delivered) == place[0]
    if delivered:
        np.testing.assert_array_equal(pixels(delivered), wanted[: place[0] * BATCH_SIZE])
    message = str(error.value)
    assert loader.index.path(15) in message and not any(f"{i:03d}.JPEG" in message for i in range(15))
    assert "cannot decode the image" in message and "repair it" in message and "\n" not in message
    assert next(stream, None) is None  # it does not go on with the images after it
    return message


def check_bad_kind(make: Callable[..., ImageLoader], folder: Path, kind: str, **changes: Any) -> str:
    # The whole image is decoded in training too: elsewhere a window may end above the cut.
    work = preprocessing(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    index, message = folder_with_one_bad_image(folder, kind), ""
    for mode in ("evaluation", "train"):
        good = list(np.arange(15).reshape(NUM_BATCHES, BATCH_SIZE))
        loader = make(index, work, **changes)
        wanted = pixels(loader.training_stream(good, epoch=0) if mode == "train" else loader.evaluation_stream(good))
        for place in PLACES:
            message = expect_the_culprit(loader, wanted, mode, place)
    return message


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_a_bad_image_is_named(tmp_path: Path, kind: str) -> None:
    """An image that cannot be decoded ends the stream by its name, wherever it is and however far DALI ran ahead."""
    message = check_bad_kind(dali_loader, tmp_path, kind, prefetch=4)
    assert REASONS.get(kind, "") in message


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_a_bad_image_is_named_by_torchvision_too(tmp_path: Path, kind: str) -> None:
    """Both backends refuse the same files."""
    check_bad_kind(torchvision_loader, tmp_path, kind)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_of_two_bad_images_the_first_in_order_is_named(tmp_path: Path, prefetch: int) -> None:
    """The error names the bad image that is due first, not the one that was met first while reading ahead."""
    index = folder_with_one_bad_image(tmp_path, "cut in the middle")
    Path(index.path(9)).write_bytes(b"")
    stream = dali_loader(index, preprocessing(), prefetch=prefetch).evaluation_stream(
        [np.array([0, 1]), np.array([2, 15]), np.array([9, 3]), np.array([4, 5])]
    )
    next(stream)
    with pytest.raises(BadImageError, match="the culprit"):
        next(stream)


def test_after_a_bad_image_the_loader_still_works(tmp_path: Path) -> None:
    """A stream that ended in an error does not spoil the next one."""
    index = folder_with_one_bad_image(tmp_path, "text")
    loader, good = dali_loader(index, preprocessing()), [np.arange(15)]
    before = pixels(loader.evaluation_stream(good))
    with pytest.raises(BadImageError):
        list(loader.evaluation_stream([np.arange(16)]))
    np.testing.assert_array_equal(pixels(loader.evaluation_stream(good)), before)


def test_a_crop_above_the_cut_is_as_in_the_whole_file(tmp_path: Path) -> None:
    """Training decodes the window only: where that ends above the damage, the pixels are the undamaged file's."""
    data = _encoded("JPEG", quality=90)
    (tmp_path / "whole.JPEG").write_bytes(data)
    (tmp_path / "cut.JPEG").write_bytes(_cut_in_the_middle(data))
    names = ["whole.JPEG", "cut.JPEG"]
    work = preprocessing(crop_area=(0.04, 0.08))
    good, bad = 0, 0
    for seed in range(16):
        cut = dali_loader(index_of(tmp_path, names[1:]), work, seed=seed).training_stream([np.array([0])], epoch=0)
        whole = dali_loader(index_of(tmp_path, names[:1]), work, seed=seed)
        ((window,),) = whole.windows([np.array([0])], epoch=0)
        bottom = window[0] + window[2]
        try:
            shown = pixels(cut)
        except BadImageError:
            bad += 1
            assert bottom > 96 * 0.3  # the cut is somewhere in the middle
            continue
        good += 1
        assert bottom < 96 * 0.7
        np.testing.assert_array_equal(shown, pixels(whole.training_stream([np.array([0])], epoch=0)))
    assert good > 2 and bad > 2


# ------------------------------------------------------------------------------------------------------------- GPU

GPU_MEAN = 1.0  # grey levels, mean of an image


def gpu_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    arguments: dict[str, Any] = {"device": torch.device("cuda", 0), "decode_on_gpu": True}
    return dali_loader(index, work, **arguments | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("decode_on_gpu", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gpu_evaluation_pixels_are_torchvisions(generated: ImageIndex, interpolation: str, decode_on_gpu: bool) -> None:
    """Decoded on the GPU, an evaluation image is torchvision's to a grey level on average; decoded on the CPU, to 0.3."""
    work = preprocessing(interpolation=interpolation, **IMAGENET)
    loader = gpu_loader(generated, work, decode_on_gpu=decode_on_gpu)
    got = pixels(loader.evaluation_stream(in_pieces(range(len(generated)), 8)))
    wanted = [torchvision_pixels(generated.path(i), work) for i in range(len(generated))]
    check_close(got, wanted, names_in(generated), mean=GPU_MEAN if decode_on_gpu else 0.3, largest=None)


@pytest.mark.gpu
@pytest.mark.realdata
def test_gpu_pixels_of_imagenet(real_data: Path) -> None:
    """On ImageNet's own files the GPU decoder agrees with torchvision and with the CPU's crops to a grey level on average."""
    index = index_list(real_data / "train.txt", real_data / "train", 1000)
    work, batches = preprocessing(**IMAGENET), in_pieces(range(len(index)), 32)
    got = pixels(gpu_loader(index, work).evaluation_stream(batches))
    check_close(
        got, [torchvision_pixels(index.path(i), work) for i in range(len(index))], names_in(index), mean=GPU_MEAN, largest=None
    )
    got = pixels(gpu_loader(index, work).training_stream(batches, epoch=0))
    wanted = pixels(dali_loader(index, work).training_stream(batches, epoch=0)).astype(np.float64)
    check_close(got, list(wanted), names_in(index), mean=GPU_MEAN, largest=None)


@pytest.mark.gpu
@pytest.mark.parametrize("decode_on_gpu", [True, False])
def test_gpu_training_pixels_are_pils(generated: ImageIndex, decode_on_gpu: bool) -> None:
    """Decoded on the GPU, a random crop is PIL's to a grey level on average, with the same flips."""
    work = preprocessing(image_size=224, resize=224)
    everything = np.arange(len(generated))
    loader = gpu_loader(generated, work, seed=3, decode_on_gpu=decode_on_gpu)
    got = pixels(loader.training_stream(in_pieces(everything, 5), epoch=2))
    wanted = [pil_training_pixels(generated, i, work, 3, 2) for i in range(len(generated))]
    check_close(got, wanted, names_in(generated), mean=GPU_MEAN if decode_on_gpu else 0.3, largest=None)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False])
def test_gpu_batches(small: ImageIndex, channels_last: bool) -> None:
    """Images and labels lie on the GPU in the wanted memory order; indices stay in host memory."""
    loader = gpu_loader(small, preprocessing(), channels_last=channels_last)
    batches = [np.array([7, 3, 3, 20]), np.array([1, 0])]
    order = torch.channels_last if channels_last else torch.contiguous_format
    for batch, indices in zip(loader.training_stream(batches, epoch=0), batches, strict=True):
        assert batch.images.device == torch.device("cuda", 0) and batch.labels.device == torch.device("cuda", 0)
        assert batch.images.shape == (len(indices), 3, 32, 32) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=order)
        assert batch.labels.tolist() == small.labels[indices].tolist()
        assert batch.indices.tolist() == indices.tolist()


@pytest.mark.gpu
def test_gpu_batches_survive_a_slow_network(small: ImageIndex) -> None:
    """Batches that the GPU gets to only much later still hold their own pixels, not those of the batches behind them."""
    loader, batches = gpu_loader(small, preprocessing()), in_pieces(range(len(small)), 3)
    wanted = pixels(loader.evaluation_stream(batches))
    late = []
    torch.cuda.synchronize()
    for batch in loader.evaluation_stream(batches):
        torch.cuda._sleep(50_000_000)  # cycles: the stream falls behind the host
        late.append(batch.images.clone())
    np.testing.assert_array_equal(torch.cat(late).permute(0, 2, 3, 1).cpu().numpy(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gpu_global_batches_are_the_same_for_any_number_of_processes(
    small: ImageIndex, world_size: int, num_threads: int
) -> None:
    """Crops and flips are the same for any ranks, threads and batches where a GPU decodes.

    The pixels to a grey level on average: which images a GPU gives to its hardware decoder may depend on the batch.
    """
    where = {"device": torch.device("cuda", 0), "decode_on_gpu": True}
    whole = global_batches(small, seed=1, epoch=2, world_size=1, batch_size_per_device=8, **where)
    split = global_batches(
        small, seed=1, epoch=2, world_size=world_size, batch_size_per_device=2, num_threads=num_threads, **where
    )
    wanted = list(whole.reshape(-1, 32, 32, 3).astype(np.float64))
    check_close(split.reshape(-1, 32, 32, 3), wanted, [str(i) for i in range(len(wanted))], mean=GPU_MEAN, largest=None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BAD_KINDS)
def test_gpu_names_a_bad_image(tmp_path: Path, kind: str) -> None:
    """Decoding on the GPU refuses the same files by name."""
    check_bad_kind(gpu_loader, tmp_path, kind, prefetch=4)
