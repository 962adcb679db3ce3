"""The latency benchmark: which modes it measures, and how figures follow from seconds."""

import dataclasses
import json

import pytest
import torch

import bench.latency as latency
from bench import tables
from bench.latency import MODES
from bench.published import GP_WIDTHS, MGP_WIDTHS
from models import attention, build
from models.config import DetectorConfig
from pruning.cost import cost_of, count_parameters
from util.errors import UserError
from util.timing import seconds_side_by_side

RESULTS = latency.ROOT / "bench" / "results"
SUMMARY = RESULTS / "demo_summary.json"
CHECKPOINT = latency.ROOT / "checkpoints" / "demo.pth"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo():
    return latency.demo_group(CHECKPOINT, RESULTS, CPU)


def run(folder, *words):
    latency.main(["--device", "cpu", "--subjects", "demo", "--batches", "1", "--repeats", "1", "--output", str(folder),
                  *words])  # fmt: skip
    return json.loads((folder / "latency_cpu.json").read_text())


def test_the_published_widths_are_those_of_the_paper():
    with torch.device("meta"):
        group = latency.coco_group({"GP": GP_WIDTHS, "MGP": MGP_WIDTHS}, torch.device("meta"))
    found = {name: count_parameters(detector.transformer) for name, detector in group.detectors().items()}
    assert found == {"dense": 19_667_474, "GP": 12_863_330, "MGP": 10_467_714}
    assert next(iter(found)) == "dense"


def test_whole_detectors_have_at_most_their_share_of_the_macs_and_little_less():
    config = DetectorConfig(num_classes=latency.COCO_CLASSES)
    with torch.device("meta"):
        dense = cost_of(build(config)[0], (64, 96)).detector_gmacs
        for keep in (0.75, 0.35):
            slim = build(dataclasses.replace(config, cfgs=latency.whole_detector_widths(keep, (64, 96))))[0]
            assert keep - 0.04 < cost_of(slim, (64, 96)).detector_gmacs / dense <= keep
            assert all(module.width % latency.UNIT == 0 for module in slim.prunable_modules("detector").values())


def test_the_demos_detectors_are_those_of_its_summary(demo):
    rows = json.loads(SUMMARY.read_text())["rows"]
    for detector, row in zip(demo.detectors().values(), (rows[0], rows[-1]), strict=True):
        assert count_parameters(detector) == row["params"]
        assert cost_of(detector, demo.image_size_hw).gmacs == pytest.approx(row["gmacs"], abs=1e-4)


def test_the_demos_other_detector_has_half_of_the_macs():
    group = latency.demo_group(CHECKPOINT, RESULTS, CPU, ["demo50"])
    dense, half = (cost_of(detector, group.image_size_hw).detector_gmacs for detector in group.detectors().values())
    assert list(group.slim) == ["demo, 50%"]
    assert 0.48 < half / dense <= 0.5


def test_a_run_leaves_its_figures_and_keeps_those_of_other_cases(tmp_path, monkeypatch, capsys):
    first = run(tmp_path, "--modes", "eager")
    assert [(case["mode"], case["subject"]) for case in first["cases"]] == [("eager", "dense"), ("eager", "demo")]
    assert {"date", "torch", "device", "threads"} <= first["environment"].keys()
    assert all(0 < case["ms_transformer"] < case["ms_detector"] for case in first["cases"])
    both = run(tmp_path, "--modes", "bf16")
    assert both["cases"][:2] == first["cases"]
    assert [case["mode"] for case in both["cases"][2:]] == ["bf16", "bf16"]
    assert "share" in capsys.readouterr().out
    # Measured again, and on another machine.
    assert len(run(tmp_path, "--modes", "bf16")["cases"]) == 4
    monkeypatch.setattr(latency, "environment", lambda device: {"date": "today", "threads": 1, "device": "another"})
    assert len(run(tmp_path, "--modes", "bf16")["cases"]) == 2


def test_figures_are_medians_of_ratios_turn_by_turn(demo):
    fronts = {"front": [1.0, 1.0, 2.0], "front of demo": [0.5, 0.5, 1.0]}  # its backbone is narrower
    dense, slim = latency.cases_of(demo, "eager", 1, {**fronts, "dense": [2.0, 9.0, 4.0], "demo": [1.0, 3.0, 8.0]})
    assert (dense["speed_up"], dense["share"], dense["gmacs_ratio"]) == (1, 1, 1)
    assert slim["speed_up"] == 2
    assert slim["speed_up_detector"] == 2
    assert (slim["ms_transformer"], slim["ms_detector"]) == (3000, 3500)
    assert slim["gmacs_ratio"] == pytest.approx(dense["gmacs"] / slim["gmacs"])
    assert slim["detector_gmacs_ratio"] == pytest.approx(1 / 0.6, rel=0.01)
    assert slim["share"] == pytest.approx(2 / slim["gmacs_ratio"])


def test_detectors_with_the_same_backbone_share_the_time_before_the_transformer(demo):
    assert [demo.front_of(name) for name in demo.detectors()] == ["front", "front of demo"]
    assert set(latency.measure(demo, MODES["eager"], 1, 1)) == {"front", "dense", "front of demo", "demo"}
    alike = latency.Group(demo.image_size_hw, demo.dense, {"slim": demo.dense})
    assert set(latency.measure(alike, MODES["eager"], 1, 1)) == {"front", "dense", "slim"}


def test_calls_take_turns_and_the_first_is_not_counted():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    seconds = seconds_side_by_side(calls, CPU, rounds=3, warm_up=1, on_turn=lambda: seen.append("|"))
    assert "".join(seen) == "ab|ab|ab|ab|"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_modes_compute_the_same(demo):
    """That of bfloat16 as far as 8 bits go; compiled ones and graphs are left out: they need a compiler or a GPU."""
    features = demo.dense.features(torch.randn(1, 3, 128, 128))
    with torch.no_grad():
        expected = latency.transformer_of(demo.dense, MODES["eager"])(features)
        for name, mode in MODES.items():
            if not mode.compiled and not mode.replayed:
                found = latency.transformer_of(demo.dense, mode)(features)
                tolerance = 1e-5 if mode.amp == "off" else 0.2
                torch.testing.assert_close(found["pred_logits"].float(), expected["pred_logits"],
                                           atol=tolerance, rtol=tolerance, msg=name)  # fmt: skip
                assert (found["pred_logits"].dtype == torch.bfloat16) == (mode.amp == "bf16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compiled_mode_is_compiled_with_graphs_on_cuda(demo, device, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    latency._in_mode(len, MODES["compiled"], torch.device(device))
    assert asked == [{"dynamic": False} | ({"mode": "reduce-overhead"} if device == "cuda" else {})]
    latency._in_mode(len, MODES["eager"], torch.device(device))
    assert len(asked) == 1


def test_a_graph_is_captured_once_and_replayed(monkeypatch):
    captures = []

    def captured(steps, device, amp):
        captures.append((device, amp))
        results = [(name, run(None)) for name, run in steps]
        return [(name, lambda state, result=result: result) for name, result in results]

    monkeypatch.setattr(latency, "captured", captured)
    run = latency._in_mode(len, MODES["graph-bf16"], torch.device("cuda"))
    assert [run("ab"), run("ab")] == [2, 2] and captures == [(torch.device("cuda"), "bf16")]
    with pytest.raises(AssertionError):  # a graph reads the memory of its first argument
        run("abc")


def test_unpadded_modes_pad_nothing(demo, monkeypatch):
    widths, kernel = set(), attention.F.scaled_dot_product_attention

    def note(query, key, value, **options):
        widths.add(query.shape[-1] == value.shape[-1])
        return kernel(query, key, value, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", note)
    for name, expected in (("eager-unpadded", {True, False}), ("eager", {True})):
        widths.clear()
        latency.measure(demo, MODES[name], 1, 1)
        assert widths == expected


def test_missing_requirements_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine or this build of torch has no CUDA"):
        latency.main(["--device", "cuda"])
    with pytest.raises(UserError, match="--modes: found a CUDA graph for --device cpu, expected --device cuda"):
        latency.main(["--device", "cpu", "--modes", "graph"])
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--modes: found no C\\+\\+ compiler"):
        latency.main(["--device", "cpu", "--modes", "compiled"])
    (tmp_path / "demo_summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"demo_summary\.json: found no widths"):
        latency.demo_group(CHECKPOINT, tmp_path, CPU)


def test_the_readmes_table_is_made_of_the_cases(tmp_path):
    def case(subject, size, **more):
        return {"mode": "eager", "batch": 1, "subject": subject, "image_size_hw": size, "speed_up": 1.5,
                "gmacs_ratio": 2.0, "share": 0.75, "ms_transformer": 300.0, "ms_detector": 800.0, **more}  # fmt: skip

    cases = [case("dense", [800, 1066]), case("MGP", [800, 1066]), case("dense", [128, 128], ms_transformer=7.0)]
    (tmp_path / "latency_cpu.json").write_text(json.dumps({"cases": [*cases, case("demo", [128, 128], share=0.5)]}))
    assert tables.latency(tmp_path).splitlines()[2:] == [
        "| CPU, eager | 1 | 300 / 800 |  | 1.50 of 2.00 (0.75) | 1.50 of 2.00 (0.50) |"
    ]
    (tmp_path / "latency_cuda.json").write_text(json.dumps({"cases": cases}))
    assert tables.latency(tmp_path).splitlines()[3].startswith("| CUDA, eager | 1 | 300 / 800 |")
    # Another detector than in the rows above has no place in its column.
    others = [*cases, case("demo", [128, 128], gmacs_ratio=1.3)]
    (tmp_path / "latency_cuda.json").write_text(json.dumps({"cases": others}))
    assert tables.latency(tmp_path).splitlines()[3] == "| CUDA, eager | 1 | 300 / 800 |  | 1.50 of 2.00 (0.75) |  |"


def test_the_table_of_a_gpu_has_whole_detectors_of_one_size(tmp_path):
    def case(subject, size, mode="eager"):
        return {"mode": mode, "batch": 8, "subject": subject, "image_size_hw": size, "speed_up_detector": 1.17,
                "detector_gmacs_ratio": 2.88, "ms_detector": 42.6}  # fmt: skip

    cases = [case("dense", [800, 1066]), case("35%", [800, 1066]), case("dense", [128, 128], "graph")]
    (tmp_path / "latency_cuda.json").write_text(json.dumps({"cases": cases}))
    assert tables.latency_gpu(tmp_path).splitlines()[2:] == ["| eager | 8 | 42.6 |  |  |  |  | 1.17 of 2.88 |"]


def test_the_table_of_whole_detectors_has_a_row_for_each_number_of_threads_and_images(tmp_path):
    def case(subject, size, threads, batch):
        return {"mode": "eager", "batch": batch, "threads": threads, "subject": subject, "image_size_hw": size,
                "speed_up_detector": 1.5, "detector_gmacs_ratio": 2.0, "ms_detector": 800.0}  # fmt: skip

    cases = [case(name, [800, 1066], threads, 2) for threads in (1, 2) for name in ("dense", "75%", "35%")]
    cases += [case(name, [128, 128], 1, 8) for name in ("dense", "demo", "demo, 50%")]
    (tmp_path / "latency_whole_cpu.json").write_text(json.dumps({"cases": cases}))
    assert tables.latency_whole(tmp_path).splitlines()[2:] == [
        "| DN-DETR-R50 | 1 | 2 | eager | 400 | 1.50 of 2.00 (0.75) |  | 1.50 of 2.00 (0.75) |",
        "| DN-DETR-R50 | 2 | 2 | eager | 400 | 1.50 of 2.00 (0.75) |  | 1.50 of 2.00 (0.75) |",
        "| demo | 1 | 8 | eager | 100 |  | 1.50 of 2.00 (0.75) |  |",
    ]


def test_cases_of_other_numbers_of_threads_stay(tmp_path):
    for threads in ("1", "2", "1"):
        found = run(tmp_path, "--threads", threads, "--modes", "eager")
    assert [(case["subject"], case["threads"]) for case in found["cases"]] == [
        (name, threads) for threads in (2, 1) for name in ("dense", "demo")
    ]
    torch.set_num_threads(1)
