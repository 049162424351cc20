"""The journal of what `prepare` has finished, from which the same command goes on."""

import fcntl
import json
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any

from imagenet_swa.config import InputError, require
from imagenet_swa.data import storage
from imagenet_swa.data.prepare.units import FolderOutput, ShardOutput, Unit
from imagenet_swa.files import flush_file
from imagenet_swa.plain import is_count, parse_json

_NO_NUMBERS = ("file", "counts", "bad", "digest")
FORMAT = "imagenet-swa prepare 1"


class Journal:
    """`prepare-train.journal`: a line with the settings, then one per finished unit. Holds a lock while it is open."""

    def __init__(self, folder: Path, split: str) -> None:
        self.units: list[Unit] = []
        self._path = folder / f"prepare-{split}.journal"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {storage.reason_of(error)}; choose another output") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"another prepare is writing to {self._path.parent}; wait for it, or choose another output"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    @property
    def num_consumed(self) -> int:
        """Images of the source that the finished units are made of."""
        return sum(unit.num_consumed for unit in self.units)

    def begin(self, identity: dict[str, Any], output: ShardOutput | FolderOutput) -> None:
        """Find out what is finished, and make the output ready for what comes next.

        Raises:
            InputError: made with other settings, of another source, or not by `prepare`.
        """
        assert self._file is not None
        self._file.seek(0)
        whole, lines = 0, []
        for line in self._file.readlines():
            if not line.endswith(b"\n"):  # cut off in the middle of writing
                break
            lines.append(self._parse(line, len(lines) + 1))
            whole += len(line)
        self._file.truncate(whole)
        if not lines:
            strange = output.strange_files()
            require(not strange, f"{self._path.parent} holds files such as {(strange or [''])[0]}; choose a new or empty output")
            self._append({"format": FORMAT, "identity": identity})
        else:
            self._check(lines[0], identity)
        for unit in lines[1:]:
            if unit.number != len(self.units):  # written again after an earlier one was lost
                self.units = self.units[: unit.number]
            self.units.append(unit)
        self.units = self.units[: output.num_whole(self.units)]
        output.begin_after(self.units)

    def _parse(self, line: bytes, number: int) -> Any:
        """The settings, which stand in the first line, or a unit. Raises InputError: nothing that this program wrote."""
        try:
            found = parse_json(line)
            whole = isinstance(found, dict) and (number > 1 or isinstance(found.get("identity"), dict))
            if whole and number == 1:
                return found
            fields: dict[str, Any] = found | {"counts": Counter(found["counts"])}
            unit = Unit(**fields)
            numbers = [*unit.counts.values(), *(value for name, value in vars(unit).items() if name not in _NO_NUMBERS)]
            own_file = unit.file is None or re.fullmatch(r"\w+/\w+-\d+\.tar", unit.file) is not None
            if own_file and all(map(is_count, numbers)) and isinstance(unit.bad, list) and isinstance(unit.digest, str):
                return unit
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InputError(f"{self._path} is damaged in line {number}; choose a new or empty output")

    def _check(self, first: dict[str, Any], identity: dict[str, Any]) -> None:
        require(first.get("format") == FORMAT, f"{self._path} is of another version; choose a new or empty output")
        then = first["identity"]
        for name in dict.fromkeys([*then, *identity]):
            if then.get(name) != identity.get(name):
                raise InputError(
                    f"{self._path.parent} holds a prepare with {name} {_short(then.get(name))}, now it is "
                    f"{_short(identity.get(name))}; give the same, or choose a new or empty output"
                )

    def add(self, unit: Unit) -> None:
        """Note that a unit is finished."""
        self._append(vars(unit))
        self.units.append(unit)

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry).encode() + b"\n")
        flush_file(self._file)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
