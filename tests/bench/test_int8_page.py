"""The table of INT8 is of the figures in the file."""

import json

from bench.int8_page import RESULT_NAME, int8, int8_text


def test_a_row_is_compared_with_float32_of_its_own_detector(tmp_path):
    def detector(name, milliseconds, is_good, trials):
        rows = [
            {"runtime": "PyTorch", "precision": "float32", "ap": 0.6, "milliseconds": 90.0},
            {"runtime": "onnxruntime", "precision": "float32", "ap": 0.6, "milliseconds": milliseconds},
            {"runtime": "onnxruntime", "precision": "INT8", "ap": 0.55, "milliseconds": 20.0},
        ]
        return {"name": name, "rows": rows, "is_good": is_good, "trials": trials, "images": 9, "calibration_images": 3}

    heads = [{"in_float": [], "ap": 0.55}, {"in_float": ["heads", "decoder"], "ap": 0.595}]
    found = {
        "detectors": [detector("dense", 40.0, False, heads), detector("slim", 10.0, True, heads[:1])],
        "environment": {"date": "2026-01-01", "device": "a CPU", "threads": 1, "torch": "2"},
    }
    (tmp_path / RESULT_NAME).write_text(json.dumps(found))
    lines = int8(tmp_path).splitlines()
    assert lines[4] == "| dense | onnxruntime | INT8 | 55.0 | 20.0 | 2.00 |"
    assert lines[-1] == "| slim | onnxruntime | INT8 | 55.0 | 20.0 | 0.50 |"
    text = int8_text(tmp_path).replace("\n", " ")
    assert (
        "dense: plain INT8 is refused; AP: 55.0 with no group in float32, 59.5 with heads decoder in float32." in text
    )
    assert (
        "slim: plain INT8 is written; AP: 55.0 with no group in float32." in text and "on 9 validation images" in text
    )
