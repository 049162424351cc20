"""How a process ends: its exit code, the line that it leaves behind, and what the other ranks and the launcher are told."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from imagenet_swa import status
from imagenet_swa.config import InputError, LostOthersError, StopRequested, TrainingError
from imagenet_swa.plain import printable
from imagenet_swa.stop import FAILED, INTERRUPTED, REQUEUE, request

BAD_INPUT = 2
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def exit_code_of(call: Callable[[], int], *, goes_on: str = "") -> int:
    """The exit code of a command; why it failed is on stderr, in one line unless it is a defect of the program.

    Args:
        call: the command.
        goes_on: what becomes of an interrupted command when it is started again, to be added to the line.
    """
    try:
        code = call()
    except InputError as error:
        return end(BAD_INPUT, str(error), every_rank=error.concerns_one_rank)
    except StopRequested as error:
        return end(REQUEUE, str(error), kind="stopped")
    except KeyboardInterrupt:
        return end(INTERRUPTED, f"interrupted{goes_on}")
    except LostOthersError as error:
        return _lost_others(str(error))
    except TrainingError as error:
        return end(FAILED, str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f" ({error.filename})" if error.filename else ""
            return end(FAILED, f"{error.strerror}{where}{goes_on}")
        told = _what_others_did(error)
        if told is not None:
            return _lost_others(told)
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return end(FAILED, line, every_rank=True, is_new=False, restart_may_help=_is_of_the_accelerator(error))
    status.end(code, None)
    _part_from_others(code, None)
    return code


def end(
    code: int,
    message: str,
    *,
    every_rank: bool = False,
    lost_others: bool = False,
    kind: str = "error",
    is_new: bool = True,
    restart_may_help: bool = False,
) -> int:
    """Say why on stderr, once per machine unless only this rank knows, where no supervisor does so last of all.

    Args:
        code: returned.
        message: one line.
        every_rank: other ranks may not know.
        lost_others: it is only because another rank ended.
        kind: error or stopped.
        is_new: the screen does not show it yet.
        restart_may_help: the same need not come again.
    """
    rank = f" [rank {os.environ['RANK']}]" if every_rank and "RANK" in os.environ else ""
    line = printable(f"imagenet-swa: {kind}{rank}: {message}")
    status.end(code, line, lost_others=lost_others, restart_may_help=restart_may_help)
    if is_new and not status.is_watched() and (every_rank or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(line, file=sys.stderr, flush=True)
    _part_from_others(code, None if code == REQUEUE else message, lost_others=lost_others)
    return code


def _lost_others(message: str) -> int:
    """Others who stopped as asked may be gone before this rank has heard of it; it was asked too."""
    if request.reason is not None:
        return end(REQUEUE, f"by {request.reason}; {message}", every_rank=True, kind="stopped")
    if status.is_watched():  # which shows it only if no rank tells of the cause
        print(f"imagenet-swa: [rank {os.environ.get('RANK', '0')}] {printable(message)}", file=sys.stderr, flush=True)
    return end(FAILED, message, every_rank=True, lost_others=True)


def _what_others_did(error: Exception) -> str | None:
    if "torch" not in sys.modules:  # then there are no others
        return None
    from imagenet_swa.runtime import what_others_did

    return what_others_did(error)


def _is_of_the_accelerator(error: Exception) -> bool:
    return "torch" in sys.modules and isinstance(error, getattr(sys.modules["torch"], "AcceleratorError", ()))


def _part_from_others(code: int, failure: str | None, *, lost_others: bool = False) -> None:
    """Tell the other ranks, if there are any, why this one leaves them. Where a thread that they hold up does not end, the
    process does without it: the interpreter would be torn down under it, and abort.
    """
    if "imagenet_swa.runtime" not in sys.modules:
        return
    from imagenet_swa.runtime import part_from_others

    if not part_from_others(failure, lost_others=lost_others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
