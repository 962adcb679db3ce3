"""Both searches on a tiny detector and a data set of its own detections, from the options to the output file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import Subset

from datasets.coco import annotation_path, build_dataset, build_loader
from datasets.coco_eval import GroundTruth
from engine import evaluate
from pruning.gates import gates_applied
from pruning.kept_channels import from_lists
from pruning.schedule import GP, MGP, Schedule
from pruning.state_cache import PassCounter, StateCache
from pruning.workbench import DetectorBench
from runs import search_command
from runs.past_training import PastTraining
from runs.search_command import get_pruning_parser, search
from tests.pruning.tiny import NETWORK, VARIANTS, tiny_args, tiny_detector
from tests.tiny_run import built, run_script, settled
from tests.trust.forked import job, run_jobs
from util.cli import parse
from util.errors import UserError, run_cli
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint, save_checkpoint

IMAGES = 7
ROOT = Path(__file__).parents[2]
SMALL = f"{NETWORK} --image_size 64 --batch_size 2 --num_workers 0 --device cpu"
FEW = (
    "--search paper --subset_batches_attention 2 --subset_batches_ffn 1 --num_candidates_attention 8 "
    "--num_candidates_ffn 4 --attention_unit 2 --ffn_unit 8"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and images annotated with the detections of that very detector."""
    return write_folder(tmp_path_factory.mktemp("search"), VARIANTS["dense"])


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """The same for each variant: the folder, and the options of the network."""
    words = VARIANTS[request.param]
    return write_folder(tmp_path_factory.mktemp("variant"), words), words


def write_folder(root, network):
    """Fill `root` as `folder` says, for a tiny detector with the options `network`; returns it."""
    model, _, postprocessors = tiny_detector(network)
    args = tiny_args(f"{SMALL} {network} --coco_path {root}")
    save_checkpoint(
        root / "dense.pth",
        state_dict=model.state_dict(),
        widths=model.widths,
        full_widths=model.widths,
        arguments=vars(args),
        num_classes=7,
    )
    (root / "annotations").mkdir()
    for split, seed in (("val2017", 1), ("train2017", 2)):
        _write_split(root, split, seed, args, model.eval(), postprocessors["bbox"])
    return root


def _write_split(root, split, seed, args, model, postprocess):
    generator = np.random.default_rng(seed)
    (root / split).mkdir()
    images = []
    for number in range(IMAGES):
        height, width = (64, 64) if number % 3 else (64, 80)
        blocks = generator.integers(0, 255, (height // 16, width // 16, 3), np.uint8)
        name = f"{number:06d}.png"
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(root / split / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": number, "name": f"thing {number}"} for number in range(1, 7)]
    content = {"images": images, "annotations": [], "categories": categories}
    path = annotation_path(root, split)
    path.write_text(json.dumps(content))
    for image, target in build_dataset(split, args):
        with torch.no_grad():
            found = postprocess(model([image]), target["orig_size"][None])[0]
        seen = set()
        for label, (x0, y0, x1, y1) in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True):
            if label in range(1, 7) and label not in seen and len(seen) < 3:
                seen.add(label)
                box = [x0, y0, x1 - x0, y1 - y0]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": int(target["image_id"]),
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
    path.write_text(json.dumps(content))


def run(schedule, folder, out, more=""):
    parser = get_pruning_parser(schedule, "a test")
    words = f"{SMALL} {FEW} --coco_path {folder} --resume {folder}/dense.pth --output_dir {out} {more}".split()
    args, typed = parse(parser, words)
    return search(schedule, args, typed)


def ap_of(model, postprocess, args, split="val2017"):
    loader = build_loader(build_dataset(split, args), 2, shuffle=False)
    truth = GroundTruth(annotation_path(args.coco_path, split))
    result = evaluate(model, postprocess, loader, truth, device=torch.device("cpu"), progress=False)
    return result.stats["AP"]


@pytest.mark.parametrize(
    ("schedule", "more"),
    [(GP, ""), (MGP, "--search_split train2017 --map_tol 0.3 --skip_eval_converge 0.1")],
    ids=["gp", "mgp"],
)
def test_a_search_writes_what_it_has_measured(variant, tmp_path, schedule, more):
    folder, network = variant
    result = run(schedule, folder, tmp_path / "out", f"{network} {more}")
    split = "train2017" if "train2017" in more else "val2017"
    assert result.base_ap > 0.2

    checkpoint = read_checkpoint(result.path)
    assert checkpoint.kind == "search"
    assert checkpoint.widths == result.widths != tiny_detector()[0].widths
    args = tiny_args(f"{SMALL} {network} --coco_path {folder} --resume {result.path} --eval")
    options, checkpoint, _ = settled(args)
    slim, _, postprocessors = built(options, checkpoint)
    assert slim.widths == result.widths
    assert ap_of(slim, postprocessors["bbox"], options.data, split) == pytest.approx(result.ap, abs=1e-3)

    whole = tiny_detector(network)[0]
    with gates_applied(whole, result.kept):
        assert ap_of(whole, postprocessors["bbox"], args, split) == pytest.approx(result.ap, abs=1e-3)

    lines = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", *["decision"] * (len(lines) - 2), "end"]
    accepted = [line for line in lines if line.get("accepted")]
    assert [line["module"] for line in accepted] == list(schedule.order(whole.prunable_modules()))
    for line in accepted:
        used = Schedule(**lines[0]["schedule"])
        is_whole = line["width"] == line["full_width"]
        assert is_whole or line["full_ap"] >= used.full_threshold_ap(result.base_ap, line["visit"])
        for part, indices in from_lists(line["kept"]).items():
            assert torch.equal(indices, result.kept[line["module"]][part])
    assert lines[0]["base_ap"] == result.base_ap
    assert accepted[-1]["transformer_params"] == sum(p.numel() for p in slim.transformer.parameters())
    for name in ("widths.png", "ap_params.png", "run.log"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert len(checkpoint.trace) == len(lines) - 2
    assert f"--cfgs '{result.widths}'" in (tmp_path / "out" / "run.log").read_text()


def test_nothing_runs_twice(folder, tmp_path, monkeypatch):
    """The backbone sees each image once; each step before the searched module sees each image once per visit."""
    seen, built = {"backbone": 0}, []

    def count(module, inputs, output):
        if not isinstance(output[0], FakeTensor):  # shapes alone are asked for too
            seen["backbone"] += len(inputs[0])

    def watched(*given):
        model, criterion, postprocessors = build_detector(*given)
        model.backbone[0].register_forward_hook(count)
        built.append(model)
        return model, criterion, postprocessors

    moves, passes = [], {}
    move_to, add = StateCache.move_to, PassCounter.add

    def watched_move(self, name):
        moves.append((self.position, name))
        move_to(self, name)

    def watched_add(self, start, stop, images):
        passes.setdefault((len(moves), start, stop), []).append(images)
        return add(self, start, stop, images)

    monkeypatch.setattr(search_command, "build_detector", watched)
    monkeypatch.setattr(StateCache, "move_to", watched_move)
    monkeypatch.setattr(PassCounter, "add", watched_add)
    run(MGP, folder, tmp_path)
    assert seen["backbone"] == IMAGES
    order = built[0].step_names
    assert [name for _, name in moves] == list(MGP.order(order))
    passed = [order[0]]
    for number, (came_from, name) in enumerate(moves, start=1):
        passed = [order[0]] if order.index(name) < order.index(came_from) else [*passed, came_from]
        to_the_module = {key[1:]: sum(images) for key, images in passes.items() if key[0] == number and key[2]}
        assert sum(to_the_module.values()) <= IMAGES
        assert all(start in passed and stop == name for start, stop in to_the_module)
    assert sum(len(images) for key, images in passes.items() if key[2]) > len(moves) / 2


def test_the_output_of_a_search_can_be_searched_again(tmp_path):
    folder, network = tmp_path / "data", "--backbone resnet18"  # whose detector can be searched twice
    folder.mkdir()
    write_folder(folder, network)
    first = run(MGP, folder, tmp_path / "one", f"{network} --map_tol 0.5 --skip_eval_converge 0.2")
    second = run(MGP, folder, tmp_path / "two", f"{network} --map_tol 0.5 --resume {first.path}")
    files = (folder / "dense.pth", first.path, second.path)
    past = [PastTraining.of(read_checkpoint(path).arguments) for path in files]
    assert past[0] is not None and past == past[:1] * 3
    assert second.base_ap == pytest.approx(first.ap, abs=1e-3)
    assert all(second.widths.of(name) <= first.widths.of(name) for name in first.widths.names())
    args = tiny_args(f"{SMALL} --coco_path {folder} --resume {second.path} --eval")
    options, checkpoint, _ = settled(args)
    slim, _, postprocessors = built(options, checkpoint)
    assert slim.widths == second.widths
    assert ap_of(slim, postprocessors["bbox"], options.data) == pytest.approx(second.ap, abs=1e-3)


def test_the_same_seed_finds_the_same_channels_however_many_share_a_forward(folder, tmp_path):
    one = run(MGP, folder, tmp_path / "one", "--images_at_once 1")
    many = run(MGP, folder, tmp_path / "many", "--images_at_once 100 --cache_device cpu")
    assert one.widths == many.widths
    for name, kept in one.kept.items():
        assert all(torch.equal(indices, many.kept[name][part]) for part, indices in kept.items())


def test_a_search_may_look_at_the_first_images_alone(folder, tmp_path):
    result = run(MGP, folder, tmp_path, "--search_images 3 --attention_unit 4 --ffn_unit 16 --map_tol 0.5")
    args = tiny_args(f"{SMALL} --coco_path {folder}")
    model, _, postprocessors = tiny_detector()
    loader = build_loader(Subset(build_dataset("val2017", args), range(3)), 2, shuffle=False)
    truth = GroundTruth(annotation_path(folder, "val2017"))
    found = evaluate(model, postprocessors["bbox"], loader, truth, device=torch.device("cpu"), progress=False)
    assert len(found.image_ids) == 3
    assert result.base_ap == pytest.approx(found.stats["AP"], abs=1e-9)


def test_a_search_may_look_at_all_images(folder, tmp_path):
    run(MGP, folder, tmp_path, "--search_images all --attention_unit 4 --ffn_unit 16 --map_tol 0.5")
    assert json.loads((tmp_path / "search.jsonl").read_text().splitlines()[-1])["images"] == IMAGES


def test_what_an_older_search_left_is_moved_aside(folder, tmp_path):
    for name in ("search.jsonl", "pruned.pth", "widths.png", "ap_params.png"):
        (tmp_path / name).write_text("older\n")
    run(GP, folder, tmp_path, "--attention_unit 4 --ffn_unit 16 --map_tol 0.5")
    for name in ("search.1.jsonl", "pruned.1.pth", "widths.1.png", "ap_params.1.png"):
        assert (tmp_path / name).read_text() == "older\n"


def test_a_fraction_that_cannot_be_kept_is_refused_before_older_results_are_touched(folder, tmp_path):
    (tmp_path / "pruned.pth").write_text("older")
    words = f"{SMALL} --coco_path {folder} --resume {folder}/dense.pth --output_dir {tmp_path} --keep 0.01"
    with pytest.raises(UserError, match=r"--keep 0\.01: found less than the smallest widths cost"):
        search(MGP, *parse(get_pruning_parser(MGP, "a test"), words.split()))
    assert (tmp_path / "pruned.pth").read_text() == "older"
    assert not (tmp_path / "search.jsonl").exists() and not (tmp_path / "run.log").exists()


def test_a_killed_search_leaves_what_it_had_found(folder, tmp_path, monkeypatch):
    shown, begin = [], DetectorBench.begin

    def killed_at_the_third(self, name):
        if len(shown) == 2:
            raise KeyboardInterrupt
        shown.append(name)
        begin(self, name)

    monkeypatch.setattr(DetectorBench, "begin", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(MGP, folder, tmp_path, "--map_tol 0.5 --skip_eval_converge 0.2 --attention_unit 4")
    checkpoint = read_checkpoint(tmp_path / "pruned.pth")
    order = MGP.order(tiny_detector()[0].step_names)
    assert checkpoint.trace[-1] == {"unfinished": True, "modules_left": list(order[2:])}
    accepted = {entry["module"]: entry for entry in checkpoint.trace[:-1] if entry["accepted"]}
    assert list(accepted) == shown == list(order[:2])
    assert any(entry["width"] < entry["full_width"] for entry in accepted.values())
    for name in order:
        assert checkpoint.widths.of(name) == (accepted[name]["width"] if name in accepted else 32)
    args = tiny_args(f"{SMALL} --coco_path {folder} --resume {checkpoint.path} --eval")
    options, checkpoint, _ = settled(args)
    slim, _, postprocessors = built(options, checkpoint)
    assert ap_of(slim, postprocessors["bbox"], options.data) == pytest.approx(accepted[order[1]]["full_ap"], abs=1e-3)


@pytest.mark.parametrize("word", ["--map_tol 1", "--map_tol -0.1", "--skip_eval_converge 1.5", "--ffn_unit 0"])
def test_options_out_of_range_end_with_code_2(folder, tmp_path, word, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: run(GP, folder, tmp_path / "out", word))
    assert end.value.code == 2
    assert word.split()[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--eval", "--lr 0.1", "--start_fresh", "--dropout 0.1", "--scalar 2"])
def test_options_that_a_search_does_not_read_are_refused(folder, tmp_path, word):
    with pytest.raises(UserError, match=f"unrecognized arguments: {word}; see --help"):
        run(GP, folder, tmp_path / "out", word)
    assert not (tmp_path / "out").exists()


def test_help_shows_what_a_search_reads():
    text = get_pruning_parser(GP, "a test").format_help()
    assert all(option in text for option in ("--use_dn", "--coco_path", "--cls_loss_coef", "--map_tol", "--nheads"))
    assert not any(option in text for option in ("--epochs", "--save_results", "--scalar", "--lr"))


def test_the_papers_command_line_is_taken(folder, tmp_path):
    words = f"-m dn_dab_detr --output_dir {tmp_path}/out --coco_path {folder} --resume {folder}/none.pth "
    words += "--batch_size 8 --use_dn --map_tol 0.02 --skip_eval_converge 0.0"
    with pytest.raises(UserError, match=r"none\.pth"):
        search(GP, *parse(get_pruning_parser(GP, "a test"), words.split()))


@pytest.mark.parametrize(("base_ap", "message"), [(0.0, "found mAP 0 on val2017"), (-1.0, "found no boxes")])
def test_a_search_needs_an_map_to_hold_on_to(folder, tmp_path, monkeypatch, base_ap, message):
    monkeypatch.setattr(DetectorBench, "full_ap", lambda self, name=None: base_ap)
    with pytest.raises(UserError, match=message):
        run(GP, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_given_a_budget_a_search_needs_no_map(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DetectorBench, "full_ap", lambda self, name=None: 0.0)
    words = f"--batch_size 2 --coco_path {folder} --resume {folder}/dense.pth --output_dir {tmp_path}/out --keep 0.8"
    result = search(GP, *parse(get_pruning_parser(GP, "a test"), words.split()))
    assert result.ap == 0 and read_checkpoint(result.path).widths == result.widths
    assert "mAP is 0 before the search" in (tmp_path / "out" / "run.log").read_text()


def test_a_search_needs_a_checkpoint(folder, tmp_path):
    args, typed = parse(get_pruning_parser(GP, "a test"), ["--coco_path", str(folder), "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--resume"):
        search(GP, args, typed)
    assert not list(tmp_path.iterdir())


def test_two_processes_decide_as_one(folder, tmp_path):
    more = "--map_tol 0.3 --skip_eval_converge 0.1 --attention_unit 4 --ffn_unit 16"
    words = f"{SMALL} {FEW} --coco_path {folder} --resume {folder}/dense.pth {more} --output_dir {tmp_path}/two"
    alone = run(MGP, folder, tmp_path / "one", more)
    run_jobs(tmp_path / "jobs.json", [job(2, "mgp", words)])
    together = read_checkpoint(tmp_path / "two" / "pruned.pth")
    assert together.widths == alone.widths
    for name, kept in alone.kept.items():
        assert all(torch.equal(indices, together.kept[name][part]) for part, indices in kept.items())
    assert together.trace[-1]["full_ap"] == pytest.approx(alone.ap, abs=1e-9)


def test_a_missing_checkpoint_is_a_one_line_error_with_code_2(folder, tmp_path):
    words = f"{SMALL} --coco_path {folder} --resume {folder}/none.pth --output_dir {tmp_path}/out"
    code, error = run_script("prune_greedy.py", words)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert "none.pth" in error
    assert not (tmp_path / "out").exists()
