"""The plan of inference.py: its counts are those of the run, it writes nothing and changes nothing."""

import shutil
import types
from itertools import count

import pytest

import inference
from runs import inference_plan
from runs.inference_plan import InferencePlanner, is_long_inference
from runs.plan import AT_MOST, RunPlan
from tests.tiny_run import run_script, write_self_annotated
from util import files, phases
from util.cli import parse
from util.errors import UserError
from util.lock import hold_folder

IMAGES = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_self_annotated(tmp_path_factory.mktemp("annotated") / "coco", "--backbone resnet18")


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """Phases are timed by a clock that moves by one second whenever it is read."""
    ticks = count(1)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture
def photos(root, tmp_path):
    """A folder of pictures of several sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((root / "val2017").iterdir())[:IMAGES]:
        shutil.copy(path, folder)
    assert len(list(folder.iterdir())) == IMAGES
    return folder


def detect(photos, out, *more):
    """Run inference.py as if it were long; return planned count, bound and done of each phase."""
    found = {}

    def compared(plan, clock, seconds):
        found.update({p.name: (p.count, p.bound, clock.count(p.name)) for p in plan.phases})
        assert all(p.seconds > 0 and clock.seconds(p.name) > 0 for p in plan.phases)
        return shown(plan, clock, seconds)

    shown = RunPlan.compared
    words = f"{photos} --output_dir {out} --num_workers 0 --device cpu {' '.join(map(str, more))}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_plan, "LONG", 0)
        patch.setattr(RunPlan, "compared", compared)
        inference.main(*parse(inference.get_inference_parser(), words.split()))
    return found


def tree(root):
    """Times of the files in a folder; checking that it can be written changes those of folders."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def test_counts_are_those_of_the_run(root, photos, tmp_path):
    found = detect(photos, tmp_path / "out", "--resume", root / "dense.pth")
    assert found == dict.fromkeys(("waiting for images", "detection", "drawing"), (IMAGES, "", IMAGES))
    log = (tmp_path / "out" / "run.log").read_text()
    assert log.index(f"plan of an inference on {IMAGES} images") < log.index("category") < log.index("the rest,")


def test_two_detectors_are_planned_and_a_damaged_image_makes_it_a_bound(root, photos, tmp_path):
    (photos / "0.jpg").write_bytes(b"no image")
    checkpoint = root / "dense.pth"
    found = detect(photos, tmp_path / "out", "--compare", checkpoint, checkpoint)
    read = found.pop("waiting for images")
    assert read == (IMAGES, "", IMAGES)
    assert found.pop("timings") == (17, AT_MOST, 14)  # 2 of warm-up, 3 rounds
    assert found == dict.fromkeys(("detection", "drawing"), (IMAGES, AT_MOST, IMAGES - 1))


def test_results_are_the_same_with_and_without_a_plan(root, photos, tmp_path, monkeypatch):
    detect(photos, tmp_path / "long", "--resume", root / "dense.pth")
    monkeypatch.setattr(inference, "is_long_inference", lambda prediction: False)
    assert detect(photos, tmp_path / "short", "--resume", root / "dense.pth") == {}
    one, other = ((tmp_path / name / "results.json").read_bytes() for name in ("long", "short"))
    assert one == other


def test_plan_prints_and_writes_nothing(root, photos, tmp_path, capsys):
    before = tree(tmp_path)
    words = f"{photos} --output_dir {tmp_path}/a/b --num_workers 0 --device cpu --resume {root}/dense.pth --plan"
    assert run_script("inference.py", words) == (0, "")
    assert tree(tmp_path) == before
    text = capsys.readouterr().out
    for part in ("waiting for images", "detection", "drawing", "total", "MB in", "they fit", "besides the weights"):
        assert part in text


def test_the_size_of_the_files_is_that_of_the_run(root, photos, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(inference_plan, "gigabytes", lambda number: sizes.append(number) or "some")
    detect(photos, tmp_path / "out", "--resume", root / "dense.pth", "--score_threshold", 0)
    pictures = sum(path.stat().st_size for path in (tmp_path / "out" / "pictures").iterdir())
    assert sizes[0] == pytest.approx(pictures, rel=1e-3)  # batches of others may round differently
    assert sizes[1] == pytest.approx((tmp_path / "out" / "results.json").stat().st_size, rel=1e-3)
    monkeypatch.setattr(inference_plan, "free_disk", lambda folder: 0.9 * (sizes[0] + sizes[1]))
    monkeypatch.setattr(inference_plan, "gigabytes", lambda number: "some")
    detect(photos, tmp_path / "full", "--resume", root / "dense.pth", "--score_threshold", 0)
    assert "they do not fit" in (tmp_path / "full" / "run.log").read_text()


def test_free_space_is_that_of_the_folder_to_be(tmp_path):
    assert files.free_disk(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_the_sample_is_small_and_spread(root, photos, tmp_path, monkeypatch):
    """Also with unreadable files among the first."""
    seen = []
    monkeypatch.setattr(inference_plan, "SAMPLED_IMAGES", 4)
    read = inference_plan.InferencePlanner._time
    monkeypatch.setattr(InferencePlanner, "_time", lambda self, batch: seen.append(len(batch)) or read(self, batch))
    detect(photos, tmp_path / "out", "--resume", root / "dense.pth --batch_size 2")
    assert seen == [2, 2]
    prediction = types.SimpleNamespace(paths=range(127), loader=types.SimpleNamespace(batch_size=2))
    assert not is_long_inference(prediction)
    prediction.paths = range(128)
    assert is_long_inference(prediction)


def test_plan_refuses_what_the_run_would(root, photos, tmp_path):
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    words = f"{photos} --output_dir {tmp_path}/out --device cpu --num_workers 0 --plan"
    for more, expected in (
        (f"--resume {root}/dense.pth", f"no image that can be read among {IMAGES}"), ("", "--resume, --compare"),
        (f"--resume {root}/none.pth", "none.pth"),
    ):  # fmt: skip
        code, message = run_script("inference.py", f"{words} {more}")
        assert code == 2 and expected in message, more
    with hold_folder(tmp_path / "out"), pytest.raises(UserError, match="writing there"):
        detect(photos, tmp_path / "out", "--plan --resume", root / "dense.pth")
