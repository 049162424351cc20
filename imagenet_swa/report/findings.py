"""What the analyses of a run left in its folder, for its report: landscapes, averages side by side, the ensemble."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from imagenet_swa.analysis.widths import COLUMNS as WIDTH_COLUMNS
from imagenet_swa.analysis.widths import table_rows as width_rows
from imagenet_swa.plain import parse_json, printable, read_text
from imagenet_swa.report.document import Block, Bullets, Heading, Paragraph, Picture, Rows

LANDSCAPES = {
    "rays": "Along random directions (the paper's Fig. 4)",
    "line": "Between two solutions (Fig. 5)",
    "plane": "The plane through three solutions (Figs. 1 and 3)",
}
_MAX_BYTES = 16 * 2**20  # of a text or picture that goes into the report
WRITTEN = ("averages-table/averages.md", "ensemble/ensemble.md")


def finding_blocks(folder: Path) -> list[Block]:
    """Tables and pictures of every analysis whose results are there; one that cannot be read is said to be so."""
    blocks: list[Block] = []
    for kind, title in LANDSCAPES.items():
        path = folder / "landscape" / f"{kind}.json"
        if path.exists():
            blocks += _readable(path, lambda path, title=title: _landscape(path, title))
    for name in WRITTEN:
        if (folder / name).exists():
            blocks += _readable(folder / name, read_markdown)
    return blocks


def findings_under(folder: Path, title: str) -> list[Block]:
    """The same below a heading of their own, nothing where nothing was analysed: for a report of many runs."""
    blocks = finding_blocks(folder)
    lower = [replace(block, level=block.level + 1) if isinstance(block, Heading) else block for block in blocks]
    return [Heading(title), *lower] if lower else []


def _readable(path: Path, read: Callable[[Path], list[Block]]) -> list[Block]:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        reason = printable(" ".join(str(error).split()))[:300]
        return [Paragraph(f"`{path.name}` cannot be read: {type(error).__name__} {reason}")]


def _landscape(path: Path, title: str) -> list[Block]:
    record = parse_json(read_text(path))
    points = [
        (name, f"{point['train_loss']:.4f}", f"{100 * point['test_error']:.2f}", f"{point['norm']:.4g}")
        for name, point in record["points"].items()
    ]
    blocks: list[Block] = [
        Heading(title),
        *[Paragraph(str(note)) for note in record.get("notes", [])],
        Rows(("weights", "train loss, L2 included", "test error %", "norm"), points),
    ]
    if "widths" in record:
        rise = 100 * record["widths"]["rise_of_test_error"]
        caption = f"Width: distance at which the test error has risen by {rise:g} point"
        blocks.append(Rows(WIDTH_COLUMNS, width_rows(record["widths"]), caption))
    if _is_own_picture(path.with_suffix(".png"), path.parent):
        blocks.append(Picture(path.with_suffix(".png"), str(record["basis"])))
    return blocks


def read_markdown(path: Path) -> list[Block]:
    """The blocks of a Markdown file as this program writes them: headings, tables, lists, pictures and text."""
    blocks = [_block(part.strip(), path.parent) for part in read_text(path, _MAX_BYTES).split("\n\n") if part.strip()]
    return [block for block in blocks if block is not None]


def _block(text: str, folder: Path) -> Block | None:
    if match := re.fullmatch(r"(#+) (.*)", text):
        return Heading(match.group(2), min(len(match.group(1)) + 1, 4))
    if match := re.fullmatch(r"!\[([^\]]*)\]\(([^()]*)\)", text):
        picture = folder / match.group(2)
        return Picture(picture, match.group(1)) if _is_own_picture(picture, folder) else None
    lines = text.splitlines()
    if all(line.startswith("|") for line in lines) and len(lines) > 1:
        header, _, *rows = [_cells(line) for line in lines]
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a table's rows are not as long as its header")
        return Rows(header, rows)
    if all(line.startswith("- ") for line in lines):
        return Bullets([line[2:] for line in lines])
    return Paragraph(" ".join(lines))


def _is_own_picture(path: Path, folder: Path) -> bool:
    """Whether a file is a PNG in the folder or below it: a report would hold, and give away, whatever it is pointed at."""
    if not path.is_file() or folder.resolve() not in path.resolve().parents or path.stat().st_size > _MAX_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _cells(line: str) -> tuple[str, ...]:
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return tuple(cell.strip().replace("\\|", "|").replace("&lt;", "<") for cell in cells)
