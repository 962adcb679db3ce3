"""The README's tables are the committed figures, and what made them is said with them."""

import json
import re

import pytest

from bench.tables import MARKED, RESULTS, ROOT, TABLES, fill
from util.errors import UserError

README = (ROOT / "README.md").read_text()


def test_every_table_of_the_readme_is_made_of_the_committed_figures():
    assert fill(README) == README
    assert {match[2] for match in MARKED.finditer(README)} == set(TABLES)


def test_every_committed_figure_tells_what_it_was_measured_with():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        told = json.loads(path.read_text())["environment"]
        assert {"date", "torch", "device"} <= told.keys(), path.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", told["date"]), path.name


def test_a_figure_that_was_changed_by_hand_is_seen():
    match = next(MARKED.finditer(README))
    changed = README.replace(match[0], match[0].replace("| ", "| 9", 1))
    assert fill(changed) == README != changed


def test_a_marker_without_a_table_is_told():
    with pytest.raises(UserError, match="marker of table lunch"):
        fill("<!-- table lunch -->\n<!-- end -->")
    with pytest.raises(UserError, match="no such file"):
        fill("<!-- table demo -->\n<!-- end -->", ROOT / "nowhere")
