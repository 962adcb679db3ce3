"""The plan of main.py: its counts are those of the run, it writes nothing and changes nothing."""

import gc
import types
from itertools import count
from unittest import mock

import pytest
import torch

import engine
import main
from models.detector import Detector
from runs import training_run
from runs.plan import AT_MOST, RunPlan
from runs.training_state import TrainingState
from tests.tiny_run import TINY, run_script, tiny_options, write_coco
from util import phases
from util.errors import NonFiniteLossError, UserError
from util.lock import hold_folder
from util.memory import PeakMemory
from weights.checkpoint_file import read_checkpoint

IMAGES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), images=IMAGES)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a training of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    main.main(*tiny_options("--epochs 1 --coco_path", data, "--output_dir", out))
    return out


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """Phases are timed by a clock that moves by one second whenever it is read."""
    ticks = count(1)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Runs main.py as if it were long; returns planned count, bound and done of each phase."""

    def run(*more, is_long=True, out="out"):
        found = {}

        def compared(plan, clock, seconds):
            for phase in plan.phases:
                found[phase.name] = (phase.count, phase.bound, clock.count(phase.name))
                assert phase.seconds > 0 and clock.seconds(phase.name) > 0
            return shown(plan, clock, seconds)

        shown = RunPlan.compared
        with monkeypatch.context() as patch:
            patch.setattr(main, "is_long_run", lambda run: is_long)
            patch.setattr(RunPlan, "compared", compared)
            main.main(*tiny_options("--coco_path", data, "--output_dir", tmp_path / out, *more))
        return found

    return run


def tree(root):
    """Times of the files in a folder; checking that it can be written changes those of folders."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def exactly(**counts):
    return {name.replace("_", " "): (number, "", number) for name, number in counts.items()}


def test_counts_of_a_training_are_those_of_its_plan(run, tmp_path):
    found = run("--epochs 3 --eval_every 2 --accumulate 2 --ema_decay 0.9 --batch_size 2")
    tested = 2 * IMAGES  # after epochs 2 and 3
    assert found == exactly(waiting_for_images=3 * IMAGES + tested, training=15, evaluation=tested, mAP=tested)
    log = (tmp_path / "out" / "run.log").read_text()
    assert log.index("plan of 3 epochs of 2 optimizer steps on 5 images") < log.index("epoch 0") < log.index("the rest")


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3), (4, 2), (16, 1)])
def test_a_plan_counts_the_optimizer_steps_of_the_run(run, monkeypatch, accumulate, steps):
    """By a clock where a forward pass takes 1 s and a step 10 s, for two epochs of 5 batches."""
    seconds, planned, plan = [0.0], [], main.TrainingPlanner.plan

    def taking(duration, function):
        def timed(*given):
            seconds[0] += duration
            return function(*given)

        return timed

    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr(engine, "_losses", taking(1.0, engine._losses))
    monkeypatch.setattr(engine, "_optimizer_step", taking(10.0, engine._optimizer_step))
    monkeypatch.setattr(main.TrainingPlanner, "plan", lambda self: planned.append(plan(self)) or planned[-1])
    run(f"--epochs 2 --batch_size 1 --plan --accumulate {accumulate}")
    assert planned[0].seconds_of(phases.TRAINING) == pytest.approx(2 * (5 * 1.0 + steps * 10.0))


def test_a_resumed_training_plans_the_epochs_that_are_left(run, trained):
    found = run("--epochs 3 --patience 9 --resume", trained / "checkpoint.pth")
    assert found["training"] == (2 * IMAGES, AT_MOST, 2 * IMAGES) and found["mAP"] == (2 * IMAGES, AT_MOST, 2 * IMAGES)


def test_the_evaluation_before_fine_tuning_is_planned(run, trained):
    fresh = "--epochs 1 --start_fresh --keep_queries 3 --cache_images --resume"
    assert run(fresh, trained / "checkpoint.pth")["evaluation"] == (2 * IMAGES, "", 2 * IMAGES)


def test_counts_of_an_evaluation_are_those_of_its_plan(run, trained):
    found = run("--eval --ap_by_layer --batch_size 5 --resume", trained / "checkpoint.pth")
    assert found == exactly(waiting_for_images=IMAGES, evaluation=IMAGES, mAP=2 * IMAGES)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_training_ends_with_the_same_bits_with_and_without_a_plan(run, trained, tmp_path, is_resumed):
    more = "--epochs 2 --augmentation detr"
    more += f" --resume {trained / 'checkpoint.pth'}" if is_resumed else " --dropout 0.1"
    run(more, out="long")
    run(more, out="short", is_long=False)
    one, other = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("long", "short"))
    assert all(torch.equal(value, other.state_dict[key]) for key, value in one.state_dict.items())
    generators = [checkpoint.training["generators"][0] for checkpoint in (one, other)]
    assert torch.equal(generators[0]["torch"], generators[1]["torch"])
    assert generators[0]["python"] == generators[1]["python"]
    assert torch.equal(generators[0]["numpy"][1], generators[1]["numpy"][1])


@pytest.mark.parametrize("more", ["--epochs 2", "--epochs 1 --start_fresh --ema_decay 0.9"])
def test_the_memory_of_a_step_is_what_the_run_takes(run, trained, monkeypatch, more):
    """Without the copy of the detector, its average and what the run has loaded; the teacher is built once."""
    teachers, memory, planned = [], PeakMemory(), []
    build = training_run.build_distillation
    monkeypatch.setattr(training_run, "build_distillation", lambda *given: teachers.append(1) or build(*given))
    facts, train = main.TrainingPlanner._facts, main.Run._train_epoch

    def train_measured(self):
        with memory:
            return train(self)

    monkeypatch.setattr(main.TrainingPlanner, "_facts", lambda self: planned.append(self._step_bytes) or facts(self))
    monkeypatch.setattr(main.Run, "_train_epoch", train_measured)
    checkpoint = trained / "checkpoint.pth"
    run(more, "--batch_size 5 --augmentation flip --distill", checkpoint, "--resume", checkpoint)
    assert planned[0] == pytest.approx(memory.peak_bytes, rel=0.02) and len(teachers) == 1


@pytest.mark.parametrize("more", ["--epochs 2 --batch_size 9", "--epochs 2 --cache_images", "--eval"])
def test_plan_prints_and_writes_nothing(data, tmp_path, capsys, more):
    before = tree(data)
    words = f"{TINY} --coco_path {data} --output_dir {tmp_path / 'a' / 'b'} --plan {more}"
    assert run_script("main.py", words.replace("\n", " ")) == (0, "")
    assert not (tmp_path / "a").exists() and tree(data) == before
    text = capsys.readouterr().out
    for part in ("waiting for images", "evaluation", "mAP", "total"):
        assert part in text
    assert ("an epoch takes" in text) == ("--epochs" in more)
    assert ("decodes the images once" in text) == ("--cache_images" in more)


def test_plan_refuses_what_the_run_would(data, tmp_path, trained):
    before = tree(tmp_path)
    for more, expected in (
        ("--eval --epochs 2", "--epochs"),
        (f"--resume {trained}/checkpoint.pth --epochs 1", "expected more --epochs"),
        ("--coco_path nowhere", "nowhere"),
    ):
        words = f"{TINY} --coco_path {data} --output_dir {tmp_path / 'out'} --plan {more}"
        code, message = run_script("main.py", words.replace("\n", " "))
        assert code == 2 and expected in message, more
    assert tree(tmp_path) == before
    with hold_folder(tmp_path / "held"), pytest.raises(UserError, match="writing there"):
        main.main(*tiny_options("--plan --coco_path", data, "--output_dir", tmp_path / "held"))


def alive(kind):
    return sum(isinstance(found, kind) for found in gc.get_objects())


@pytest.mark.parametrize("teachers", [0, 1])
@pytest.mark.parametrize("fails", [None, torch.OutOfMemoryError, NonFiniteLossError("epoch 0: loss is nan")])
def test_nothing_of_the_sample_is_left_when_the_run_begins(run, trained, monkeypatch, fails, teachers):
    """Not even the teacher's weights in 16 bits."""
    more = ["--amp bf16 --distill", trained / "checkpoint.pth"] if teachers else []
    gc.collect()
    before, seen = (alive(Detector), alive(TrainingState)), []
    finish = main.TrainingPlanner._facts

    def facts(planner):
        if fails is not None:
            raise fails
        return finish(planner)

    monkeypatch.setattr(main.TrainingPlanner, "_facts", facts)
    monkeypatch.setattr(main.Run, "train", lambda _: seen.append((alive(Detector), alive(TrainingState))))
    run("--epochs 1", *more)
    assert seen == [(before[0] + 1 + teachers, before[1] + 1)]


def test_several_gpus_have_no_plan_of_a_training_unless_asked(run, monkeypatch):
    monkeypatch.setattr(main.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(main.TrainingPlanner, "plan", lambda planner: pytest.fail("planned"))
    logged = mock.Mock()
    options = types.SimpleNamespace(run=types.SimpleNamespace(plan=False, eval=False))
    main._show_plan(types.SimpleNamespace(options=options, device=torch.device("cuda"), log=logged), None)
    assert "--plan shows" in logged.info.call_args[0][0]


def test_a_run_that_has_no_room_for_the_sample_has_no_plan(run, monkeypatch, tmp_path):
    def fail(planner):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(main.TrainingPlanner, "plan", fail)
    assert run("--epochs 1") == {} and (tmp_path / "out" / "checkpoint.pth").exists()
    with pytest.raises(UserError, match="--batch_size 2: cpu has too little memory for the plan"):
        run("--epochs 1 --plan", out="none")
