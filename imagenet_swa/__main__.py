"""`python -m imagenet_swa` is the console script."""

import sys

from imagenet_swa.cli import main

sys.exit(main())
