"""Parts of a report as HTML: each function escapes its text and returns markup that can be nested."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

STYLE = Path(__file__).with_name("page.css")
JPEG_QUALITY = 80
OPTION = re.compile(r"(?<!\S)--?\w[\w-]*")
OPTION_MARKUP = r'<span class="option">\g<0></span>'


class Html(str):
    """Markup for a cell of `html_table`, which escapes all other text."""


def page(title: str, *parts: str) -> str:
    """Return a whole file, without external resources or scripts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading with its content, or nothing without content."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; `kind` is a CSS class, faint or notice."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tiles(items: Iterable[tuple[str, object, str]]) -> str:
    """Return tiles of the main figures, each with name and note."""
    found = [
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(as_text(value))}</b><span>{escape(note)}</span></div>'
        for name, value, note in items
    ]
    return _box("tiles", found)


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls sideways if wider than the page; the first column is left-aligned."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else escape(as_text(value))


def link(text: str, anchor: str) -> Html:
    """Return a link to a part of the page, for a cell."""
    return Html(f'<a href="#{escape(anchor)}">{escape(text)}</a>')


def details(title: str, *parts: str, anchor: str | None = None) -> str:
    """Return content that opens when its title is chosen; a link to its anchor opens it in browsers that can."""
    body = "\n".join(part for part in parts if part)
    place = "" if anchor is None else f'<div id="{escape(anchor)}"></div>\n'
    return f"<details>\n<summary>{escape(title)}</summary>\n{place}{body}\n</details>"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a list of names and values."""
    found = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(as_text(value))}</dd>" for name, value in pairs)
    return f"<dl>\n{found}\n</dl>"


def code(command: str) -> str:
    """Return a command to copy verbatim; lines break between its words, not after the hyphens of an option."""
    return f"<pre>{OPTION.sub(OPTION_MARKUP, escape(command))}</pre>"


def plots(items: Iterable[tuple[str, str]]) -> str:
    """Return SVGs of `reports.charts` side by side if they fit, each under its caption."""
    found = [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in items]
    return _box("plots", found)


def pictures(items: Iterable[tuple[str, Image.Image]]) -> str:
    """Return captioned pictures side by side, in rows of up to three; on a tablet, the first of an odd number is above.

    Pictures scale with the page; on a phone they are one below the other.
    """
    found = [
        f'<figure><img src="{data_uri(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, picture in items
    ]
    return _box("pictures", found)


def _box(kind: str, parts: Iterable[str]) -> str:
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI with a JPEG."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def as_text(value: object) -> str:
    """Return a cell's text: whole numbers with thousands separators, others with four decimals, None empty."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
