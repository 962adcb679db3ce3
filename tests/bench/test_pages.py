"""Tables and sentences with figures on the pages are made from the committed files."""

import json
import re
import shutil

import pytest

from bench.pages import FRAGMENTS, MARKED, RESULTS, ROOT, fill, pages
from bench.tables import TABLES
from util.errors import UserError

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_every_fragment_is_made_from_the_committed_figures(path):
    text = path.read_text()
    assert fill(text) == text, "run `make tables`"


def test_every_fragment_is_on_a_page():
    found = {(match[2], match[3]) for path in pages() for match in MARKED.finditer(path.read_text())}
    assert found == {(kind, name) for kind, named in FRAGMENTS.items() for name in named}


def test_every_file_of_figures_names_what_they_were_measured_with():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        made = json.loads(path.read_text())["environment"]
        assert {"date", "torch", "device"} <= made.keys(), path.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"]), path.name


def test_a_figure_changed_by_hand_is_noticed():
    for match in MARKED.finditer(README):
        changed = README.replace(match[0], re.sub(r"(\d)(?=\D*<!-- end)", r"\g<1>9", match[0], count=1))
        assert changed != README and fill(changed) == README, match[3]


def test_tables_and_sentences_follow_the_files(tmp_path):
    results = shutil.copytree(RESULTS, tmp_path / "results")
    path = results / "quality_demo.json"
    figures = json.loads(path.read_text())
    for row in figures["rows"]:
        if row["name"] == "ours":
            row["ap_before"] = 0.1234
    path.write_text(json.dumps(figures))
    assert "| 12.3 / 61.7 / 62.7 |" in TABLES["summary"](results)
    assert "12.3 at searched widths" in " ".join(FRAGMENTS["text"]["defaults"](results).split())


def test_times_of_the_samplings_kernels_are_shown_where_they_were_measured(tmp_path):
    results = shutil.copytree(RESULTS, tmp_path / "results")
    path = results / "ops_cuda.json"
    figures = json.loads(path.read_text())
    for with_kernels in (False, True):
        figures.pop("commit", None)
        for case in figures["cases"]:
            case.pop("kernel_milliseconds", None)
            if with_kernels:
                case["kernel_milliseconds"] = {"operator": 0.1234, "original": 0.9872}
        path.write_text(json.dumps(figures))
        table, text = TABLES["ops"](results), " ".join(FRAGMENTS["text"]["ops"](results).split())
        assert ("| 0.123 |" in table) == with_kernels
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert ("took 8.0 times as long forward, 8.0 backward" in text) == with_kernels
        assert ("the kernels alone" in text) == with_kernels
        assert "of commit" not in text
    path.write_text(json.dumps({**figures, "commit": "0123abc"}))
    text = " ".join(FRAGMENTS["text"]["ops"](results).split())
    assert "rounds of commit 0123abc, before the latest changes of the kernels." in text


def test_a_marker_without_a_fragment_is_an_error(tmp_path):
    with pytest.raises(UserError, match="found table lunch"):
        fill("<!-- table lunch -->\n<!-- end -->")
    with pytest.raises(UserError, match="found text lunch"):
        fill("<!-- text lunch -->\n<!-- end -->")
    with pytest.raises(UserError, match="no such file"):
        fill("<!-- table demo -->\n<!-- end -->", tmp_path)
