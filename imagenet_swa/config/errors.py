"""What goes wrong for reasons that the user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, got, wanted, what to do next."""

    concerns_one_rank = False  # whether other ranks may not know, so that this rank has to say it


class TrainingError(RuntimeError):
    """Training cannot go on. The message is one line for people."""


class StopRequested(Exception):
    """The run was asked to stop and has saved what it needs to go on. The message is one line for people."""


class LostOthersError(RuntimeError):
    """This process cannot go on because another one failed. The message is one line for people."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)
