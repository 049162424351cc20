"""What `verify` can find, how bad each kind is, and the report, the JSON and the quarantine list of what it found."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from imagenet_swa.config import InputError
from imagenet_swa.data.imagenet import SPLITS
from imagenet_swa.files import write_atomically

_MAX_NAMES = 1000  # of one finding that verify.json holds

# Every kind of finding: how bad, and what it is. An error is what training would stumble over or learn wrongly from.
Severity = Literal["error", "warning", "note"]
KINDS: dict[str, tuple[Severity, str]] = {
    "unusable": ("error", "the split cannot be read"),
    "stale_index": ("error", "the index is older than the data"),
    "classes": ("error", "the classes are not the network's"),
    "wrong_label": ("error", "labels that contradict the WordNet id in the image's name"),
    "wrong_count": ("error", "not as many images as ImageNet-1k has"),
    "empty": ("error", "files without a byte"),
    "missing": ("error", "images that are not there"),
    "cut_short": ("error", "images cut short"),
    "not_an_image": ("error", "no images at all"),
    "refused_format": ("error", "images of a format that the loaders do not read"),
    "undecodable": ("error", "images that cannot be decoded"),
    "unreadable": ("error", "images that cannot be read; mend the access or the disk"),
    "changed": ("error", "images that changed since they were indexed; build the index again"),
    "mostly_leaked": ("error", "more than half of val is train"),
    "leak": ("warning", "the same file in train and val"),
    "duplicates": ("note", "the same file more than once in a split"),
    "listed_twice": ("note", "the same name more than once in a split"),
    "subset": ("note", "not the whole of ImageNet-1k"),
    "quarantined": ("note", "bad images that data.quarantine leaves out"),
    "needless_quarantine": ("note", "lines of data.quarantine for images that are good or not there"),
    "other_format": ("note", "names that tell another format than the content; all loaders go by the content"),
    "grey": ("note", "grey images"),
    "cmyk": ("note", "CMYK images; the loaders' conversions to RGB may differ"),
    "palette": ("note", "images with a palette"),
    "transparent": ("note", "images with transparency, which the loaders drop"),
    "sixteen_bits": ("note", "images of 16 bits or more; the torchvision loader clips grey ones"),
    "progressive": ("note", "progressive JPEGs, slower to decode"),
    "turned": ("note", "images that EXIF would turn; the loaders do not"),
    "small": ("note", "images with a side under 32 pixels"),
    "large": ("note", "images with a side over 10,000 pixels"),
    "narrow": ("note", "images over ten times longer than wide, or wider than long"),
    "trailing_bytes": ("note", "bytes after the end of the image, which all decoders ignore"),
    "no_end": ("note", "JPEGs without an end marker that decode all the same"),
}
OF_SPLITS = ("unusable", "stale_index", "classes", "mostly_leaked", "subset")  # about a split, not about so many images
UNDECODABLE = ("empty", "missing", "cut_short", "not_an_image", "refused_format", "undecodable")  # these go into quarantine


@dataclass
class Finding:
    """All that was found of one kind in one split: how many images (or cases), and the names of the first."""

    kind: str
    split: str
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)  # (name, detail)

    @property
    def severity(self) -> Severity:
        """How bad."""
        return KINDS[self.kind][0]

    def add(self, name: str, detail: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < _MAX_NAMES:
            self.examples.append((name, detail))


@dataclass
class VerifyResult:
    """What `verify` found. `quarantine` holds (split, name, reason) of what cannot be decoded, in the order of the index."""

    full: bool
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)  # by split and kind
    quarantine: list[tuple[str, str, str]] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split: images, classes, formats, sizes

    @property
    def healthy(self) -> bool:
        """Whether training would not stumble."""
        return not any(finding.severity == "error" for finding in self.findings.values())

    def add(self, split: str, kind: str, name: str, detail: str = "") -> None:
        """Count a case."""
        self.findings.setdefault((split, kind), Finding(kind, split)).add(name, detail)

    def count(self, kind: str, split: str | None = None) -> int:
        """Number of cases, in one split or all."""
        return sum(f.count for f in self.findings.values() if f.kind == kind and split in (None, f.split))

    def ordered(self) -> list[Finding]:
        """Findings in the order of `KINDS`, which is that of their severity, then by split."""
        kinds, splits = list(KINDS), (*SPLITS, "train and val")
        return sorted(self.findings.values(), key=lambda f: (kinds.index(f.kind), splits.index(f.split)))


# --------------------------------------------------------------------------------------------------------------- results


def write_results(result: VerifyResult, folder: Path) -> None:
    """Write quarantine.tsv, verify.json and verify.md. Raises InputError where that cannot be done."""
    quarantine = ["# split\tname\treason: cannot be decoded; data.quarantine leaves these out"]
    quarantine += ["\t".join(entry) for entry in result.quarantine]
    about = {
        "mode": "full" if result.full else "quick",
        "healthy": result.healthy,
        "splits": result.summaries,
        "num_quarantined": len(result.quarantine),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "split": finding.split,
                "what": KINDS[finding.kind][1],
                "count": finding.count,
                "first": [{"name": name, "detail": detail} for name, detail in finding.examples],
            }
            for finding in result.ordered()
        ],
    }
    try:
        write_atomically(folder / "quarantine.tsv", os.fsencode("\n".join(quarantine) + "\n"))
        write_atomically(folder / "verify.json", json.dumps(about, indent=1).encode())
        write_atomically(folder / "verify.md", _markdown(result).encode(errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"cannot write the results to {folder}: {error.strerror}; set verify.output to another folder") from None


def _markdown(result: VerifyResult) -> str:
    lines = ["# Verified images", "", "Every image decoded." if result.full else "First and last bytes of every image read.", ""]
    lines += ["| split | images | classes | formats | width: least, median, most | height |", "|---|---:|---:|---|---|---|"]
    for split, about in result.summaries.items():
        formats = ", ".join(f"{name} {number:,}" for name, number in about["formats"].items())
        width, height = (", ".join(f"{value:,}" for value in about[side]) for side in ("width", "height"))
        lines.append(f"| {split} | {about['images']:,} | {about['classes']:,} | {formats} | {width} | {height} |")
    for severity, title in (("error", "Errors"), ("warning", "Warnings"), ("note", "Notes")):
        found = [finding for finding in result.ordered() if finding.severity == severity]
        lines += ["", f"## {title}", ""] + ([] if found else ["None."])
        for finding in found:
            lines.append(f"- {finding.split}: {KINDS[finding.kind][1]}: {finding.count:,}")
            lines += [f"  - `{' '.join(name.split())}` {detail}".rstrip() for name, detail in finding.examples[:10]]
            lines += [f"  - and {finding.count - 10:,} more"] if finding.count > 10 else []
    return "\n".join(lines) + "\n"


def tell(result: VerifyResult, folder: Path, say: Callable[[str], None]) -> None:
    """The same for the terminal, a line for each finding."""
    for split, about in result.summaries.items():
        amount = f"{about['bytes'] / 1e9:,.1f} GB" if about["bytes"] >= 1e9 else f"{about['bytes'] / 1e6:,.1f} MB"
        say(f"{split}: {about['images']:,} images, {about['classes']:,} classes, {amount}")
    for finding in result.ordered():
        name, detail = finding.examples[0]
        where = (
            f"{name} {detail}"
            if finding.kind in OF_SPLITS and finding.count == 1
            else f"{finding.count:,}, the first is {name} {detail}"
        )
        say(f"[{finding.severity}] {finding.split}: {KINDS[finding.kind][1]}: {where}".rstrip())
    say(f"report:     {folder / 'verify.md'}")
    if result.quarantine:
        say(f"quarantine: {folder / 'quarantine.tsv'}, {len(result.quarantine):,} images; --data.quarantine leaves them out")
