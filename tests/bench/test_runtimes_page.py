"""The table of runtimes is of the figures in the file."""

import json

from bench.runtimes_page import RESULT_NAME, runtimes, runtimes_text


def test_a_slim_detector_stands_in_the_line_of_its_runtime(tmp_path):
    def row(runtime, detector, milliseconds, speed_up):
        return {"runtime": runtime, "detector": detector, "milliseconds": milliseconds, "speed_up": speed_up}

    demo = [row("PyTorch", "dense", 8.0, 1.0), row("OpenVINO", "dense", 4.0, 1.0), row("OpenVINO", "35%", 1.6, 2.5)]
    r50 = [row("OpenVINO", "dense", 900.0, 1.0), row("PyTorch", "dense", 800.0, 1.0), row("PyTorch", "50%", 400.0, 2.0)]
    found = {
        "environment": {"date": "2026-01-01", "device": "a CPU", "threads": 1, "torch": "2", "onnxruntime": "1",
                        "openvino": "3"},
        "subjects": {
            "demo": {"image_size_hw": [128, 96], "rounds": 5, "rows": demo},
            "r50": {"image_size_hw": [800, 1066], "rounds": 3, "rows": r50},
        },
    }  # fmt: skip
    (tmp_path / RESULT_NAME).write_text(json.dumps(found))
    assert runtimes(tmp_path).splitlines()[2:] == [
        "| demo, 128 x 96 | PyTorch | 8.0 |  |  |  |",
        "| demo, 128 x 96 | OpenVINO | 4.0 |  |  | 1.6 (2.50) |",
        "| DN-DETR-R50, 800 x 1066 | OpenVINO | 900.0 |  |  |  |",
        "| DN-DETR-R50, 800 x 1066 | PyTorch | 800.0 |  | 400.0 (2.00) |  |",
    ]
    text = runtimes_text(tmp_path).replace("\n", " ")
    assert "Fastest for the dense detector: demo: OpenVINO; DN-DETR-R50: PyTorch." in text
    assert "Medians over turns (demo 5, DN-DETR-R50 3) of CPU time" in text
