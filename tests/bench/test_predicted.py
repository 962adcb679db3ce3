"""The table of predictions is of the searches' own figures."""

import json

import pytest

from bench.predicted import RESULT_NAME, main, predicted_latency, predicted_latency_text
from util.errors import UserError

MACHINE = {"date": "2026-01-01", "device": "a CPU", "threads": 2, "torch": "2"}


def write_search(folder, detectors, machine=MACHINE):
    folder.mkdir()
    (folder / "latency.json").write_text(
        json.dumps({"threads": 2, "image_size_hw": [64, 96], "batch_size": 3, "amp": "off", "device": "a CPU"})
    )
    found = {
        name: {"predicted": predicted, "milliseconds": measured, "spread": 0.5, "samples": 9}
        for name, (predicted, measured) in detectors.items()
    }
    (folder / "summary.json").write_text(json.dumps({"environment": machine, "latency": {"detectors": found}}))
    return folder


def test_each_detector_stands_beside_the_dense_one_of_its_search(tmp_path, capsys):
    first = write_search(tmp_path / "one", {"before": (100.0, 80.0), "0.50": (50.0, 50.0)})
    second = write_search(tmp_path / "two", {"before": (10.0, 10.0), "0.30": (3.0, 2.5)})
    main([f"small={second}", f"large={first}", "--output", str(tmp_path / "results")])
    assert "large" in capsys.readouterr().out
    lines = predicted_latency(tmp_path / "results").splitlines()[2:]
    assert lines == [
        "| small | 2 | 3 | 64 x 96 | dense | 10.0 | 10.0 | 1.00 | 1.00 | 1.00 |",
        "| small | 2 | 3 | 64 x 96 | 30 % | 3.0 | 2.5 | 1.20 | 3.33 | 4.00 |",
        "| large | 2 | 3 | 64 x 96 | dense | 100.0 | 80.0 | 1.25 | 1.00 | 1.00 |",
        "| large | 2 | 3 | 64 x 96 | 50 % | 50.0 | 50.0 | 1.00 | 2.00 | 1.60 |",
    ]
    text = predicted_latency_text(tmp_path / "results").replace("\n", " ")
    assert "2 of 4 predictions are within a tenth of the measured time; the largest difference is 25 %" in text
    assert "interquartile range of measured times is 20 % of their median (small, threads: 2)" in text


@pytest.mark.parametrize("name", ["after", "20ms"])
def test_a_search_by_one_budget_or_by_milliseconds_is_shown(tmp_path, name):
    folder = write_search(tmp_path / "one", {"before": (10.0, 10.0), name: (5.0, 4.0)})
    main([f"demo={folder}", "--output", str(tmp_path)])
    assert predicted_latency(tmp_path).splitlines()[3].startswith(f"| demo | 2 | 3 | 64 x 96 | {name} | 5.0 | 4.0 |")


@pytest.mark.parametrize("words", [["here"], ["=here"], ["name="]])
def test_a_search_without_a_name_is_refused(words):
    with pytest.raises(UserError, match="NAME=OUTPUT_DIR"):
        main(words)


def test_the_output_of_another_search_is_refused(tmp_path):
    folder = write_search(tmp_path / "macs", {})
    (folder / "summary.json").write_text(json.dumps({"environment": MACHINE, "latency": None}))
    with pytest.raises(UserError, match="expected the --output_dir of a finished search with --cost latency"):
        main([f"demo={folder}", "--output", str(tmp_path)])
    assert not (tmp_path / RESULT_NAME).exists()


def test_searches_of_two_machines_do_not_share_a_table(tmp_path):
    rows = {"before": (10.0, 10.0)}
    one = write_search(tmp_path / "one", rows)
    other = write_search(tmp_path / "other", rows, MACHINE | {"device": "another CPU"})
    with pytest.raises(UserError, match="b: found device another CPU, expected a CPU"):
        main([f"a={one}", f"b={other}", "--output", str(tmp_path)])
    more_threads = write_search(tmp_path / "threads", rows, MACHINE | {"threads": 4, "date": "2026-01-02"})
    main([f"a={one}", f"b={more_threads}", "--output", str(tmp_path)])
