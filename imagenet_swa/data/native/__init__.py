"""The compiled part: inner loops in C, called without Python's lock.

Built by pip with whatever C compiler it finds; without one the package installs all the same and its callers do without.
Plain C behind ctypes, no Python headers and no CUDA headers, integers or contraction-free floats only, so that every
machine computes the same bits.
"""

import ctypes
from functools import cache
from importlib.util import find_spec

_MODULE = "imagenet_swa.data.native._kernels"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None where they were not built."""
    spec = find_spec(_MODULE)
    if spec is None or spec.origin is None:
        return None
    return ctypes.CDLL(spec.origin)
