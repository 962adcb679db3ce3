"""The plan of export.py: its counts are those of the run, and it writes nothing."""

import types
from itertools import count

import pytest

import export
from runs import export_plan
from runs.export_plan import most_trials
from runs.plan import AT_MOST, RunPlan
from tests.pruning.tiny import tiny_detector
from tests.test_export import SLIM, save
from tests.tiny_run import run_script, write_self_annotated
from tools.export_int8 import GROUPS
from util import phases
from util.cli import parse
from util.errors import UserError
from util.lock import hold_folder

SIZES = "--image_size_hw 64 96 --image_size_hw 96 64"


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """Phases are timed by a clock that moves by one second whenever it is read."""
    ticks = count(1)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def run(*words):
    """Run export.py; return planned count, bound and done of each phase."""
    found = {}

    def compared(plan, clock, seconds):
        found.update({p.name: (p.count, p.bound, clock.count(p.name)) for p in plan.phases})
        return shown(plan, clock, seconds)

    shown = RunPlan.compared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunPlan, "compared", compared)
        export.main(*parse(export.get_export_parser(), [word for text in words for word in str(text).split()]))
    return found


def tree(root):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def test_checks_are_counted_as_they_run(tmp_path, monkeypatch):
    """For each size one image alone with and without padding, and three at once."""
    model, _ = save(tmp_path / "slim.pth", cfgs=SLIM)
    clocks = []
    monkeypatch.setattr(export, "PhaseClock", lambda device: clocks.append(phases.PhaseClock(device)) or clocks[0])
    run(f"--resume {tmp_path}/slim.pth --output_dir {tmp_path}/out --format pt2 {SIZES}")
    planned = export_plan.PlannedExport(["pt2"], [(64, 96), (96, 64)], export.GraphForm(), tmp_path)
    (checks,) = export_plan.plan_export(model, planned).phases
    assert checks.count == clocks[0].count("checks") == 2 * 5


@pytest.mark.soak
def test_counts_are_those_of_the_run(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    data = write_self_annotated(tmp_path / "data", "--dec_layers 1")
    found = run(
        f"--resume {data}/dense.pth --output_dir {tmp_path}/out --format onnx --fp16 {SIZES} --timings 2",
        f"--int8 --int8_float heads --max_ap_loss 100 --coco_path {data} --batch_size 2 --num_workers 0",
    )
    assert found["checks"] == (2 * 5 * 3, "", 2 * 5 * 3)  # float16 has a rounded twin
    planned, bound, done = found["evaluation"]
    assert planned == done and planned % 4 == 0 and bound == ""  # PyTorch, bfloat16, ONNX and one form of INT8
    assert found["timings"] == (7, "", 7)
    assert found["calibration"][0] == found["calibration"][2] > 0 and set(found) == {
        "checks", "evaluation", "timings", "calibration",
    }  # fmt: skip


def test_forms_of_int8_are_bounded():
    """All groups in INT8; each one alone in float; two and three together."""
    assert most_trials(None) == 1 + 4 + 2 and most_trials(["heads"]) == 1 and len(GROUPS) == 4


def test_plan_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    save(tmp_path / "slim.pth", cfgs=SLIM)
    before = tree(tmp_path)
    timed = []
    seconds = export_plan._seconds
    monkeypatch.setattr(export_plan, "_seconds", lambda model, images: timed.append(model) or seconds(model, images))
    words = f"--resume {tmp_path}/slim.pth --output_dir {tmp_path}/a/b {SIZES} --timings 3 --fp16 --plan"
    assert run_script("export.py", words) == (0, "")
    assert tree(tmp_path) == before
    text = capsys.readouterr().out
    for part in ("checks", "timings", "3 turns", "not estimated: tracing", "they fit", "pt2", "fp16"):
        assert part in text
    assert len(timed) == 2 + 2  # each size; the detector and its full widths


def test_files_are_as_large_as_their_weights(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(export_plan, "gigabytes", lambda number: sizes.append(number) or "some")
    model = tiny_detector("")[0].eval()
    planned = export_plan.PlannedExport(("onnx", "fp16"), [], export.GraphForm(), tmp_path)
    text = " ".join(export_plan._facts(model, planned))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights <= sizes[0] < 1.2 * weights and sizes[1] == sizes[0] / 2 and "they fit" in text
    monkeypatch.setattr(export_plan, "free_disk", lambda folder: weights)
    assert "they do not fit" in " ".join(export_plan._facts(model, planned))


def test_the_search_for_layers_in_float_is_a_bound_and_its_end_is_advised(tmp_path, capsys, monkeypatch):
    data = write_self_annotated(tmp_path / "data", "--dec_layers 1")
    plans = []
    text = RunPlan.text
    monkeypatch.setattr(RunPlan, "text", lambda plan: plans.append(plan) or text(plan))
    monkeypatch.setattr(export_plan, "_seconds", lambda model, images: 1.0)
    assert run(f"--resume {data}/dense.pth --output_dir {tmp_path}/out --format onnx {SIZES} --int8 --plan "
               f"--coco_path {data} --num_workers 0") == {}  # fmt: skip
    (plan,) = plans
    (evaluation,) = [phase for phase in plan.phases if phase.name == "evaluation"]
    assert evaluation.bound == AT_MOST and evaluation.seconds == evaluation.count and evaluation.count % 10 == 0
    assert "--int8_float GROUPS" in plan.advice[0] and not (tmp_path / "out").exists()


def test_plan_refuses_what_the_export_would(tmp_path):
    save(tmp_path / "slim.pth", cfgs=SLIM)
    before = tree(tmp_path)
    for more, expected in (
        ("--int8 --format onnx --coco_path nowhere", "nowhere"),
        ("--static --image_size_hw 64 64", "--static"),
        ("--detections --num_select 0", "--num_select"),
        ("--image_size_hw 32 128", "32 128: expected sides of at least 33 pixels"),
    ):
        words = f"--resume {tmp_path}/slim.pth --output_dir {tmp_path}/out {SIZES} --plan {more}"
        code, message = run_script("export.py", words)
        assert code == 2 and expected in message, more
    assert tree(tmp_path) == before
    with hold_folder(tmp_path / "out"), pytest.raises(UserError, match="writing there"):
        run(f"--resume {tmp_path}/slim.pth --output_dir {tmp_path}/out {SIZES} --plan")
