"""Write scikit-learn's handwritten digits as an image dataset in ImageNet's layout.

    python launch/digits.py OUT      OUT/train/<class>/*.JPEG (599 images), OUT/val/<class>/*.JPEG (1,198 images)

Real data that needs no download: 1,797 digits of 8 x 8 pixels, enlarged to 32 x 32. Two thirds are kept for validation,
so that a difference of one point is twelve images.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32


def main(out: Path) -> None:
    """Write both splits; images that are there already are written again, the same."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = out / ("train" if number % 3 == 0 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.JPEG", quality=95)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
