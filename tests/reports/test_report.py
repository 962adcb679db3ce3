"""Reports of a search and of a training run: their figures, no external files, and regenerating them."""

import json
import logging
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pytest
import torch

import main
from datasets.coco import annotation_path
from datasets.coco_eval import evaluator_name
from datasets.config import DataConfig
from models.config import DetectorConfig
from pruning.cost import cost_of
from pruning.schedule import MGP, Schedule
from reports import report
from reports.__main__ import main as report_main
from reports.samples import Samples
from reports.search_page import read_search
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import built, options, settled, write_self_annotated
from util.cli import parse
from util.errors import RunFailedError, UserError
from util.logging import get_logger
from weights.build import build_detector

HOSTILE = "<script>alert('kind')</script>"
COMMAND = ["prune_greedy_ad.py", "--output_dir", "out <script>alert(1)</script>"]
QUOTED = "python prune_greedy_ad.py --output_dir 'out <script>alert(1)</script>'"
UNITS = "--attention_unit 4 --ffn_unit 16 --batch_size 2 --num_workers 0 --device cpu"


class Page(HTMLParser):
    """Text, tags, attributes and headings of a report."""

    def __init__(self, content):
        super().__init__()
        self.content, self.text, self.tags, self.attributes, self.headings = content, "", set(), [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "h2":
            self.headings.append("")

    def handle_data(self, data):
        self.text += data
        if self.headings and not self.headings[-1]:
            self.headings[-1] = data

    def handle_endtag(self, tag):
        self.text += " " if tag in ("td", "th") else ""


def read(folder):
    return Page((folder / "report.html").read_text())


def run_search(root, out, more="", argv=COMMAND):
    words = f"{UNITS} --coco_path {root} --resume {root}/dense.pth --output_dir {out} {more}"
    with mock.patch.object(sys, "argv", argv):
        return search(MGP, *parse(get_pruning_parser(MGP, "a test"), words.split()))


@pytest.fixture(scope="module", autouse=True)
def draw_reports():
    """Overrides the shared fixture: these tests draw reports."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set and its detector, in a folder and with categories of hostile names."""
    root = write_self_annotated(tmp_path_factory.mktemp("report") / "<script>&'data'")
    for split in ("train2017", "val2017"):
        path = annotation_path(root, split)
        tables = json.loads(path.read_text())
        for category in tables["categories"]:
            category["name"] = f" {HOSTILE}\r\n"
        path.write_text(json.dumps(tables))
    return root


@pytest.fixture(scope="module")
def searched(root):
    """Folder and result of a search on val2017; not to be changed."""
    return root / "search", run_search(root, root / "search", "--map_tol 0.3 --search_split val2017")


@pytest.fixture(scope="module")
def trained(root, searched):
    """Folder of two epochs of fine-tuning; not to be changed."""
    main.main(*options("--coco_path", root, "--output_dir", root / "tuned", "--resume", searched[0] / "pruned.pth",
                       "--epochs 2 --batch_size 2 --augmentation flip --num_workers 0 --device cpu"))  # fmt: skip
    return root / "tuned"


def test_a_search_report_shows_its_results(root, searched):
    folder, result = searched
    page = read(folder)
    assert page.headings == ["Cost", "Width of each module", "AP against cost", "Trials", "Modules",
                             "Sample detections", "Go on", "Made with"]  # fmt: skip
    assert f"{result.base_ap:.4f}" in page.text and f"{result.ap:.4f}" in page.text and "on 7 images" in page.text
    args, _ = options("--coco_path", root, "--resume", result.path, "--eval --device cpu")
    slim, _, _ = built(*settled(args)[:2])
    cost = cost_of(slim, (64, 64))
    assert f"{cost.transformer_params:,}" in page.text and f"{cost.params:,}" in page.text
    assert f"{cost.gmacs:.3g}" in page.text and "64 x 64" in page.text
    assert f"--cfgs '{result.widths}'" in page.text and "--resume_search" not in page.text
    for name, width in result.widths.items():
        assert re.search(rf"\b{name}\s+32\s+{width}\s", page.text)
    assert f"before fine-tuning, by {evaluator_name()}" in page.text
    assert QUOTED in page.text and "val2017, so its AP is measured" in page.text
    for fact in (torch.__version__, "torchvision", "seed42", "threads", "duration", f"{folder}/finetuned"):
        assert fact in page.text.replace("'\"'\"'", "'")
    assert "annotated: " in page.text and "dense: " in page.text and "slim, before fine-tuning: " in page.text


def test_a_training_report_shows_its_epochs(trained, searched):
    page = read(trained)
    assert page.headings == ["Curves", "COCO figures on val2017", "What fine-tuning gained", "Epochs", "Cost",
                             "Width of each module", "Sample detections", "Made with"]  # fmt: skip
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    best = max(lines, key=lambda line: line["test_AP"])
    assert f"best AP{best['test_AP']:.4f}epoch {best['epoch']}" in page.text
    assert f"epoch {best['epoch']}, on val2017, by {evaluator_name()}" in page.text
    assert all(line["evaluator"] == evaluator_name() for line in lines)
    assert f"best: epoch {best['epoch']}" in page.content  # marked in the plot
    for line in lines:
        row = [line["train_loss"], line["test_loss"], line["test_AP"], line["test_AP50"], line["train_seconds"]]
        assert " ".join(f"{value:.4f}" for value in row) in page.text
    figures = {name: best[f"test_{name}"] for name in ("AP75", "APs", "APm", "APl", "AR1", "ARl")}
    for name, figure in figures.items():
        assert f"{name} {'not measurable' if figure == -1 else f'{figure:.4f}'}" in page.text
    assert figures["AP75"] > 0 and -1 in figures.values()  # not every object size occurs
    assert f"--cfgs '{searched[1].widths}'" in page.text and "Fine-tuning of pruned.pth" in page.text
    assert "teacher: " in page.text and f"trained, epoch {best['epoch']}: " in page.text
    assert "learning rate" in page.content and "has not ended" not in page.text


@pytest.mark.parametrize("kind", ["search", "training"])
def test_a_report_loads_nothing_and_runs_no_scripts(searched, trained, kind):
    page = read({"search": searched[0], "training": trained}[kind])
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "b<"}
    assert "http:" not in page.content and "https:" not in page.content and "@import" not in page.content
    resources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert resources and all(value.startswith(("#", "data:image/jpeg;base64,")) for value in resources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.content))
    assert not any(name.startswith("on") for name, _ in page.attributes)
    ids = [value for name, value in page.attributes if name == "id"]
    targets = [value[1:] for value in resources if value.startswith("#")]
    targets += re.findall(r"url\(#([^)]*)", page.content)
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids)
    assert HOSTILE in page.text and "<script>&'data'" in page.text  # shown as text
    assert "prefers-color-scheme: dark" in page.content and "currentColor" in page.content
    assert len(page.content.encode()) < 1_500_000


@pytest.mark.parametrize("kind", ["search", "training"])
def test_a_regenerated_report_is_the_same(searched, trained, tmp_path, kind):
    source = {"search": searched[0], "training": trained}[kind]
    before = (source / "report.html").read_bytes()
    try:
        (source / "report.html").unlink()
        assert report_main([str(source), "--device", "cpu"]) == source / "report.html"
        assert (source / "report.html").read_bytes() == before
    finally:
        (source / "report.html").write_bytes(before)


def test_an_older_searchs_folder_gives_the_same_figures(searched, tmp_path):
    folder, result = searched
    for name in ("search.jsonl", "pruned.pth"):
        shutil.copy(folder / name, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    del lines[-1]["images"], lines[-1]["image_size_hw"]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_main([str(tmp_path), "--device", "cpu"])
    page, today = read(tmp_path), read(folder)
    assert "not recorded" in page.text and "not recorded" not in today.text and QUOTED not in page.text
    todays = today.text.replace(f", by {evaluator_name()}", "")  # an older run did not record it
    assert todays != today.text and page.text[: page.text.index("Go on")] == todays[: todays.index("Go on")]
    assert f"--cfgs '{result.widths}'" in page.text


def test_the_accepted_trial_is_found_if_the_backbone_was_cut_before(searched, tmp_path):
    folder, _ = searched
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    lines[0]["full_widths"].append([[60, 64]])
    lines[-1]["widths"].append([[60, 64]])
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (taken,), (expected,) = read_search(tmp_path).chosen, read_search(folder).chosen
    assert taken.widths == expected.widths


def test_an_interrupted_search_is_reported_and_resumes_with_another_command(root, tmp_path):
    more = "--search visit --search_split train2017 --map_tol 0.5 --calibration_images 2"
    whole = run_search(root, tmp_path, more)
    journal = (tmp_path / "search.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "search.jsonl").write_text("".join(journal[:-3]))
    (tmp_path / "pruned.pth").unlink()
    report_main([str(tmp_path), "--device", "cpu"])
    page = read(tmp_path)
    assert "has not ended" in page.text and "looked at val2017" not in page.text and QUOTED in page.text
    done = [json.loads(line) for line in journal[1:-3] if json.loads(line)["accepted"]]
    assert done and f"{done[-1]['full_ap']:.4f}from" in page.text
    assert "decoder.1.ffn" not in re.search(r"Modules.*?Go on", page.text, re.DOTALL)[0]

    resumed = run_search(root, tmp_path, f"{more} --resume_search", ["prune_greedy_ad.py", "--resume_search"])
    assert resumed.widths == whole.widths
    assert (tmp_path / "search.jsonl").read_text().splitlines()[0] == journal[0].strip()
    page = read(tmp_path)
    assert QUOTED in page.text and "python prune_greedy_ad.py --resume_search" in page.text
    assert "has not ended" not in page.text and "Trials" not in page.headings


def test_a_search_without_a_passing_trial_is_reported_without_a_next_command(root, tmp_path):
    with (
        mock.patch.object(Schedule, "fast_threshold_ap", lambda *arguments: 1.1),
        pytest.raises(RunFailedError, match="no trial passed"),
    ):
        run_search(root, tmp_path)
    page = read(tmp_path)
    assert "No trial passed" in page.text and "Trials" in page.headings and "has not ended" not in page.text
    assert "Go on" not in page.headings and "Sample detections" not in page.headings and "--cfgs" not in page.text


def test_a_killed_training_run_has_a_report_of_its_epochs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    first = (trained / "log.txt").read_text().splitlines()[0]
    (tmp_path / "run" / "log.txt").write_text(f'{first}\n{{"epoch": 1, "tra')
    report_main([str(tmp_path / "run"), "--device", "cpu"])
    page = read(tmp_path / "run")
    assert "1 of 2" in page.text and "has not ended" in page.text
    (tmp_path / "run" / "log.txt").write_text(f"[]\n{first}\n")
    with pytest.raises(UserError, match="line 1 is no epoch"):
        report_main([str(tmp_path / "run")])


def test_a_student_stands_beside_its_teacher(root, trained, tmp_path):
    for name in ("log.txt", "checkpoint_best.pth"):
        shutil.copy(trained / name, tmp_path)
    args = json.loads((trained / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**args, "distill": str(root / "dense.pth")}))
    report_main([str(tmp_path), "--device", "cpu"])
    text = read(tmp_path).text
    assert "teacher: " in text and "trained, epoch" in text and "before fine-tuning: " not in text
    assert f"with {root}/dense.pth as its teacher" in text


def test_missing_files_are_named_and_the_rest_is_shown(searched, tmp_path):
    for name in ("search.jsonl", "args.json"):
        shutil.copy(searched[0] / name, tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**args, "coco_path": "gone"}))
    report_main([str(tmp_path), "--device", "cpu"])
    page = read(tmp_path)
    assert "Not drawn: --coco_path gone" in page.text and f"{searched[1].ap:.4f}" in page.text
    shutil.copy(searched[0] / "args.json", tmp_path)
    report_main([str(tmp_path), "--device", "cpu"])
    assert "pruned.pth no longer exists" in read(tmp_path).text


def test_a_wrong_value_that_a_page_does_not_use_is_no_error(trained, searched, tmp_path):
    wrong = {"trained": {"map_tol": 7, "num_workers": -1, "batch_size": 2},
             "searched": {"cache_gb": -1, "num_workers": -1, "lr": -5, "attention_unit": 0}}  # fmt: skip
    for name, folder in (("trained", trained), ("searched", searched[0])):
        shutil.copytree(folder, tmp_path / name)
        path = tmp_path / name / "args.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | wrong[name]))
        report_main([str(tmp_path / name)])
        path.write_text(json.dumps(values | {"hidden_dim": 0}))
        with pytest.raises(UserError, match=r"args\.json: found 0 under `args\.hidden_dim`"):
            report_main([str(tmp_path / name)])
    path.write_text(json.dumps(values | {"map_tol": 7}))
    with pytest.raises(UserError, match=r"args\.json: found 7 under `args\.map_tol`"):
        report_main([str(path.parent)])


def fail(*_):
    raise RuntimeError("no pen")


def test_a_failed_report_keeps_all_other_files(root, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "render", fail)
    result = run_search(root, tmp_path / "search", "--keep 0.7")
    main.main(*options("--coco_path", root, "--output_dir", tmp_path / "run", "--resume", result.path,
                       "--epochs 1 --batch_size 2 --augmentation flip --num_workers 0 --device cpu"))  # fmt: skip
    # A training run writes its report after each epoch, and with the comparison at the end.
    for name, output, reports in (("search", "pruned.pth", 1), ("run", "checkpoint.pth", 2)):
        folder = tmp_path / name
        assert (folder / output).exists() and not (folder / "report.html").exists()
        log = (folder / "run.log").read_text()
        assert log.count("report.html was not written (RuntimeError: no pen)") == reports
    assert json.loads((tmp_path / "search" / "search.jsonl").read_text().splitlines()[-1])["event"] == "end"


def test_drawing_is_deterministic(trained):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report.render(trained, "training", Samples(torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_detections_are_kept_until_the_checkpoint_changes(trained, root, tmp_path):
    shutil.copy(trained / "checkpoint_best.pth", tmp_path / "a.pth")
    args, _ = parse(get_pruning_parser(MGP, "a test"), ["--coco_path", str(root), "--image_size", "64"])
    configs = DetectorConfig.from_values(vars(args)), DataConfig.from_values(vars(args))
    samples = Samples(torch.device("cpu"))
    with mock.patch("reports.samples.build_detector", wraps=build_detector) as built:
        one = samples.section(*configs, [("one", tmp_path / "a.pth")])
        assert samples.section(*configs, [("one", tmp_path / "a.pth")]) == one and built.call_count == 1
        shutil.copy(root / "dense.pth", tmp_path / "a.pth")
        assert samples.section(*configs, [("one", tmp_path / "a.pth")]) != one and built.call_count == 2


def test_a_folder_without_a_run_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"found neither search\.jsonl nor log\.txt"):
        report_main([str(tmp_path)])
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(UserError, match="found no epoch"):
        report_main([str(tmp_path)])


def test_a_failure_is_one_line_of_the_log(tmp_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    get_logger().addHandler(handler)
    try:
        report.write_report(tmp_path, "search", Samples(torch.device("cpu")))
    finally:
        get_logger().removeHandler(handler)
    assert [record.levelname for record in records] == ["WARNING"]
    assert "\n" not in records[0].getMessage() and "python -m reports" in records[0].getMessage()
