"""A report as a list of blocks, and the blocks as Markdown or as one HTML page that needs nothing else."""

import base64
import html
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagenet_swa.report.tables import markdown_table


@dataclass(frozen=True)
class Heading:
    """The page's title (level 1) or a section's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text in which `**bold**`, `*emphasis*` and back-quoted code mean what they do in Markdown."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of such texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Rows:
    """A table."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG file; Markdown names it relative to the report, HTML holds its bytes."""

    path: Path
    about: str


Block = Heading | Paragraph | Bullets | Rows | Picture


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as Markdown for a file in the folder."""
    return "\n\n".join(_markdown_block(block, folder) for block in blocks) + "\n"


def _markdown_block(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_quiet(block.text)}"
        case Paragraph():
            return _quiet(block.text)
        case Bullets():
            return "\n".join(f"- {_quiet(item)}" for item in block.items)
        case Rows():
            title = f"**{block.title}**\n\n" if block.title else ""
            return title + markdown_table(block.columns, block.rows)
        case Picture():
            return f"![{_quiet(block.about)}]({Path(os.path.relpath(block.path, folder)).as_posix()})"


def _quiet(text: str) -> str:
    """One line in which what came from elsewhere can be no tag, link or picture of a page; code stays as it is."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if i % 2 else part.replace("<", "&lt;").replace("](", "]\\(") for i, part in enumerate(parts))


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
img { max-width: 100%; background: #fff; border-radius: .3rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; opacity: .8; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def page(blocks: Sequence[Block]) -> str:
    """The blocks as one HTML file that opens from disk: styles and pictures inside, no script, all text escaped."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "report")
    body = "\n".join(map(_html_block, blocks))
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _html_block(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{_inline(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
        case Rows():
            return _html_table(block)
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            about = html.escape(block.about)
            image = f'<img alt="{about}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{about}</figcaption></figure>"


def _html_table(block: Rows) -> str:
    kept = [i for i in range(len(block.columns)) if any(row[i] for row in block.rows)]
    head = "".join(f"<th>{html.escape(block.columns[i])}</th>" for i in kept)
    lines = ["".join(f"<td>{html.escape(row[i])}</td>" for i in kept) for row in block.rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    caption = f"<caption>{html.escape(block.title)}</caption>" if block.title else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    parts = re.split(r"`([^`]+)`", html.escape(text))  # text and code by turns
    return "".join(f"<code>{part}</code>" if i % 2 else _emphasis(part) for i, part in enumerate(parts))


def _emphasis(escaped: str) -> str:
    strong = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", strong)


def json_text(record: dict[str, Any]) -> str:
    """The record as JSON that every reader takes: null for infinities and what is no number, as a diverged run leaves them."""
    return json.dumps(_sayable(record), indent=1, allow_nan=False)


def _sayable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _sayable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_sayable(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
