"""Write the tables and the sentences with figures into README.md and docs/, from bench/results.

    python -m bench.pages

Pages mark each place with `<!-- table NAME -->` or `<!-- text NAME -->` before it and `<!-- end -->` after it. NAME is
a function of `bench.tables`, `bench.sentences`, `bench.scale_page`, `bench.finetune_page`, `bench.int8_page`,
`bench.predicted` or `bench.runtimes_page`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.finetune_page import FINETUNE_TABLES, FINETUNE_TEXTS
from bench.int8_page import INT8_TABLES, INT8_TEXTS
from bench.predicted import PREDICTED_TABLES, PREDICTED_TEXTS
from bench.runtimes_page import RUNTIMES_TABLES, RUNTIMES_TEXTS
from bench.scale_page import SCALE_TABLES, SCALE_TEXTS
from bench.sentences import TEXTS
from bench.tables import TABLES
from util.errors import UserError, run_cli
from util.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- (table|text) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FRAGMENTS: Mapping[str, Mapping[str, Callable[[Path], str]]] = {
    "table": {**TABLES, **SCALE_TABLES, **FINETUNE_TABLES, **INT8_TABLES, **PREDICTED_TABLES, **RUNTIMES_TABLES},
    "text": {**TEXTS, **SCALE_TEXTS, **FINETUNE_TEXTS, **INT8_TEXTS, **PREDICTED_TEXTS, **RUNTIMES_TEXTS},
}


def pages() -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str, results: Path = RESULTS) -> str:
    """Fill the markers of `text` with the figures of `results`.

    Raises:
        UserError: unknown marker, or missing figures.
    """

    def fragment(match: re.Match[str]) -> str:
        known = FRAGMENTS[match[2]]
        if match[3] not in known:
            raise UserError(f"marker: found {match[2]} {match[3]}, expected one of {', '.join(known)}")
        return match[1] + known[match[3]](results) + match[4]

    return MARKED.sub(fragment, text)


def main() -> None:
    """Fill all pages."""
    for path in pages():
        before = path.read_text(encoding="utf-8")
        if (after := fill(before)) != before:
            write_text(path, after)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    run_cli(main)
