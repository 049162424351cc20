"""The compiled resize against Pillow, whose integers it claims to compute."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_swa.data import native, resize
from imagenet_swa.data.resize import Interpolation, PixelAddresses, resize_batch
from imagenet_swa.data.sampling import crop_windows, draw_crops

pytestmark = pytest.mark.skipif(not resize.available(), reason="the compiled part was not built")
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SCALE, BIAS = (1 / (255 * STD)).astype(np.float32), (-MEAN / STD).astype(np.float32)


def pillow_resize(image: np.ndarray, resized: tuple[int, int], interpolation: str) -> np.ndarray:
    """Pillow's resize, first across and then down: from Pillow 13 on, one call takes whichever order is faster."""
    across = Image.fromarray(image).resize((resized[1], image.shape[0]), FILTERS[interpolation])
    return np.asarray(across.resize((resized[1], resized[0]), FILTERS[interpolation]))


def one(
    image: np.ndarray,
    resized: tuple[int, int],
    interpolation: Interpolation,
    offset: tuple[int, int] = (0, 0),
    crop: tuple[int, int] | None = None,
    flip: bool = False,
) -> np.ndarray:
    """One image through `resize_batch`, uint8; between guard bytes that must stay."""
    height, width = crop or resized
    size = height * width * 3
    memory = np.full(size + 128, 77, np.uint8)
    out = memory[64:-64].reshape(1, height, width, 3)
    resize_batch([image], resized=resized, offsets=offset, flips=flip, out=out, interpolation=interpolation)
    assert (memory[:64] == 77).all() and (memory[-64:] == 77).all(), "wrote beside the output"
    return out[0]


def noise(height: int, width: int, seed: int, *, extremes: bool = False) -> np.ndarray:
    """Random pixels; with `extremes` only 0 and 255, whose bicubic sums overshoot most."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return (pixels > 127).astype(np.uint8) * np.uint8(255) if extremes else pixels


def ragged_batch(num_images: int = 7) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Images of many sizes with, for each, another resized size, a corner of a 20 x 31 crop, and a flip."""
    random = np.random.default_rng(3)
    images = [noise(*random.integers(1, 90, 2), seed=number) for number in range(num_images)]
    resized = np.array([20, 31]) + random.integers(0, 50, (num_images, 2))
    offsets = random.integers(0, resized - [20, 31] + 1)
    return images, resized, offsets, random.integers(0, 2, num_images).astype(bool)


side = st.one_of(st.integers(1, 6), st.integers(1, 80))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), size=st.tuples(side, side), resized=st.tuples(side, side), seed=st.integers(0, 9))
def test_equals_pillow(data: st.DataObject, size: tuple[int, int], resized: tuple[int, int], seed: int):
    """Whatever the sizes, the result is Pillow's resize, then crop, then mirror, to the last bit."""
    interpolation: Interpolation = data.draw(st.sampled_from(INTERPOLATIONS))
    height, width = data.draw(st.tuples(*(st.integers(1, full) for full in resized)))
    top, left = data.draw(st.tuples(st.integers(0, resized[0] - height), st.integers(0, resized[1] - width)))
    flip = data.draw(st.booleans())
    image = noise(*size, seed, extremes=data.draw(st.booleans()))
    wanted = pillow_resize(image, resized, interpolation)[top : top + height, left : left + width]
    got = one(image, resized, interpolation, (top, left), (height, width), flip)
    np.testing.assert_array_equal(got, wanted[:, ::-1] if flip else wanted)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (50, 70)),
        ((1, 3000), (9, 2)),
        ((3000, 1), (2, 9)),
        ((2000, 3), (1, 1)),
        ((3, 2000), (700, 1)),
        ((2, 2), (6, 6)),
        ((37, 53), (37, 20)),
        ((37, 53), (20, 53)),
        ((700, 900), (224, 224)),
        ((1, 40000), (1, 1)),
        ((40000, 1), (2, 1)),
    ],
)
def test_equals_pillow_at_the_extremes(size: tuple[int, int], resized: tuple[int, int], interpolation: Interpolation):
    """Single pixels, lines, hundredfold reductions and enlargements, one side kept: Pillow's result to the last bit."""
    image = noise(*size, seed=1, extremes=True)
    np.testing.assert_array_equal(one(image, resized, interpolation), pillow_resize(image, resized, interpolation))


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(side, side), resized=st.tuples(side, side), seed=st.integers(0, 9))
def test_bilinear_is_within_a_grey_level_of_either_order(size: tuple[int, int], resized: tuple[int, int], seed: int):
    """Bilinear differs by one grey level at most from one call of Pillow's resize, whichever order of passes that takes."""
    image = noise(*size, seed)
    single = np.asarray(Image.fromarray(image).resize((resized[1], resized[0]), FILTERS["bilinear"]))
    assert np.abs(one(image, resized, "bilinear").astype(int) - single).max() <= 1


@pytest.mark.realdata
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_real_images(real_data: Path, interpolation: Interpolation):
    """Training windows and the central crop of real photographs: both orders' results on average within 0.05 grey levels,
    and with the same order of passes, equal.
    """
    paths = sorted((real_data / "train").rglob("*.JPEG"))[:24]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    sizes = np.array([image.shape[:2] for image in images])
    aspect = (3 / 4, 4 / 3)
    draws = draw_crops(np.arange(len(images)), seed=1, epoch=2, area=(0.08, 1.0), aspect=aspect, horizontal_flip=True)
    windows = crop_windows(draws, sizes[:, 0], sizes[:, 1], aspect=aspect)
    crops = [image[t : t + h, x : x + w] for image, (t, x, h, w) in zip(images, windows, strict=True)]
    shorter = sizes * 256 // sizes.min(axis=1)[:, None]
    for sources, resized, flips in ((crops, np.full_like(sizes, 224), draws.flip), (images, shorter, draws.flip & False)):
        offsets = (resized - 224) // 2
        out = np.empty((len(images), 224, 224, 3), np.uint8)
        resize_batch(sources, resized=resized, offsets=offsets, flips=flips, out=out, interpolation=interpolation)
        differences = []
        for got, source, (height, width), (top, left), flip in zip(out, sources, resized, offsets, flips, strict=True):
            unflipped = got[:, ::-1] if flip else got
            part = slice(top, top + 224), slice(left, left + 224)
            source = np.ascontiguousarray(source)
            np.testing.assert_array_equal(unflipped, pillow_resize(source, (int(height), int(width)), interpolation)[part])
            single = np.asarray(Image.fromarray(source).resize((int(width), int(height)), FILTERS[interpolation]))[part]
            differences.append(np.abs(unflipped.astype(int) - single).mean())
        assert np.mean(differences) < 0.05


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_flip_mirrors(interpolation: Interpolation):
    """Asked to flip, it gives the mirrored image of the same crop."""
    image = noise(50, 61, seed=2)
    straight = one(image, (33, 47), interpolation, (3, 5), (20, 30))
    mirrored = one(image, (33, 47), interpolation, (3, 5), (20, 30), flip=True)
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    assert (mirrored != straight).any()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crop_is_a_part_of_the_whole(interpolation: Interpolation):
    """Every one-pixel crop is that pixel of the whole resized image."""
    image = noise(23, 17, seed=4)
    whole = one(image, (9, 12), interpolation)
    pixels = [[one(image, (9, 12), interpolation, (y, x), (1, 1))[0, 0] for x in range(12)] for y in range(9)]
    np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_identity_and_constants(interpolation: Interpolation):
    """To its own size an image comes back unchanged; one of a single colour stays it at any size."""
    image = noise(31, 45, seed=5, extremes=True)
    np.testing.assert_array_equal(one(image, (31, 45), interpolation), image)
    for grey in (0, 1, 128, 254, 255):
        for resized in ((1, 1), (7, 90), (100, 3)):
            assert (one(np.full((31, 45, 3), grey, np.uint8), resized, interpolation) == grey).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_so_many_weights_that_their_rounding_adds_up(interpolation: Interpolation):
    """White stays white where the rounded weights sum to more than one, by over a grey level."""
    assert (one(np.full((1, 508_400, 3), 255, np.uint8), (1, 1), interpolation) == 255).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_float_output_is_the_normalised_bytes(interpolation: Interpolation):
    """float32 output is byte * scale + bias, one rounding after the other, of the uint8 output."""
    images, resized, offsets, flips = ragged_batch()
    grey = np.empty((len(images), 20, 31, 3), np.uint8)
    resize_batch(images, resized=resized, offsets=offsets, flips=flips, out=grey, interpolation=interpolation)
    normalised = np.empty(grey.shape, np.float32)
    geometry = {"resized": resized, "offsets": offsets, "flips": flips, "interpolation": interpolation}
    resize_batch(images, **geometry, out=normalised, scale=SCALE, bias=BIAS)
    np.testing.assert_array_equal(normalised, grey.astype(np.float32) * SCALE + BIAS)
    resize_batch(images, **geometry, out=normalised)
    np.testing.assert_array_equal(normalised, grey)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_batch_is_its_slices(kind: type):
    """A batch in one call, image by image, or in slices of addresses: the same bits, whatever images share a call."""
    images, resized, offsets, flips = ragged_batch()
    whole, parts, single = (np.empty((len(images), 20, 31, 3), kind) for _ in range(3))
    resize_batch(images, resized=resized, offsets=offsets, flips=flips, out=whole, interpolation="bicubic")
    addresses = PixelAddresses.of(images)
    for part in (slice(0, 3), slice(3, 3), slice(3, 7)):
        arguments = {"resized": resized[part], "offsets": offsets[part], "flips": flips[part]}
        resize_batch(addresses[part], **arguments, out=parts[part], interpolation="bicubic")
    for i, image in enumerate(images):
        arguments = {"resized": resized[i], "offsets": offsets[i], "flips": flips[i]}
        resize_batch([image], **arguments, out=single[i : i + 1], interpolation="bicubic")
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(single, whole)


def test_windows_and_addresses_are_images():
    """A window of a larger image, and bare addresses and shapes of packed ones, give what copies of them give."""
    image = noise(60, 70, seed=6)
    window = image[11:40, 7:52]
    wanted = one(window.copy(), (20, 20), "bilinear")
    np.testing.assert_array_equal(one(window, (20, 20), "bilinear"), wanted)
    copy = window.copy()
    packed = PixelAddresses.packed([copy.ctypes.data], [copy.shape])
    out = np.empty((1, 20, 20, 3), np.uint8)
    resize_batch(packed, resized=(20, 20), offsets=(0, 0), flips=False, out=out, interpolation="bilinear")
    np.testing.assert_array_equal(out[0], wanted)


GUARDED = """
import ctypes, mmap
import numpy as np
from imagenet_swa.data.resize import resize_batch
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 5 * page)
pixels = np.frombuffer(memory, np.uint8)
libc = ctypes.CDLL(None, use_errno=True)
for forbidden in (0, 4):
    assert libc.mprotect(ctypes.c_void_p(pixels.ctypes.data + forbidden * page), page, 0) == 0
for height, width in ((1, 1), (2, 1), (1, 2), (5, 7), (40, 33), (3, 1000)):
    size = 3 * height * width
    for start in (page, 4 * page - size):
        image = pixels[start : start + size].reshape(height, width, 3)
        for resized in ((1, 1), (9, 4), (60, 50), (height, width)):
            for interpolation in ("bilinear", "bicubic"):
                out = np.empty((1, *resized, 3), np.uint8)
                resize_batch([image], resized=resized, offsets=(0, 0), flips=False, out=out, interpolation=interpolation)
print("read nothing else")
"""


def test_reads_nothing_beside_the_image():
    """Between pages that may not be read, images are resized all the same."""
    done = run([sys.executable, "-c", GUARDED])
    assert done.returncode == 0 and "read nothing else" in done.stdout, done.stderr


def compiled_otherwise(folder: Path, *flags: str) -> ctypes.CDLL:
    """resize.c for one kind of processor, with these flags."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    source = Path(native.__file__).with_name("resize.c")
    if compiler is None or not source.exists():
        pytest.skip("no C compiler")
    out = folder / f"resize{'_'.join(flags)}.so"
    common = ["-std=gnu11", "-ffp-contract=off", "-DRESIZE_NO_CLONES", "-shared", "-fPIC"]
    subprocess.run([compiler, *common, *flags, "-o", out, source], check=True, timeout=60)
    return ctypes.CDLL(str(out))


PLAIN = ("-O1", "-fno-tree-vectorize")


@pytest.mark.parametrize("flags", [PLAIN, (*PLAIN, "-DRESIZE_LANES=16"), ("-O3", "-mavx2")], ids=["8", "16", "avx2"])
def test_processors_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]):
    """What this processor's best instructions give, other ones and the plainest compilation, for either width of vectors,
    give to the last bit.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if "-mavx2" in flags and not (cpuinfo.exists() and " avx2 " in cpuinfo.read_text()):
        pytest.skip("no AVX2 here")
    images, resized, offsets, flips = ragged_batch(40)
    results: list[list[np.ndarray]] = []
    for library in (native.library(), compiled_otherwise(tmp_path, *flags)):
        monkeypatch.setattr(resize, "library", lambda library=library: library)
        resize._function.cache_clear()
        results.append([])
        for interpolation in INTERPOLATIONS:
            geometry = {"resized": resized, "offsets": offsets, "flips": flips, "interpolation": interpolation}
            grey, normalised = np.empty((40, 20, 31, 3), np.uint8), np.empty((40, 20, 31, 3), np.float32)
            resize_batch(images, **geometry, out=grey)
            resize_batch(images, **geometry, out=normalised, scale=SCALE, bias=BIAS)
            results[-1] += [grey, normalised]
    resize._function.cache_clear()
    for ours, other in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("width", range(1, 10))
def test_float_output_begins_anywhere(width: int):
    """float32 output at any address of a float, in rows of any length, is that of another address; nothing beside is written."""
    image = noise(9, 11, seed=7)
    geometry = {"resized": (6, width), "offsets": (0, 0), "flips": False, "interpolation": "bilinear"}
    grey = one(image, (6, width), "bilinear")
    count = 6 * width * 3
    for start in range(20, 25):
        memory = np.full(count + 64, 77, np.float32)
        out = memory[start : start + count].reshape(1, 6, width, 3)
        resize_batch([image], **geometry, out=out, scale=SCALE, bias=BIAS)
        np.testing.assert_array_equal(out[0], grey.astype(np.float32) * SCALE + BIAS)
        assert (memory[:start] == 77).all() and (memory[start + count :] == 77).all(), "wrote beside the output"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": (0, 13)}, r"image 0 of \[10, 12\] resized to \[20, 20\] has no crop of \[8, 8\] at \[0, 13\]"),
        ({"offsets": (-1, 0)}, "no crop"),
        ({"resized": (7, 20)}, "no crop"),
        ({"resized": (2**25, 20)}, "above"),
        ({"offsets": (2**63 - 1, 0)}, "no crop"),
        ({"out": np.empty((1, 8, 8, 3), np.float64)}, "out is float64"),
        ({"out": np.empty((2, 8, 8, 3), np.uint8)}, r"wanted uint8 or float32 \(1, height, width, 3\)"),
        ({"out": np.empty((1, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1)}, "C-contiguous"),
        ({"scale": SCALE}, "out is uint8 .* wanted float32"),
        ({"images": [np.zeros((10, 12), np.uint8)]}, "image 0 is uint8"),
        ({"images": [np.zeros((10, 12, 3), np.int8)]}, "image 0 is int8"),
        ({"images": [np.zeros((3, 10, 12), np.uint8).transpose(1, 2, 0)]}, "RGB interleaved"),
        ({"images": [np.zeros((10, 12, 3), np.uint8)[::-1]]}, "from the top down"),
        ({"images": [np.zeros((0, 12, 3), np.uint8)]}, "image 0 is uint8"),
        ({"images": PixelAddresses.packed([0], [(0, 12)])}, "no crop"),
        ({"images": PixelAddresses.packed([0], [(10, 2**25)])}, "above"),
        ({"out": np.empty((1, 0, 8, 3), np.uint8)}, "a side is 0"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict, message: str):
    """Crops beyond the image, other types and other layouts are refused with the numbers; nothing is written."""
    out = np.full((1, 8, 8, 3), 7, np.uint8)
    good = {"images": [noise(10, 12, 0)], "resized": (20, 20), "offsets": (2, 12), "flips": False, "out": out}
    resize_batch(**good, interpolation="bilinear")
    out[:] = 7
    with pytest.raises(ValueError, match=message):
        resize_batch(**(good | changes), interpolation="bilinear")
    assert (out == 7).all()


def test_says_that_the_compiled_part_is_missing(monkeypatch: pytest.MonkeyPatch):
    """Without the compiled part `available` is False, and a call says what is missing."""
    monkeypatch.setattr(resize, "library", lambda: None)
    resize._function.cache_clear()
    assert not resize.available()
    with pytest.raises(RuntimeError, match="C compiler"):
        one(noise(2, 2, 0), (2, 2), "bilinear")
