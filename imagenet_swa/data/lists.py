"""List files: a line `path label` per image."""

import codecs
import os

from imagenet_swa.config import InputError


def parse_list(list_file: str, content: bytes, num_classes: int) -> tuple[list[bytes], list[int]]:
    """Names and labels in the order of the lines. Raises InputError: a line of another form, or a label that there is not."""
    names, labels = [], []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(b" ")
        if not path or not label.isdigit():
            raise InputError(f"{list_file}:{number}: wanted `path label`, got {start_of(line)}")
        if len(label) > 9 or int(label) >= num_classes:
            raise InputError(f"{list_file}:{number}: label {start_of(label)} is not in 0..{num_classes - 1} (model.num_classes)")
        names.append(path.strip())
        labels.append(int(label))
    if not names:
        raise InputError(f"{list_file} lists no images; wanted a line `path label` for each")
    return names, labels


def start_of(text: bytes) -> str:
    """Text from a file that may be no list at all, short enough for a message."""
    return repr(os.fsdecode(text[:60])) + ("..." if len(text) > 60 else "")
