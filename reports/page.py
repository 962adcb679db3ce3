"""The parts of a report as HTML: each function escapes the text it is given and returns markup that may be nested."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

STYLE = Path(__file__).with_name("page.css")
JPEG_QUALITY = 80


def page(title: str, *parts: str) -> str:
    """A whole file: it asks for nothing outside itself and runs no script."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing where there is nothing."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is a class of the style: faint or notice."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tiles(items: Iterable[tuple[str, object, str]]) -> str:
    """The figures that matter most: each with its name and a note."""
    found = [
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(shown(value))}</b><span>{escape(note)}</span></div>'
        for name, value, note in items
    ]
    return '<div class="tiles">\n' + "\n".join(found) + "\n</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls sideways where it is wider than the page; the first column to the left."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values below each other."""
    found = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd>" for name, value in pairs)
    return f"<dl>\n{found}\n</dl>"


def code(text: str) -> str:
    """Text to be copied as it stands."""
    return f"<pre>{escape(text)}</pre>"


def plots(items: Iterable[tuple[str, str]]) -> str:
    """SVGs of `report.charts` beside each other where there is room, each under its caption."""
    found = [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in items]
    return '<div class="plots">\n' + "\n".join(found) + "\n</div>"


def pictures(items: Iterable[tuple[str, Image.Image]]) -> str:
    """Two or three pictures beside each other with their captions; on a phone the first of three above the others."""
    found = [
        f'<figure><img src="{data_uri(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, picture in items
    ]
    return '<div class="pictures">\n' + "\n".join(found) + "\n</div>"


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG inside the page."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def shown(value: object) -> str:
    """A cell's text: thousands apart in whole numbers, four decimals in others, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
