"""Two runs never write to one folder; the lock of a dead one is in nobody's way."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import main
from bench import demo as bench_demo
from datasets import demo
from pruning.schedule import GP, MGP
from runs import search_command as cli
from runs.search_command import get_pruning_parser
from tests.tiny_run import TINY, run_script, tiny_options
from util import distributed, lock
from util.errors import UserError
from util.files import check_output_dir, remove_leftovers, temporary_of
from util.lock import LOCK_NAME, hold_folder, hold_name

ROOT = Path(main.__file__).parent
FORK = multiprocessing.get_context("fork")


def hold(folder, held, with_child=False):
    """Hold a folder until killed; tell through `held` the number of a child process, 0 without one."""
    with hold_folder(folder):
        child = os.fork() if with_child else 0
        if child or not with_child:
            held.put(child)
        time.sleep(600)


def start_holder(folder, with_child=False):
    """A process that holds a folder, and the number of its child process."""
    held = FORK.SimpleQueue()
    process = FORK.Process(target=hold, args=(folder, held, with_child))
    process.start()
    return process, held.get()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/out, until it is killed."""
    process, _ = start_holder(tmp_path / "out")
    yield process
    process.kill()
    process.join()


def test_a_second_run_names_the_first_and_writes_nothing(coco, tmp_path, holder):
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, said = run_script("main.py", f"{TINY} --eval --coco_path {coco} --output_dir {out}")
    assert code == 2
    assert said.startswith(f"error: --output_dir {out}: found process {holder.pid} on ")
    assert "pytest" in said and said.endswith("expected a folder that no other run uses\n")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_lock_of_a_process_that_was_killed_is_free_even_with_its_children_alive(tmp_path):
    process, child = start_holder(tmp_path, with_child=True)
    process.kill()
    process.join()
    try:
        os.kill(child, 0)
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == process.pid
        with hold_folder(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_for_a_lock_goes_with_it(tmp_path):
    with hold_folder(tmp_path / "a" / "b"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []
    with hold_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "log.txt").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["log.txt"]


def test_an_error_inside_gives_the_lock_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_both_searches_hold_their_folder(tmp_path, holder):
    """The parts before the lock need a checkpoint: the search is cut short in front of it."""
    for schedule in (GP, MGP):
        args = get_pruning_parser(schedule, "").parse_args(
            ["--output_dir", str(tmp_path / "out"), "--resume", "x", "--device", "cpu"]
        )
        with (
            mock.patch.object(cli, "resolve_search", side_effect=lambda options, typed: (options, None)),
            pytest.raises(UserError, match=f"found process {holder.pid} on"),
        ):
            cli.search(schedule, args)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]


def test_the_demo_and_its_data_set_are_written_by_one_process(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"^--output .*out: found process {holder.pid} on"):
        bench_demo.main()
    settings = {"images": 1, "val_images": 1, "seed": 0, "size": 64}
    with hold_name(tmp_path / "set", "the folder"):
        with pytest.raises(UserError, match=rf"^the folder .*set: found process {os.getpid()} on"):
            demo.draw_set(tmp_path / "set", **settings)
        assert not (tmp_path / "set").exists()
    assert demo.draw_set(tmp_path / "set", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


@pytest.mark.soak
def test_every_process_is_refused_where_the_first_one_is(coco, tmp_path, holder):
    out = tmp_path / "out"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2"
    words = f"main.py --eval --backbone resnet18 --no-pretrained_backbone --device cpu --coco_path {coco}"
    command = [sys.executable, *launcher.split(), *words.split(), "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert done.stderr.count(f"error: --output_dir {out}: found process {holder.pid} on ") == 2
    assert [path.name for path in out.iterdir()] == [LOCK_NAME]


def test_the_processes_that_do_not_lock_hear_of_the_refusal(tmp_path, monkeypatch):
    refusal = UserError("--output_dir x: found process 1")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_main", lambda value: (None, refusal))
    with pytest.raises(UserError, match="found process 1"), hold_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_folder(tmp_path):
        (tmp_path / "log.txt").write_text("")
    assert capsys.readouterr().out.count("its file system cannot lock files") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"7", b'{"pid": "a\\nb", "command": 3}', b"{}"])
def test_a_lock_with_an_empty_file_is_still_a_one_line_error(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "WRITING_TAKES", 0.0)
    with hold_folder(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(content)
        with pytest.raises(UserError) as error, hold_folder(tmp_path):
            pass
    assert "\n" not in str(error.value) and "writing there" in str(error.value)


def count_up(folder, times):
    """Add one to a number, reading and writing apart, as often as the lock of its folder is got."""
    while times:
        try:
            with hold_folder(folder):
                number = int((folder / "number").read_text())
                (folder / "number").write_text(str(number + 1))
                times -= 1
        except UserError:
            pass


def test_processes_take_turns_without_ever_sharing(tmp_path):
    """The lock's file comes and goes all the while."""
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=count_up, args=(tmp_path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "150"


def test_what_dead_processes_were_writing_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running, own, huge = os.getppid(), os.getpid(), 10**30
    gone = [f".checkpoint.pth.{ended.pid}.tmp", f".log.txt.{own}.tmp", f".a.{huge}.tmp"]
    stay = [f".pruned.pth.{running}.tmp", "checkpoint.pth", f"notes.{ended.pid}.tmp", ".a.b.tmp", ".hidden"]
    for name in (*gone, *stay):
        (tmp_path / name).write_text("half")
    for name in (f".probe-{ended.pid}-x", f".probe-{running}-x", f".data.{ended.pid}.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
    remove_leftovers(tmp_path, "checkpoint.pth")
    assert not (tmp_path / gone[0]).exists() and (tmp_path / gone[1]).exists()
    with hold_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*stay, f".probe-{running}-x"}


def test_what_another_host_is_writing_stays_until_it_is_a_day_old(tmp_path, monkeypatch):
    """On a shared file system the processes of another host have numbers that say nothing here."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr("socket.gethostname", lambda: "node_2.cluster")
    ours, running = temporary_of(tmp_path / "a.pth"), f".b.pth.{os.getppid()}@node-2-cluster.tmp"
    assert ours.name == f".a.pth.{os.getpid()}@node-2-cluster.tmp"
    old = [f".a.pth.{os.getppid()}@node-1.tmp", f".probe-{ended.pid}@node-1-x"]
    new = [f".b.pth.{ended.pid}@node-1.tmp", f".c.pth.{os.getpid()}@node-1.tmp", f".probe-{ended.pid}@node-1-y"]
    gone = [ours.name, f".c.pth.{ended.pid}@node-2-cluster.tmp"]
    for name in (*old, *new, *gone, running):
        (tmp_path / name).mkdir() if name.startswith(".probe") else (tmp_path / name).write_text("half")
    for name, hours in [*((name, 25) for name in old), *((name, 23) for name in new)]:
        os.utime(tmp_path / name, times=(time.time() - 3600 * hours,) * 2)
    with hold_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*new, running}


def test_an_old_probe_of_a_folder_is_removed_by_the_next(tmp_path):
    for name in (".probe-1-old", ".probe-1-new"):
        (tmp_path / name / "deep").mkdir(parents=True)
    os.utime(tmp_path / ".probe-1-old", (0, 0))
    check_output_dir(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".probe-1-new"]


def test_a_run_leaves_no_lock_behind(coco, tmp_path):
    main.main(*tiny_options("--eval --coco_path", coco, "--output_dir", tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "run.log"]


def test_the_lock_error_has_the_time_it_was_taken(tmp_path):
    with hold_folder(tmp_path):
        told = json.loads((tmp_path / LOCK_NAME).read_text())
    assert set(told) == {"pid", "host", "command", "started"}
    assert abs(time.mktime(time.strptime(told["started"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    assert told["command"] == sys.orig_argv
