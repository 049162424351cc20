"""Three loaders (DALI with the compiled resize, with DALI's own, torchvision) against PIL, torchvision, numpy and each other."""

import io
import os
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import index_folder, index_list, index_names, preprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from small_loaders import CPU, compiled_loader, dali_loader, torchvision_loader
from torchvision import transforms

from imagenet_swa.config import Preprocessing
from imagenet_swa.data import dali_pipeline, resize, storage
from imagenet_swa.data.batch import BadImageError, BadImages, Batch, ImageLoader, TooManyBadImagesError
from imagenet_swa.data.dali import DaliLoader
from imagenet_swa.data.dali_pipeline import PipelineMaker
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.sampling import CropDraws, Indices, crop_windows, draw_crops, training_batches
from imagenet_swa.data.sources import Source, scan

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRANSFORM_FILTERS = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}
IMAGENET = {"image_size": 224, "resize": 256}
Mode = Literal["train", "evaluation"]
MODES: tuple[Mode, ...] = ("train", "evaluation")


# ---------------------------------------------------------------------------------------------------------- helpers


MakeLoader = Callable[..., ImageLoader]
NEEDS_COMPILER = pytest.mark.skipif(not resize.available(), reason="the compiled part was not built")
COMPILED = pytest.param(compiled_loader, id="compiled", marks=NEEDS_COMPILER)
DALI, TORCHVISION = pytest.param(dali_loader, id="dali"), pytest.param(torchvision_loader, id="torchvision")
every_loader = pytest.mark.parametrize("make", [COMPILED, DALI, TORCHVISION])
every_dali_loader = pytest.mark.parametrize("make", [COMPILED, DALI])
every_mode = pytest.mark.parametrize("mode", MODES)


def stream_of(loader: ImageLoader, mode: Mode, batches: Iterable[Indices], epoch: int = 0) -> Any:
    return loader.training_stream(batches, epoch=epoch) if mode == "train" else loader.evaluation_stream(batches)


def index_of(folder: Path, names: Iterable[str]) -> ImageIndex:
    return index_names(folder, [os.fsencode(name) for name in names])


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


def grey_levels(batches: Iterable[Batch]) -> NDArray[np.int64]:
    """(n, H, W, 3) as whole numbers, which all of them have to be."""
    values = pixels(batches)
    whole = np.rint(values)
    np.testing.assert_allclose(values, whole, rtol=0, atol=1e-3)
    return whole.astype(np.int64)


def opened(path: str) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def torchvision_pixels(path: str, work: Preprocessing) -> NDArray[np.float64]:
    """What the reference preprocessing of torchvision makes of a file for evaluation, grey levels (H, W, 3)."""
    larger = transforms.Resize(work.resize, interpolation=TRANSFORM_FILTERS[work.interpolation], antialias=True)
    return np.asarray(transforms.CenterCrop(work.image_size)(larger(opened(path))), np.float64)


def crop_draws(work: Preprocessing, indices: Indices, seed: int, epoch: int) -> CropDraws:
    flip = work.horizontal_flip
    return draw_crops(indices, seed=seed, epoch=epoch, area=work.crop_area, aspect=work.crop_aspect, horizontal_flip=flip)


def training_crop(index: ImageIndex, number: int, work: Preprocessing, seed: int, epoch: int) -> tuple[Image.Image, bool]:
    """The image's crop cut out by PIL, and whether to mirror it."""
    draws, image = crop_draws(work, np.array([number]), seed, epoch), opened(index.path(number))
    window = crop_windows(draws, np.array([image.height]), np.array([image.width]), aspect=work.crop_aspect)
    top, left, height, width = map(int, window[0])
    return image.crop((left, top, left + width, top + height)), bool(draws.flip[0])


def pil_training_pixels(index: ImageIndex, number: int, work: Preprocessing, seed: int, epoch: int) -> NDArray[np.float64]:
    """The image's crop cut out, resized and mirrored by PIL alone, grey levels (H, W, 3)."""
    crop, flip = training_crop(index, number, work, seed, epoch)
    crop = crop.resize((work.image_size, work.image_size), PIL_FILTERS[work.train_interpolation])
    return np.asarray(ImageOps.mirror(crop) if flip else crop, np.float64)


def in_two_passes(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """PIL's resize, first across, then down: one call of Pillow 13 takes whichever order is faster, which rounds otherwise."""
    across = image.resize((size[0], image.height), PIL_FILTERS[interpolation])
    return across.resize(size, PIL_FILTERS[interpolation])


def pil_pixels(index: ImageIndex, number: int, work: Preprocessing, mode: Mode, seed: int = 0, epoch: int = 0) -> NDArray[Any]:
    """Either stream's image by PIL's resize in two passes, with torchvision's sizes and crop, grey levels (H, W, 3)."""
    if mode == "evaluation":
        image = opened(index.path(number))
        size = transforms.Resize(work.resize)(image).size
        return np.asarray(transforms.CenterCrop(work.image_size)(in_two_passes(image, size, work.interpolation)))
    crop, flip = training_crop(index, number, work, seed, epoch)
    crop = in_two_passes(crop, (work.image_size, work.image_size), work.train_interpolation)
    return np.asarray(ImageOps.mirror(crop) if flip else crop)


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


@every_loader
def test_exif_orientation_is_ignored(generated: ImageIndex, make: MakeLoader) -> None:
    """A JPEG that asks to be turned is shown unturned, as torchvision's ImageFolder shows it."""
    names = names_in(generated)
    turned, plain = names.index("turned by EXIF.JPEG"), names.index("progressive.JPEG")
    work = preprocessing(**IMAGENET)
    as_file, same_picture = pixels(make(generated, work).evaluation_stream([np.array([turned, plain])]))
    assert np.abs(as_file - same_picture).mean() < 3  # one picture, encoded twice
    with Image.open(generated.path(turned)) as file:
        upright = ImageOps.exif_transpose(file)
    assert upright is not None and upright.size == (301, 407)
    shown = pixels(make(generated, work, seed=4).training_stream([np.array([turned])], epoch=0))
    check_close(shown, [pil_training_pixels(generated, turned, work, 4, 0)], ["turned"], mean=0.3, largest=None)


def check_equal(index: ImageIndex, work: Preprocessing, mode: Mode, numbers: Sequence[int]) -> NDArray[np.int64]:
    """The compiled loader shows the very pixels of PIL's two passes, borders included."""
    got = grey_levels(stream_of(compiled_loader(index, work, seed=3), mode, in_pieces(numbers, 7), epoch=2))
    for number, image in zip(numbers, got, strict=True):
        wanted = pil_pixels(index, number, work, mode, seed=3, epoch=2)
        np.testing.assert_array_equal(image, wanted, err_msg=index.path(number))
    return got


@NEEDS_COMPILER
@every_mode
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [IMAGENET, {"image_size": 96, "resize": 96}, {"image_size": 97, "resize": 130}])
def test_compiled_pixels_are_pils(generated: ImageIndex, interpolation: str, sizes: dict[str, int], mode: Mode) -> None:
    """With the compiled resize both streams show PIL's pixels to the last bit, at the border and without a margin too."""
    work = preprocessing(interpolation=interpolation, train_interpolation=interpolation, **sizes)
    check_equal(generated, work, mode, range(len(generated)))


@NEEDS_COMPILER
@every_mode
def test_compiled_pixels_are_torchvisions_where_pillow_has_one_answer(generated: ImageIndex, mode: Mode) -> None:
    """The compiled resize and the torchvision loader agree to the last bit, but where Pillow 13 takes its passes in the other
    order: there to a grey level.
    """
    work, numbers = preprocessing(**IMAGENET), range(len(generated))
    got = check_equal(generated, work, mode, numbers)
    other = grey_levels(stream_of(torchvision_loader(generated, work, seed=3), mode, in_pieces(numbers, 7), epoch=2))
    assert np.abs(got - other).max() <= 1
    equal = [(a == b).all() for a, b in zip(got, other, strict=True)]
    assert sum(equal) >= 0.6 * len(equal)


@NEEDS_COMPILER
@pytest.mark.realdata
@every_mode
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_compiled_pixels_of_imagenet_are_pils(real_data: Path, interpolation: str, mode: Mode) -> None:
    """The same on ImageNet's own files."""
    index = index_list(real_data / "train.txt", real_data / "train")
    work = preprocessing(interpolation=interpolation, train_interpolation=interpolation, **IMAGENET)
    check_equal(index, work, mode, range(0, len(index), 4))


@pytest.mark.realdata
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_pixels_of_imagenet_are_torchvisions(real_data: Path, interpolation: str) -> None:
    """On ImageNet's own files DALI agrees with torchvision to 0.3 grey levels on average, bilinear to 1 at most."""
    index = index_list(real_data / "train.txt", real_data / "train")
    assert len(index) == 154
    work = preprocessing(interpolation=interpolation, **IMAGENET)
    got = pixels(dali_loader(index, work).evaluation_stream(in_pieces(range(154), 32)))
    wanted = [torchvision_pixels(index.path(i), work) for i in range(154)]
    check_close(got, wanted, names_in(index), mean=0.3, largest=1 if interpolation == "bilinear" else None)


# ------------------------------------------------------------------------------------- kinds of files beyond the usual


@every_loader
@every_mode
def test_cmyk_differs_by_two_grey_levels_at_most(tmp_path: Path, make: MakeLoader, mode: Mode) -> None:
    """A CMYK JPEG has PIL's colours but for the rounding of the conversion."""
    Image.fromarray(picture(300, 400, 4), "CMYK").save(tmp_path / "cmyk.JPEG", quality=92)
    index, work = index_of(tmp_path, ["cmyk.JPEG"]), preprocessing(**IMAGENET)
    got = pixels(stream_of(make(index, work), mode, [np.array([0])]))
    check_close(got, [pil_pixels(index, 0, work, mode).astype(np.float64)], ["cmyk"], mean=1, largest=3)


@every_dali_loader
def test_sixteen_bits_become_eight(tmp_path: Path, make: MakeLoader) -> None:
    """A 16-bit PNG is shown as its upper eight bits."""
    grey = picture(300, 400, 1)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "8.png")
    index, work = index_of(tmp_path, ["16.png", "8.png"]), preprocessing(**IMAGENET)
    sixteen, eight = pixels(make(index, work).evaluation_stream([np.arange(2)]))
    assert np.abs(sixteen - eight).max() <= 1


FORMATS = ("palette.png", "alpha.png", "grey.png", "bitmap.bmp", "portable.ppm", "portable.pgm", "tagged.tiff", "lossy.webp")


@every_mode
@every_loader
def test_other_formats_of_the_index_decode_as_in_pil(tmp_path: Path, make: MakeLoader, mode: Mode) -> None:
    """Every kind of file that the index takes has PIL's pixels: with the compiled resize to the last bit."""
    for name in FORMATS:
        image = Image.fromarray(picture(300, 400, 4 if name == "alpha.png" else 3))
        kind = {"palette.png": "P", "grey.png": "L", "portable.pgm": "L"}.get(name)
        (image.convert(kind) if kind else image).save(tmp_path / name)
    index, work = index_of(tmp_path, FORMATS), preprocessing(**IMAGENET)
    got = pixels(stream_of(make(index, work), mode, [np.arange(len(FORMATS))]))
    wanted = [pil_pixels(index, number, work, mode).astype(np.float64) for number in range(len(FORMATS))]
    check_close(got, wanted, list(FORMATS), mean=0.3, largest=2)
    if make is compiled_loader:
        check_close(got, wanted, list(FORMATS), mean=0.001, largest=0)


@every_loader
def test_a_hundred_million_pixels(tmp_path: Path, make: MakeLoader) -> None:
    """An image of 10,000 x 10,000 goes through both streams."""
    pattern = np.tile(np.linspace(0, 255, 10_000).astype(np.uint8), (10_000, 1))
    Image.fromarray(pattern).save(tmp_path / "large.JPEG", quality=50)
    index, work = index_of(tmp_path, ["large.JPEG"]), preprocessing(crop_area=(0.25, 0.3))
    wanted = np.asarray(Image.fromarray(pattern).resize((36, 36)))[2:34, 2:34, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        (shown,) = pixels(make(index, work).evaluation_stream([np.array([0])]))
        (cropped,) = pixels(make(index, work).training_stream([np.array([0])], epoch=0))
    assert np.abs(shown - wanted).max() <= 3
    assert 255 * 0.4 < np.ptp(cropped) < 255 * 0.7  # half of the ramp from black to white, more or less


@every_loader
def test_flipped_bytes_show_what_pil_shows(tmp_path: Path, make: MakeLoader) -> None:
    """Damage that a JPEG decoder cannot notice gives the same wrong pixels as in PIL: flipped bytes, a lost end replaced."""
    data = encoded("JPEG", quality=90)
    middle = len(data) // 2
    contents = {
        "sound": data,
        "zeros inside": data[:middle] + bytes(40) + data[middle + 40 :],
        "zeros from the middle on": data[:middle] + bytes(len(data) - middle),
        "text from the middle on": data[:middle] + b"404 Not Found " * 300,
        "an end after the middle": data[:middle] + b"\xff\xd9",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    index, work = index_of(tmp_path, contents), preprocessing(**IMAGENET)
    for mode in MODES:
        got = pixels(stream_of(make(index, work), mode, [np.arange(len(contents))]))
        wanted = [pil_pixels(index, i, work, mode).astype(np.float64) for i in range(len(contents))]
        check_close(got[:, 1:-1, 1:-1], [image[1:-1, 1:-1] for image in wanted], list(contents), mean=0.3, largest=1)
    sound, *damaged = (pil_pixels(index, i, work, "evaluation").astype(np.float64) for i in range(len(contents)))
    assert all(np.abs(sound - image).mean() > 2 for image in damaged)


@every_loader
@every_mode
def test_bytes_after_the_end_are_no_damage(tmp_path: Path, make: MakeLoader, mode: Mode) -> None:
    """A JPEG, PNG or WebP with more bytes after its proper end, few or many, is the picture without them."""
    for number, (kind, tail) in enumerate((kind, tail) for kind in ("JPEG", "PNG", "WEBP") for tail in (b"", b"\n", bytes(5000))):
        (tmp_path / f"{number}").write_bytes(encoded(kind) + tail)
    index = index_of(tmp_path, [str(number) for number in range(9)])
    # Of one number, so that all have one crop.
    shown = [
        pixels(stream_of(make(index_of(tmp_path, [str(i)]), preprocessing()), mode, [np.array([0])])) for i in range(len(index))
    ]
    for i in range(9):
        np.testing.assert_array_equal(shown[i], shown[i - i % 3])


@every_loader
@pytest.mark.parametrize("height,width", [(1, 1), (1, 60), (60, 1), (3, 2), (2, 900)])
def test_images_of_a_few_pixels(tmp_path: Path, make: MakeLoader, height: int, width: int) -> None:
    """Even an image one pixel high goes through both streams, with torchvision's pixels."""
    Image.fromarray(picture(height, width)).save(tmp_path / "tiny.png")
    index, work = index_of(tmp_path, ["tiny.png"]), preprocessing()
    loader = make(index, work)
    got = pixels(loader.evaluation_stream([np.array([0])]))
    check_close(got, [torchvision_pixels(index.path(0), work)], ["tiny"], mean=0.3, largest=1)
    got = pixels(loader.training_stream([np.array([0])], epoch=0))
    check_close(got, [pil_training_pixels(index, 0, work, 0, 0)], ["tiny"], mean=0.3, largest=1)


NAMES = ("with space.JPEG", "Ünïcödé 象.JPEG", os.fsdecode(b"not \xff\xfe UTF-8.JPEG"), "quo'te\"s;&$(x).JPEG", "new\nline.JPEG")


@every_loader
def test_any_file_name_will_do(tmp_path: Path, make: MakeLoader) -> None:
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


CROPS = {
    "usual": {},
    "whole image": {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)},
    "narrow and wide": {"crop_area": (0.01, 1.0), "crop_aspect": (0.1, 10.0)},
    "one aspect": {"crop_area": (0.5, 0.9), "crop_aspect": (2.5, 2.5)},
    "always high": {"crop_area": (0.9, 1.0), "crop_aspect": (0.2, 0.3)},
}


LONG = ((1, 3000), (3000, 1), (2, 60_000), (50_000, 3), (7, 2000), (400, 30), (200, 210), (64, 64))


@pytest.fixture(scope="module")
def long_images(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Ramps from one end to the other, of extreme shapes: each place has its colour."""
    folder = tmp_path_factory.mktemp("long")
    for height, width in LONG:
        down, across = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
        ramps = np.stack([down, across, 255 - across], axis=-1).astype(np.uint8)
        Image.fromarray(ramps).save(folder / f"{height}x{width}.png")
    return index_of(folder, [f"{height}x{width}.png" for height, width in LONG])


@every_loader
@pytest.mark.parametrize("kind", CROPS)
def test_every_loader_shows_the_windows_of_sampling(long_images: ImageIndex, make: MakeLoader, kind: str) -> None:
    """All loaders cut the windows and flips of `sampling`, whatever the shape of the image and the range of crops."""
    work = preprocessing(**CROPS[kind])
    fell_back = 0
    for seed, epoch in ((0, 0), (2**63 - 1, 7)):
        got = pixels(make(long_images, work, seed=seed).training_stream(in_pieces(range(len(LONG)), 3), epoch=epoch))
        wanted = [pil_training_pixels(long_images, i, work, seed, epoch) for i in range(len(LONG))]
        check_close(got, wanted, names_in(long_images), mean=0.6, largest=2)
        draws = crop_draws(work, np.arange(len(LONG)), seed, epoch)
        for i, (height, width) in enumerate(LONG):
            root = (height * width) ** 0.5
            tries = zip(root * draws.height_factor[i], root * draws.width_factor[i], strict=True)
            fell_back += not any(0.5 <= h < height + 0.5 and 0.5 <= w < width + 0.5 for h, w in tries)
    assert fell_back >= 2  # the central window is among those seen


@pytest.mark.parametrize("seed", range(10))
def test_windows_where_the_last_bit_decides(seed: int) -> None:
    """With sides at half a pixel and places at whole ones, give or take a bit, a window lies inside its image."""
    random = np.random.default_rng(seed)

    def nudged(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values + random.integers(-2, 3, values.shape) * np.spacing(values)

    sizes = np.exp(random.uniform(0, np.log(65_500), (400, 2))).astype(np.int64)
    heights, widths = sizes.T
    root = np.sqrt((heights * widths).astype(np.float64))
    half_height, half_width = (np.floor(random.random(len(sizes)) * side) + 0.5 for side in (heights, widths))
    draws = CropDraws(
        width_factor=np.tile(nudged(half_width / root)[:, None], 10),
        height_factor=np.tile(nudged(half_height / root)[:, None], 10),
        top=np.clip(nudged(random.integers(1, 9, len(sizes)) / 9), 0, 1 - 2.0**-53),
        left=np.clip(nudged(random.integers(1, 100, len(sizes)) / 100), 0, 1 - 2.0**-53),
        flip=np.zeros(len(sizes), np.bool_),
    )
    top, left, height, width = crop_windows(draws, heights, widths, aspect=(3 / 4, 4 / 3)).T
    assert (np.minimum(top, left) >= 0).all() and (np.minimum(height, width) >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    found = (abs(height - half_height) <= 0.5) & (abs(width - half_width) <= 0.5)
    assert found.mean() > 0.8  # the others were rounded to nothing


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
    index = index_list(real_data / "train.txt", real_data / "train")
    work = preprocessing(**IMAGENET)
    batches = in_pieces(range(len(index)), 32)
    got = pixels(dali_loader(index, work, seed=1).training_stream(batches, epoch=3))
    wanted = pixels(torchvision_loader(index, work, seed=1).training_stream(batches, epoch=3)).astype(np.float64)
    check_close(got, list(wanted), names_in(index), mean=0.3, largest=None)
    inside = list(wanted[:, 1:-1, 1:-1])
    check_close(got[:, 1:-1, 1:-1], inside, names_in(index), mean=0.3, largest=1)


@every_loader
def test_no_flip_means_no_flip(generated: ImageIndex, make: MakeLoader) -> None:
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
    make: MakeLoader,
    index: ImageIndex,
    *,
    seed: int,
    epoch: int,
    world_size: int,
    batch_size_per_device: int,
    first_step: int = 0,
    **changes: Any,
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
        loader = make(index, preprocessing(), seed=seed, **changes)
        mine = pixels(loader.training_stream(batches.reshape(-1, batch_size_per_device), epoch=epoch))
        parts.append(mine.reshape(len(batches), 8 // world_size, *mine.shape[1:]))
    return np.concatenate(parts, axis=1)


@every_dali_loader
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_global_batches_are_the_same_for_any_number_of_processes_and_threads(
    small: ImageIndex, make: MakeLoader, data: st.DataObject
) -> None:
    """Ranks, threads, prefetching and the split into batches decide nothing about a single bit of the pixels."""
    seed, epoch = data.draw(st.integers(0, 2**63 - 1), "seed"), data.draw(st.integers(0, 50), "epoch")
    world_size = data.draw(st.sampled_from([1, 2, 4]), "world size")
    batch_size = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if 8 // world_size % n == 0]), "batch size")
    num_threads, prefetch = data.draw(st.integers(0, 3), "threads"), data.draw(st.integers(1, 4), "prefetch")
    whole = global_batches(make, small, seed=seed, epoch=epoch, world_size=1, batch_size_per_device=8)
    split = global_batches(
        make,
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


@every_loader
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_started_late_is_the_tail_of_the_whole(small: ImageIndex, make: MakeLoader, world_size: int) -> None:
    """From step k on, a new stream goes on exactly as one that ran from the start."""
    whole = global_batches(make, small, seed=5, epoch=1, world_size=world_size, batch_size_per_device=2)
    for step in range(3):
        tail = global_batches(make, small, seed=5, epoch=1, world_size=world_size, batch_size_per_device=2, first_step=step)
        np.testing.assert_array_equal(tail, whole[step:])


@pytest.fixture(scope="module")
def shards(small: ImageIndex, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """The images of `small` in three tar files, in the same order."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate(np.array_split(np.arange(len(small)), 3)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in numbers.tolist():
                for extension, content in (("jpg", small.read(i)), ("cls", str(small.labels[i]).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return scan(Source("train", f"{folder}/{{0..2}}.tar"), num_classes=3)[0]


@every_loader
@every_mode
def test_shards_are_files(small: ImageIndex, shards: ImageIndex, make: MakeLoader, mode: Mode) -> None:
    """Images in tar shards give the batches that they give as files, bit for bit, with their labels."""
    batches = list(np.random.default_rng(0).permutation(24).reshape(4, 6))
    files, members = (list(stream_of(make(index, preprocessing()), mode, batches, epoch=3)) for index in (small, shards))
    for file, member in zip(files, members, strict=True):
        assert torch.equal(file.images, member.images) and torch.equal(file.labels, member.labels)
        assert file.indices.tolist() == member.indices.tolist() and member.left_out == ()


@every_loader
def test_seeds_and_epochs_show_other_crops(small: ImageIndex, make: MakeLoader) -> None:
    """The same image is cropped differently under another seed and in another epoch."""
    everything = [np.arange(len(small))]
    shows = [
        pixels(make(small, preprocessing(), seed=seed).training_stream(everything, epoch=epoch))
        for seed, epoch in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))
    ]
    for i, one in enumerate(shows):
        for other in shows[:i]:
            assert (np.abs(one - other).mean(axis=(1, 2, 3)) > 1).all()


@every_loader
def test_streams_in_alternation_do_not_disturb_each_other(small: ImageIndex, make: MakeLoader) -> None:
    """Two streams over one loader give what each gives alone, also where they take turns."""
    loader, batches = make(small, preprocessing()), in_pieces(range(len(small)), 4)
    training, evaluation = pixels(loader.training_stream(batches, epoch=0)), pixels(loader.evaluation_stream(batches))
    streams = loader.training_stream(batches, epoch=0), loader.evaluation_stream(batches)
    turns = [(next(streams[0]), next(streams[1])) for _ in batches]
    np.testing.assert_array_equal(pixels(one for one, _ in turns), training)
    np.testing.assert_array_equal(pixels(other for _, other in turns), evaluation)
    assert all(next(stream, None) is None for stream in streams)


@every_loader
@every_mode
def test_batches_stay_as_they_were(small: ImageIndex, make: MakeLoader, mode: Mode) -> None:
    """A batch that was handed out is the taker's own: later batches do not write over it."""
    stream = stream_of(make(small, preprocessing()), mode, in_pieces(range(len(small)), 4))
    first = next(stream)
    before = first.images.clone()
    rest = list(stream)
    assert torch.equal(first.images, before)
    assert not torch.equal(first.images, rest[0].images)


# ------------------------------------------------------------------------------------------- what a stream leaves behind


def what_is_open() -> tuple[int, int, int]:
    """Numbers of Python's threads, of all threads and of open files."""
    of_process = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
    tasks, files = of_process if Path("/proc/self/task").is_dir() else (0, 0)
    return threading.active_count(), tasks, files


def settles_at_most(before: tuple[int, int, int], *, allowed: int) -> bool:
    """Whether there is soon no more open than before, but for some of the library's own threads."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = what_is_open()
        if now[0] <= before[0] and now[1] <= before[1] + allowed and now[2] <= before[2] + allowed:
            return True
        time.sleep(0.02)
    return False


@every_loader
@every_mode
@pytest.mark.parametrize("num_taken", [0, 1, 3, 12])
def test_an_abandoned_stream_does_no_harm(small: ImageIndex, make: MakeLoader, mode: Mode, num_taken: int) -> None:
    """Streams closed at once, half-way or at their end leave no thread and no file behind, and the loader as it was."""
    loader, batches = make(small, preprocessing()), in_pieces(range(len(small)), 2)
    wanted = pixels(stream_of(loader, mode, batches))
    before = what_is_open()
    for _ in range(6):
        with closing(stream_of(loader, mode, batches)) as stream:
            for _ in range(num_taken):
                next(stream)
    assert settles_at_most(before, allowed=2), (before, what_is_open(), threading.enumerate())
    np.testing.assert_array_equal(pixels(stream_of(loader, mode, batches)), wanted)


@every_loader
def test_a_stream_that_failed_leaves_no_thread(tmp_path: Path, make: MakeLoader) -> None:
    """A stream that ended at a bad image has ended its threads, also while someone still holds the error."""
    (tmp_path / "bad.JPEG").write_bytes(b"no picture")
    bad = index_names(tmp_path, [b"bad.JPEG"] * 40)
    before, errors = what_is_open(), []
    for _ in range(4):
        with pytest.raises(BadImageError) as error:
            list(make(bad, preprocessing()).evaluation_stream(in_pieces(range(40), 2)))
        errors.append(error)
    assert settles_at_most(before, allowed=2), (before, what_is_open(), threading.enumerate())


@every_loader
@every_mode
def test_a_stream_that_nobody_takes_does_not_run_away(
    small: ImageIndex, make: MakeLoader, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches there are, only a few are read ahead of who takes them: a multiple of `prefetch`."""
    reads: list[str] = []
    for function in (storage.read, storage.read_into):

        def noted(path: str, *arguments: Any, function: Callable[..., Any] = function, **options: Any) -> Any:
            reads.append(path)
            return function(path, *arguments, **options)

        monkeypatch.setattr(storage, function.__name__, noted)
    with closing(stream_of(make(small, preprocessing(), prefetch=2), mode, [np.arange(3)] * 60)) as stream:
        for num_taken in (1, 2, 10):
            while num_taken > 0:
                next(stream)
                num_taken -= 1
        seen = -1
        while seen != len(reads):
            seen = len(reads)
            time.sleep(0.15)
        assert 13 * 3 <= len(reads) <= (13 + 3 * 2 + 6) * 3


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@every_loader
def test_memory_does_not_grow(generated: ImageIndex, make: MakeLoader) -> None:
    """Once allocators have what they keep, an epoch leaves behind less than a fifth of its pixels, whole or abandoned."""
    loader, sizes = make(generated, preprocessing(**IMAGENET)), []
    for epoch in range(35):
        with closing(stream_of(loader, "train", in_pieces(range(len(generated)), 7), epoch=epoch)) as stream:
            for _ in range(1 if epoch % 4 == 3 else 3):
                next(stream)
        list(loader.evaluation_stream([np.arange(2)]))
        sizes.append(resident_bytes())
    of_an_epoch = len(generated) * 224 * 224 * 3 * 4
    assert sizes[-1] - sizes[14] < 20 * of_an_epoch / 5, [round(size / 1e6) for size in sizes]


# --------------------------------------------------------------------------------------------------------- batches


@every_loader
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_what_a_batch_looks_like(
    small: ImageIndex, make: MakeLoader, channels_last: bool, mode: Literal["train", "evaluation"]
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


@every_loader
def test_the_memory_order_changes_no_number(small: ImageIndex, make: MakeLoader) -> None:
    """channels_last and contiguous batches hold the same pixels."""
    batch = [np.arange(6)]
    one, other = (
        pixels(make(small, preprocessing(), channels_last=order).training_stream(batch, epoch=0)) for order in (True, False)
    )
    np.testing.assert_array_equal(one, other)


@every_loader
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_normalisation(small: ImageIndex, make: MakeLoader, mode: str) -> None:
    """A value is (grey level / 255 - mean) / std of its channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def shown(work: Preprocessing) -> NDArray[np.float64]:
        loader, batch = make(small, work), [np.arange(6)]
        stream = loader.training_stream(batch, epoch=0) if mode == "train" else loader.evaluation_stream(batch)
        return pixels(stream).astype(np.float64)

    grey = shown(preprocessing())
    assert grey.min() >= 0 and 200 < grey.max() <= 255.001
    np.testing.assert_allclose(shown(preprocessing(mean=mean, std=std)), (grey / 255 - mean) / std, atol=2e-6)


@every_loader
def test_no_lists_no_batches(small: ImageIndex, make: MakeLoader) -> None:
    """A rank that has nothing to do gets an empty stream."""
    loader = make(small, preprocessing())
    assert list(loader.training_stream([], epoch=0)) == []
    assert list(loader.evaluation_stream([])) == []


@every_loader
@every_mode
def test_batches_may_have_any_sizes(small: ImageIndex, make: MakeLoader, mode: Mode) -> None:
    """The batches' sizes may differ in any order, down to none at all; an image's pixels do not depend on its batch."""
    loader = make(small, preprocessing())
    whole = pixels(stream_of(loader, mode, [np.arange(24)]))
    for sizes in ([1, 5, 18], [18, 5, 1], [1] * 24, [0, 12, 0, 12], [24, 0]):
        batches = np.split(np.arange(24), np.cumsum(sizes)[:-1])
        shown = list(stream_of(loader, mode, batches))
        assert [len(batch.images) for batch in shown] == [len(batch.labels) for batch in shown] == sizes
        np.testing.assert_array_equal(pixels(shown), whole)


# ------------------------------------------------------------------------------------------------------- bad images


def encoded(format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(96, 96)).save(buffer, format_, **options)
    return buffer.getvalue()


def cut_in_the_middle(data: bytes) -> bytes:
    return data[: len(data) // 2]


def broken(marker: bytes, offset: int, replacement: bytes) -> bytes:
    """A JPEG with other bytes somewhere behind its last such marker."""
    data = encoded("JPEG", quality=90)
    start = data.rindex(marker) + offset
    return data[:start] + replacement + data[start + len(replacement) :]


# A JPEG with its end in place that only the decoder finds out.
MET_BY_THE_DECODER: dict[str, Callable[[], bytes]] = {
    "no such Huffman table": lambda: broken(b"\xff\xda", 6, b"\x33"),
    "broken Huffman table": lambda: broken(b"\xff\xc4", 5, b"\xff" * 16),
    "no such component": lambda: broken(b"\xff\xda", 5, b"\x77"),
}
NOISE = np.random.default_rng(0).bytes(3000)
BAD_CONTENTS: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"This is no picture.\n" * 20,
    "HTML": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "leading garbage": lambda: b"\r\n\r\n" + encoded("JPEG"),
    "GIF": lambda: encoded("GIF"),
    "header cut off": lambda: encoded("JPEG")[:120],
    "first bytes only": lambda: encoded("JPEG")[:8],
    "zero bytes": lambda: b"",
    "zeros": lambda: bytes(5000),
    "cut in the middle": lambda: cut_in_the_middle(encoded("JPEG")),
    "cut, then noise": lambda: cut_in_the_middle(encoded("JPEG", quality=90)) + NOISE,
    "last bytes lost": lambda: encoded("JPEG")[:-100],
    "last byte lost": lambda: encoded("JPEG")[:-1],
    "last two bytes lost": lambda: encoded("JPEG")[:-2],
    "progressive cut in the middle": lambda: cut_in_the_middle(encoded("JPEG", progressive=True)),
    "PNG cut in the middle": lambda: cut_in_the_middle(encoded("PNG")),
    "PNG without its end": lambda: encoded("PNG")[:-12],
    "PNG with a flipped byte": lambda: encoded("PNG")[:2000] + b"\x00\x00" + encoded("PNG")[2002:],
    "WebP cut in the middle": lambda: cut_in_the_middle(encoded("WEBP")),
    "BMP cut in the middle": lambda: cut_in_the_middle(encoded("BMP")),
    "PPM cut in the middle": lambda: cut_in_the_middle(encoded("PPM")),
    "TIFF cut in the middle": lambda: cut_in_the_middle(encoded("TIFF")),
    "TIFF that lost a row": lambda: encoded("TIFF")[:-288],
    "a header of 20,000 x 20,000": lambda: broken(b"\xff\xc0", 5, (20_000).to_bytes(2, "big") * 2),
    "a header without height": lambda: broken(b"\xff\xc0", 5, bytes(2)),
    **MET_BY_THE_DECODER,
}
IN_THE_FILE_SYSTEM = ("missing", "a directory", "a link to nothing", "no permission", "grown", "shrunk", "emptied")
BAD_KINDS = (*BAD_CONTENTS, *IN_THE_FILE_SYSTEM)
REASONS = {
    "text": "starts with b'This is '",
    "HTML": "starts with b'<!DOCTYP'",
    "GIF": "starts with b'GIF8",
    "zero bytes": "the file is empty",
    "missing": "no such file",
    "a directory": "is a directory",
    "a link to nothing": "no such file",
    "no permission": "permission denied",
    "cut in the middle": "truncated",
    "PNG without its end": "its end is missing",
    "grown": "bytes are there where the index says",
    "shrunk": "it changed since `imagenet-swa index`",
    "emptied": "0 bytes are there where the index says",
    "a header of 20,000 x 20,000": "exceeds limit",
}
# The number of batches, and where among them the bad image is: (batch, place in the batch).
NUM_BATCHES, BATCH_SIZE, CULPRIT = 5, 3, 15
PLACES = ((0, 0), (2, 1), (4, 2))
every_bad_kind = pytest.mark.parametrize("kind", BAD_KINDS)


def make_bad(path: Path, kind: str) -> int:
    """Leaves what `kind` says at the path; the size that it had when it was indexed, -1 if nobody looked."""
    sound = encoded("JPEG")
    if kind == "a directory":
        path.mkdir()
        return 4096
    if kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind in ("grown", "shrunk", "emptied"):
        path.write_bytes({"grown": sound + b"more", "shrunk": sound[:-300], "emptied": b""}[kind])
        return len(sound)
    elif kind == "no permission":
        path.write_bytes(sound)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    elif kind != "missing":
        path.write_bytes(BAD_CONTENTS[kind]())
    return -1


def folder_with_bad_images(folder: Path, *kinds: str) -> ImageIndex:
    """Images 0..14 are good, from CULPRIT on they are bad."""
    names = [f"{i:03d}.JPEG" for i in range(CULPRIT)]
    for i, name in enumerate(names):
        Image.fromarray(picture(60, 70, seed=i)).save(folder / name, quality=90)
    bad = [f"the culprit {number}.JPEG" for number in range(len(kinds))]
    sizes = [make_bad(folder / name, kind) for name, kind in zip(bad, kinds, strict=True)]
    encoded_names = [os.fsencode(name) for name in (*names, *bad)]
    labels = [i % 7 for i in range(len(encoded_names))]
    return make_index(str(folder), encoded_names, labels, [-1] * CULPRIT + sizes)


def batches_with(bad: dict[tuple[int, int], int]) -> list[Indices]:
    """The good images in order, some of them replaced."""
    batches = np.arange(NUM_BATCHES * BATCH_SIZE).reshape(NUM_BATCHES, BATCH_SIZE).copy()
    for place, number in bad.items():
        batches[place] = number
    return list(batches)


def good_pixels(loader: ImageLoader, mode: Mode) -> NDArray[np.float32]:
    """Images 0..14 as the stream shows them where none is bad."""
    return pixels(stream_of(loader, mode, batches_with({})))


def expect_the_culprit(loader: ImageLoader, wanted: NDArray[np.float32], mode: Mode, place: tuple[int, int]) -> str:
    """All batches before the bad one come out right, then an error that names the bad file and no other."""
    stream = stream_of(loader, mode, batches_with({place: CULPRIT}))
    delivered = []
    with pytest.raises(BadImageError) as error:
        for batch in stream:
            delivered.append(batch)
    assert len(delivered) == place[0]
    if delivered:
        np.testing.assert_array_equal(pixels(delivered), wanted[: place[0] * BATCH_SIZE])
    message = str(error.value)
    assert loader.index.path(CULPRIT) in message and not any(f"{i:03d}.JPEG" in message for i in range(CULPRIT))
    for words in ("cannot decode the image", "repair it", "data.quarantine", "imagenet-swa verify", "data.on_bad_image to skip"):
        assert words in message
    assert "\n" not in message and len(message) < 600 + len(loader.index.path(CULPRIT))
    assert next(stream, None) is None  # it does not go on with the images after it
    return message


def check_left_out(batches: Sequence[Batch], asked: list[Indices], wanted: NDArray[np.float32]) -> None:
    """All that is good of what was asked for is there, in order, with the bits that it has where nothing is bad."""
    for batch, indices in zip(batches, asked, strict=True):
        kept = [i for i in indices.tolist() if i < CULPRIT]
        assert batch.indices.dtype == np.int64 and batch.indices.tolist() == kept
        assert sorted(batch.left_out) == sorted(i for i in indices.tolist() if i >= CULPRIT)
        assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [i % 7 for i in kept]
        assert batch.images.shape == (len(kept), 3, 32, 32) and batch.images.dtype == torch.float32
        np.testing.assert_array_equal(pixels([batch]), wanted[kept])


def check_named(make: MakeLoader, folder: Path, kind: str, **changes: Any) -> str:
    """Wherever the bad image is, in both streams; the last message."""
    index, message = folder_with_bad_images(folder, kind), ""
    for mode in MODES:
        loader = make(index, preprocessing(), **changes)
        wanted = good_pixels(loader, mode)
        for place in PLACES:
            message = expect_the_culprit(loader, wanted, mode, place)
    return message


@every_loader
@every_bad_kind
def test_a_bad_image_is_named(tmp_path: Path, make: MakeLoader, kind: str) -> None:
    """An image that cannot be decoded ends the stream by its name, wherever it is and however far the loader ran ahead."""
    message = check_named(make, tmp_path, kind, prefetch=4)
    assert REASONS.get(kind, "") in message


def check_skipped(make: MakeLoader, folder: Path, kind: str, **changes: Any) -> None:
    """Left out in both streams, in the first batch and the last, and named once in all."""
    index, log = folder_with_bad_images(folder, kind), folder / "log.tsv"
    bad_images = BadImages(index, "skip", 1, split="val", log=log)
    loader = make(index, preprocessing(), bad_images=bad_images, **changes)
    for mode in MODES:
        wanted = good_pixels(loader, mode)
        for place in PLACES:
            batches = batches_with({place: CULPRIT})
            check_left_out(list(stream_of(loader, mode, batches)), batches, wanted)
    (line,) = log.read_text().splitlines()
    split, name, reason = line.split("\t")
    assert (split, name) == ("val", "the culprit 0.JPEG") and REASONS.get(kind, "") in reason


@every_loader
@every_bad_kind
def test_a_bad_image_is_left_out(tmp_path: Path, make: MakeLoader, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With skip, all other images have the numbers, labels and bits that they have where nothing is bad."""
    check_skipped(make, tmp_path, kind)
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imagenet-swa: left out")]
    assert len(named) == 1 and str(tmp_path / "the culprit 0.JPEG: ") in named[0] and REASONS.get(kind, "") in named[0]


@every_loader
def test_many_bad_images_of_all_kinds(tmp_path: Path, make: MakeLoader) -> None:
    """Bad images of many kinds, several in a batch and in neighbouring ones, are left out."""
    kinds = ("text", "no such Huffman table", "missing", "cut in the middle", "broken Huffman table", "PNG without its end")
    index = folder_with_bad_images(tmp_path, *kinds)
    places = {(0, 0): 16, (0, 2): 15, (1, 1): 17, (2, 0): 18, (2, 2): 19, (4, 1): 20}
    asked = batches_with(places)
    for prefetch in (1, 2, 4):
        for mode in MODES:
            loader = make(index, preprocessing(), prefetch=prefetch, bad_images=BadImages(index, "skip", 6))
            if mode == "train":  # one good image would be too few
                asked = [np.concatenate([batch, [14, 0]]) for batch in batches_with(places)]
            wanted = good_pixels(loader, mode)
            shown = list(stream_of(loader, mode, asked))
            check_left_out(shown, asked, wanted)


@every_dali_loader
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_damage_that_only_dali_meets(tmp_path: Path, make: MakeLoader, prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that fails in the middle of DALI's pipeline takes no other with it: one or several, in any batches."""
    index = folder_with_bad_images(tmp_path, *MET_BY_THE_DECODER)
    rebuilt = []
    undecodable = DaliLoader._undecodable
    monkeypatch.setattr(DaliLoader, "_undecodable", lambda *arguments: (rebuilt.append(1), undecodable(*arguments))[1])
    for places in ({(0, 0): 15}, {(4, 2): 15}, {(1, 0): 15, (1, 2): 16, (2, 1): 17}, {(0, 1): 15, (2, 0): 16, (4, 0): 17}):
        for mode in MODES:
            batches = [np.concatenate([batch, batch[::-1] % CULPRIT]) for batch in batches_with(places)]
            skipping = make(index, preprocessing(), prefetch=prefetch, bad_images=BadImages(index, "skip", 3))
            wanted, before = good_pixels(skipping, mode), len(rebuilt)
            check_left_out(list(stream_of(skipping, mode, batches)), batches, wanted)
            assert len(rebuilt) > before
            first = min(places)
            stopping = stream_of(make(index, preprocessing(), prefetch=prefetch), mode, batches)
            shown = [next(stopping) for _ in range(first[0])]
            check_left_out(shown, batches[: first[0]], wanted)
            with pytest.raises(BadImageError, match="the culprit 0"):
                next(stopping)


@every_dali_loader
@pytest.mark.parametrize("policy", ["stop", "skip"])
@every_mode
def test_a_fault_of_the_pipeline_is_not_the_images(
    small: ImageIndex, make: MakeLoader, mode: Mode, policy: Literal["stop", "skip"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DALI fails at every image, all of which are sound, its own error comes out and no image is blamed."""
    decoded = PipelineMaker._decoded
    monkeypatch.setattr(
        PipelineMaker, "_decoded", lambda *arguments: dali_pipeline.fn.reinterpret(decoded(*arguments), shape=[1, 1, 3])
    )
    loader = make(small, preprocessing(), bad_images=BadImages(small, policy, 1000))
    with pytest.raises(RuntimeError, match=r"[Rr]einterpret") as error:
        list(stream_of(loader, mode, in_pieces(range(len(small)), 4)))
    assert not isinstance(error.value, ValueError)  # such as InputError


@every_dali_loader
def test_a_fault_of_the_reader_is_not_the_images(
    small: ImageIndex, make: Callable[..., DaliLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in our own code while images are prepared comes out as it is, after the batches before it."""
    loader = make(small, preprocessing())
    prepare, calls = loader._prepare, []

    def fails_at_the_third(*arguments: Any) -> Any:
        calls.append(1)
        if arguments[2][0] == 8:
            raise ZeroDivisionError("our own fault")
        return prepare(*arguments)

    monkeypatch.setattr(loader, "_prepare", fails_at_the_third)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="our own fault"):
        list(loader.evaluation_stream(in_pieces(range(len(small)), 4)))


@every_loader
@pytest.mark.parametrize("kind", ["text", "no such Huffman table"])
@pytest.mark.parametrize("places", [[0], [2], [4], [0, 1], [3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_a_batch_of_nothing_but_bad_images(tmp_path: Path, make: MakeLoader, kind: str, places: list[int]) -> None:
    """In evaluation it is an empty batch, and the stream goes on; in training it ends the run with the reason."""
    index = folder_with_bad_images(tmp_path, kind, kind, kind)
    bad_images = BadImages(index, "skip", 3)
    loader = make(index, preprocessing(), bad_images=bad_images)
    wanted = good_pixels(loader, "evaluation")
    batches = batches_with({(batch, place): CULPRIT + place for batch in places for place in range(3)})
    if len(places) == 5:  # with sound ones behind them: DALI alone does not know that none of these is
        batches.append(np.arange(4))
    check_left_out(list(loader.evaluation_stream(batches)), batches, wanted)
    stream = loader.training_stream(batches, epoch=0)
    for _ in range(places[0]):
        next(stream)
    with pytest.raises(TooManyBadImagesError, match="0 of 3 images of a batch can be decoded, too few to train on") as error:
        next(stream)
    assert "imagenet-swa verify" in str(error.value) and "\n" not in str(error.value)


@every_loader
def test_two_good_images_are_enough_to_train_on(tmp_path: Path, make: MakeLoader) -> None:
    """One of three left ends the run, since BatchNorm has nothing to normalise by; two of three do not."""
    index = folder_with_bad_images(tmp_path, "text", "zero bytes")
    loader = make(index, preprocessing(), bad_images=BadImages(index, "skip", 2))
    assert len(list(loader.training_stream([np.array([0, 15, 1]), np.array([2, 3, 16])], epoch=0))) == 2
    with pytest.raises(TooManyBadImagesError, match="1 of 3 images"):
        list(loader.training_stream([np.array([0, 15, 16])], epoch=0))
    (batch,) = loader.evaluation_stream([np.array([0, 15, 16])])
    assert batch.indices.tolist() == [0]


@every_loader
@every_mode
def test_the_limit_ends_a_pass(tmp_path: Path, make: MakeLoader, mode: Mode) -> None:
    """The image beyond the limit ends the stream, after all batches before it; each pass counts anew."""
    index = folder_with_bad_images(tmp_path, "text", "no such Huffman table", "missing")
    loader = make(index, preprocessing(), bad_images=BadImages(index, "skip", 2))
    batches = batches_with({(0, 0): 15, (1, 1): 16, (3, 2): 17})
    for _ in range(2):
        assert len(list(stream_of(loader, mode, batches[:3]))) == 3
    stream = stream_of(loader, mode, batches)
    assert [len(next(stream).images) for _ in range(3)] == [2, 2, 3]
    with pytest.raises(TooManyBadImagesError, match=r"3 images cannot be decoded, the last is .*the culprit 2"):
        next(stream)


@every_loader
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_of_two_bad_images_the_first_in_order_is_named(tmp_path: Path, make: MakeLoader, prefetch: int) -> None:
    """The error names the bad image that is due first, not the one that was met first while reading ahead."""
    index = folder_with_bad_images(tmp_path, "cut in the middle", "missing")
    loader = make(index, preprocessing(), prefetch=prefetch)
    stream = loader.evaluation_stream([np.array([0, 1]), np.array([2, 15]), np.array([16, 3]), np.array([4, 5])])
    next(stream)
    with pytest.raises(BadImageError, match="the culprit 0"):
        next(stream)
    with pytest.raises(BadImageError, match="the culprit 0"):
        next(loader.evaluation_stream([np.array([1, 15, 2, 16])]))


@every_loader
def test_after_a_bad_image_the_loader_still_works(tmp_path: Path, make: MakeLoader) -> None:
    """A stream that ended in an error does not spoil the next one."""
    index = folder_with_bad_images(tmp_path, "no such Huffman table")
    loader = make(index, preprocessing())
    before = good_pixels(loader, "evaluation")
    with pytest.raises(BadImageError):
        list(loader.evaluation_stream([np.arange(16)]))
    np.testing.assert_array_equal(good_pixels(loader, "evaluation"), before)


@every_loader
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "TIFF", "noise"])
def test_a_cut_image_is_refused_whatever_is_shown_of_it(tmp_path: Path, make: MakeLoader, kind: str) -> None:
    """An image that was cut is left out in every epoch and under every seed, also where the crop lies above the cut."""
    whole = {"progressive": encoded("JPEG", progressive=True), "noise": encoded("JPEG", quality=90)}
    data = whole.get(kind) or encoded(kind if kind != "JPEG" else "JPEG", quality=90)
    for number, share in enumerate((0.3, 0.6, 0.95, 1.0)):
        end = NOISE if kind == "noise" and share < 1 else b""
        (tmp_path / str(number)).write_bytes(data[: int(share * len(data))] + end)
    index = index_of(tmp_path, "0123")
    work = preprocessing(crop_area=(0.04, 0.08))
    for seed in range(12):
        loader = make(index, work, seed=seed, bad_images=BadImages(index, "skip", 3))
        (batch,) = loader.training_stream([np.array([3, 0, 3, 1, 2])], epoch=seed % 3)
        assert batch.left_out == (0, 1, 2) and batch.indices.tolist() == [3, 3]


@every_dali_loader
@every_mode
def test_a_fault_of_the_preparation_comes_out(
    tmp_path: Path, make: MakeLoader, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is no image's, while a bad image is on its way too, ends the stream with that error, not without a word."""
    index = folder_with_bad_images(tmp_path, *MET_BY_THE_DECODER)
    prepare, calls = DaliLoader._prepare, iter(range(100))

    def fails_later(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("no more threads")
        return prepare(*arguments)

    monkeypatch.setattr(DaliLoader, "_prepare", fails_later)
    loader = make(index, preprocessing(), bad_images=BadImages(index, "skip", 100))
    batches = [np.array([0, 1, 2, 3]), np.array([4, 5, CULPRIT, 6]), np.array([7, 8, 9]), np.array([10, 11, 12])]
    with pytest.raises(RuntimeError, match="no more threads"):
        list(stream_of(loader, mode, batches))


@every_loader
def test_a_tiff_that_asks_to_be_turned_is_refused(tmp_path: Path, make: MakeLoader) -> None:
    """Pillow turns a TIFF by its tag and DALI does not: no loader takes one, all take it upright."""
    image = Image.fromarray(picture(60, 240))
    image.save(tmp_path / "0.tif")
    image.save(tmp_path / "1.tif", tiffinfo={0x0112: 6})
    index = index_of(tmp_path, ["0.tif", "1.tif"])
    for mode in MODES:
        loader = make(index, preprocessing(), bad_images=BadImages(index, "skip", 2, min_good=1))
        (batch,) = stream_of(loader, mode, [np.arange(2)])
        assert batch.indices.tolist() == [0] and batch.left_out == (1,)
        with pytest.raises(BadImageError, match="asks to be turned"):
            list(stream_of(make(index, preprocessing()), mode, [np.arange(2)]))


@every_loader
def test_an_image_too_thin_to_resize_is_bad(tmp_path: Path, make: MakeLoader) -> None:
    """An image one pixel high and so long that its resized row fits nowhere is named in evaluation, not a failure of all."""
    Image.new("L", (60_000, 1)).save(tmp_path / "thin.png")
    Image.fromarray(picture(60, 70)).save(tmp_path / "usual.png")
    index = index_of(tmp_path, ["thin.png", "usual.png"])
    loader = make(index, preprocessing(resize=480), bad_images=BadImages(index, "skip", 1))
    (batch,) = loader.evaluation_stream([np.arange(2)])
    assert batch.left_out == (0,) and batch.indices.tolist() == [1]


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
    index = index_list(real_data / "train.txt", real_data / "train")
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
    whole = global_batches(dali_loader, small, seed=1, epoch=2, world_size=1, batch_size_per_device=8, **where)
    split = global_batches(
        dali_loader, small, seed=1, epoch=2, world_size=world_size, batch_size_per_device=2, num_threads=num_threads, **where
    )
    wanted = list(whole.reshape(-1, 32, 32, 3).astype(np.float64))
    check_close(split.reshape(-1, 32, 32, 3), wanted, [str(i) for i in range(len(wanted))], mean=GPU_MEAN, largest=None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BAD_KINDS)
def test_gpu_names_a_bad_image(tmp_path: Path, kind: str) -> None:
    """Decoding on the GPU refuses the same files by name."""
    if kind in MET_BY_THE_DECODER:
        pytest.skip("what a GPU's decoder makes of a broken table is its own affair")
    check_named(gpu_loader, tmp_path, kind, prefetch=4)


@pytest.mark.gpu
@NEEDS_COMPILER
@pytest.mark.parametrize("kind", BAD_KINDS)
def test_gpu_leaves_out_a_bad_image(tmp_path: Path, kind: str) -> None:
    """Decoded on the CPU for a GPU, all images but the bad one have the bits that they have where nothing is bad."""
    check_skipped(gpu_loader, tmp_path, kind, decode_on_gpu=False, compiled_resize=True)


@pytest.mark.gpu
@NEEDS_COMPILER
@every_mode
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gpu_batches_of_the_compiled_resize_are_pils(generated: ImageIndex, interpolation: str, mode: Mode) -> None:
    """Decoded and resized on the CPU for a GPU, the pixels are PIL's to the last bit there too."""
    work = preprocessing(interpolation=interpolation, train_interpolation=interpolation, **IMAGENET)
    loader = gpu_loader(generated, work, decode_on_gpu=False, compiled_resize=True)
    got = grey_levels(stream_of(loader, mode, in_pieces(range(len(generated)), 7)))
    for number, image in enumerate(got):
        np.testing.assert_array_equal(image, pil_pixels(generated, number, work, mode), err_msg=generated.path(number))


@pytest.mark.gpu
@NEEDS_COMPILER
def test_gpu_normalisation_of_the_compiled_resize(small: ImageIndex) -> None:
    """Normalised on the GPU, a value is (grey level / 255 - mean) / std of its channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    settings_ = {"decode_on_gpu": False, "compiled_resize": True}
    grey = pixels(gpu_loader(small, preprocessing(), **settings_).evaluation_stream([np.arange(6)])).astype(np.float64)
    shown = pixels(gpu_loader(small, preprocessing(mean=mean, std=std), **settings_).evaluation_stream([np.arange(6)]))
    np.testing.assert_allclose(shown, (grey / 255 - mean) / std, atol=2e-6)
