"""Entry point of `accelerate launch -m imagenet_swa.train`."""

import sys

from imagenet_swa.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
