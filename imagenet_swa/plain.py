"""YAML and JSON that anybody may have written: plain data, bounded in size, depth and number of values; and text fit to show."""

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 64 * 2**20  # of a file of JSON; a year's metrics.jsonl has less
MAX_YAML_BYTES = 2**20
MAX_DEPTH = 40
MAX_EXPANDED = 2**22  # characters, aliases counted as often as they are used


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The text of a regular file.

    Raises:
        OSError: it cannot be opened; FileNotFoundError where it is not there.
        ValueError: it is no regular file, larger than `most` bytes, or not UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for, perhaps for ever
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode()


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError: no JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Plain data; of floats and dates YAML 1.1's.

    Raises:
        ValueError: no YAML, tags of a program's own, or what `check_yaml` refuses.
    """
    try:
        check_yaml(text)
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None


@dataclass
class _Open:
    """A list or mapping whose end is still to come."""

    anchor: str | None
    is_mapping: bool
    line: int
    size: int = 1
    height: int = 1
    num_items: int = 0
    keys: set[str] = field(default_factory=set)


def check_yaml(text: str) -> None:
    """Go through a text without building what it describes.

    Raises:
        yaml.YAMLError: no YAML, too long, nested too deeply, a key twice in a mapping (of which the last would count), or
            aliases that stand for more than anybody would write down.
    """
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"it has more than {MAX_YAML_BYTES:,} characters")
    anchors: dict[str, tuple[int, int]] = {}
    waiting: list[_Open] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            waiting.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent), event.start_mark.line + 1))
            size, height = 0, 0
        elif isinstance(event, yaml.ScalarEvent):
            if "\0" in event.value:
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: a zero byte stands in the text")
            size, height = 1 + len(event.value), 0
            if event.anchor is not None:
                anchors[event.anchor] = size, height
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:  # not there, or of a list that holds itself
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: the alias {event.anchor} stands for nothing before it")
            size, height = anchors[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            done = waiting.pop()
            size, height = done.size, done.height
            if done.anchor is not None:
                anchors[done.anchor] = size, height
        else:
            continue
        if not isinstance(event, yaml.CollectionStartEvent) and waiting:
            _add(waiting[-1], event, size, height)
        if len(waiting) > MAX_DEPTH or height > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        if size > MAX_EXPANDED:
            raise yaml.YAMLError("its aliases stand for too much text")


def _add(into: _Open, event: Any, size: int, height: int) -> None:
    is_key = into.is_mapping and into.num_items % 2 == 0
    if is_key and isinstance(event, yaml.ScalarEvent) and event.value != "<<":
        if event.value in into.keys:
            raise yaml.YAMLError(f"line {into.line} and below: {printable(event.value)} is there twice")
        into.keys.add(event.value)
    into.num_items += 1
    into.size += size
    into.height = max(into.height, height + 1)


def is_number(value: Any, low: float = float("-inf"), high: float = float("inf")) -> bool:
    """Whether a value from JSON is a number, no truth value, within bounds; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_count(value: Any, most: int = 2**53) -> bool:
    """Whether a value from JSON is a whole number from 0 on."""
    return type(value) is int and 0 <= value <= most


def printable(text: str) -> str:
    """Text on one line, without what would move the cursor of a terminal ; bytes of names that are no UTF-8 stay."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode() for c in text)
