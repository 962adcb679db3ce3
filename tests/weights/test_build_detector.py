"""Building detectors from options and files: other data sets, other classes, and weights drawn again."""

import argparse
import dataclasses
import json
import math
import shutil

import pytest
import torch

import main
from datasets.config import DataConfig
from models import build, build_model
from pruning.kept_channels import all_kept
from pruning.schedule import MGP
from reports.search_log import next_command
from runs.resolve_options import build_distillation
from runs.search_command import get_pruning_parser, search
from tests.pruning.tiny import VARIANTS, tiny_args, tiny_detector
from tests.tiny_run import built, options, settled, tiny_options, write_self_annotated
from util.checkpoint import rename_encoder_attention
from util.cli import parse
from util.errors import UserError
from util.files import file_digest
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.class_heads import find_new_parts
from weights.strip_optimizer import strip_optimizer

NAMES = {1: "kind 3", 2: "other", 6: "kind 1"}  # the data set's are 1: "kind 1" and 3: "kind 3"
QUICK = "--keep 0.7 --reconstruct none --ranking magnitude --attention_unit 2 --ffn_unit 8 --calibration_images 2"


def save(path, variant="dense", categories=NAMES, widths=None, **more):
    """Our checkpoint of a tiny detector for 7 classes."""
    model = tiny_detector(VARIANTS[variant], seed=1)[0]
    save_checkpoint(path, state_dict=model.state_dict(), widths=widths or model.widths, full_widths=model.widths,
                    arguments=vars(tiny_args(VARIANTS[variant])), num_classes=7, categories=categories,
                    **more)  # fmt: skip
    return model


def save_of_kind(path, kind):
    """A checkpoint of one of the formats, of a tiny detector for 7 classes."""
    model = tiny_detector(seed=1)[0]
    weights = rename_encoder_attention(model.state_dict(), slim=True)
    message = {"args": tiny_args()}
    if kind in ("search", "search of nameless"):
        kept = {name: all_kept(module) for name, module in model.prunable_modules().items()}
        kept["encoder.0.ffn"] = {"hidden": torch.arange(3, 23)}
        categories = NAMES if kind == "search" else None
        save(path, kept=kept, widths=model.widths.replace("encoder.0.ffn", 20), categories=categories)
    elif kind == "slimmed copy":
        save(path.with_name("whole.pth"), training={"optimizer": {}})
        strip_optimizer(path.with_name("whole.pth"), path, half=True)
    elif kind == "release":
        torch.save({"model": model.state_dict(), **message}, path)
    elif kind == "paper_slim":
        torch.save({"model": weights, **message}, path)
    elif kind == "paper_search":
        mask = torch.zeros(1, 1, 32)
        mask[..., :12] = 1
        torch.save({"model": {**weights, "transformer.encoder.layers.0.select2.prune_a": mask}, **message}, path)
    else:
        save(path, training={"optimizer": {}, "epoch": 1} if kind == "unfinished" else None)


def finetune(*words, seed=3):
    """Detector, options and new parts, as main.py builds them for training."""
    args, typed = options("--device cpu --num_workers 0 --no-pretrained_backbone", *words)
    settings, checkpoint, continuing = settled(args, typed)
    ignore, evaluating = settings.run.finetune_ignore or (), settings.run.eval
    parts = find_new_parts(ignore, settings.detector, checkpoint, evaluating=evaluating, continuing=continuing)
    torch.manual_seed(seed)
    return built(settings, checkpoint, parts)[0], settings.detector, parts


def heads_of(state_dict) -> dict[str, torch.Tensor]:
    """Class heads and label encoding."""
    return {key: value for key, value in state_dict.items() if key.startswith(("class_embed.", "label_enc."))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_class_heads_keep_rows_of_categories_with_the_same_name(variant, coco, tmp_path):
    before = save(tmp_path / "a.pth", variant).state_dict()
    model, config, parts = finetune("--coco_path", coco, "--resume", tmp_path / "a.pth")
    torch.manual_seed(3)
    initial = build(config)[0].state_dict()
    found = model.state_dict()
    assert config.num_classes == 4 and heads_of(found).keys() == heads_of(before).keys()
    assert len(heads_of(found)) == (3 if variant == "dense" else 5)
    for key, value in heads_of(found).items():
        assert torch.equal(value[[1, 3]], before[key][[6, 1]])
        assert torch.equal(value[[0, 2]], initial[key][[0, 2]])
        if key.endswith("bias"):
            assert value[[0, 2]].tolist() == pytest.approx([-math.log(99)] * 2)
    # Its last row is the initial content of matching queries, not a class.
    assert torch.equal(found["label_enc.weight"][4], before["label_enc.weight"][7])
    rest = found.keys() - heads_of(found).keys()
    assert rest and all(torch.equal(found[key], before[key]) for key in rest)
    assert parts.summary == (
        f"{tmp_path}/a.pth: new class heads for 4 classes in place of those for 7, "
        "2 of 2 categories carried over by name (kind 1, kind 3)"
    )


@pytest.mark.parametrize("kind", ["ours", "slimmed copy", "search", "search of nameless", "release", "paper_slim",
                                  "paper_search"])  # fmt: skip
def test_a_checkpoint_of_every_format_can_be_trained_on_other_classes(kind, coco, tmp_path):
    path = tmp_path / "a.pth"
    save_of_kind(path, kind)
    model, config, parts = finetune("--coco_path", coco, "--resume", path)
    expected = build_detector(dataclasses.replace(config, num_classes=7), read_checkpoint(path))[0].state_dict()
    found = model.state_dict()
    assert model.widths.of("encoder.0.ffn") == {"search": 20, "paper_search": 12}.get(kind.split()[0], 32)
    assert found.keys() == expected.keys()
    for key in found.keys() - heads_of(found).keys():
        assert torch.equal(found[key], expected[key]), key
    named = kind in ("ours", "slimmed copy", "search")
    assert parts.matches == ({1: 6, 3: 1} if named else {})
    assert torch.equal(found["label_enc.weight"][4], expected["label_enc.weight"][7])
    assert torch.equal(found["class_embed.weight"][1], expected["class_embed.weight"][6]) == named
    assert ("has no category names" in parts.summary) != named
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64))["pred_logits"].shape == (1, 5, 4)


@pytest.mark.parametrize(
    ("categories", "message", "matches"),
    [
        ({1: "kind 1", 3: "kind 3"}, None, None),
        ({1: "kind 1", 2: "more", 3: "kind 3"}, None, None),
        (None, None, None),
        ({1: "kind 1", 3: "cat"}, "found 'cat' as category 3 of the checkpoint, expected 'kind 3'", {1: 1}),
        ({1: "kind 3", 3: "kind 1"}, "found 'kind 3' as category 1 of the checkpoint, expected 'kind 1'", {1: 3, 3: 1}),
        ({3: "kind 3"}, "found no such category as category 1 of the checkpoint, expected 'kind 1'", {3: 3}),
        ({0: "kind 1", 1: "kind 1", 3: "kind 3"}, None, None),
        ({0: "kind 1", 2: "kind 1", 3: "kind 3"}, "found no such category as category 1", {3: 3}),
    ],
)
def test_names_distinguish_classes_of_equal_number(categories, message, matches, coco, tmp_path):
    model = build_model(argparse.Namespace(**{**vars(tiny_args()), "num_classes": 4}))[0]
    save_checkpoint(tmp_path / "a.pth", state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=vars(tiny_args()), num_classes=4, categories=categories)  # fmt: skip
    words = ("--coco_path", coco, "--resume", tmp_path / "a.pth")
    _, _, parts = finetune(*words)
    assert (None if parts is None else parts.matches) == matches
    if message is None:
        finetune(*words, "--eval")
    else:
        with pytest.raises(UserError, match=message):
            finetune(*words, "--eval")
    teaching, typed = options(*words, "--no-pretrained_backbone")
    teaching = settled(teaching, typed)[0].with_values({"distill": str(tmp_path / "a.pth")})
    if message is None:
        assert build_distillation(teaching, model) is not None
    else:
        with pytest.raises(UserError, match=rf"^--distill .*{message}"):
            build_distillation(teaching, build(teaching.detector)[0])


def test_a_teacher_pads_as_its_student_does(coco, tmp_path):
    model = build_model(argparse.Namespace(**{**vars(tiny_args()), "num_classes": 4}))[0]
    save_checkpoint(tmp_path / "a.pth", state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=vars(tiny_args("--padding_rule reference")), num_classes=4)  # fmt: skip
    words = ("--coco_path", coco, "--resume", tmp_path / "a.pth", "--distill", tmp_path / "a.pth")
    for typed_words, expected in (("", "reference"), ("--padding_rule exact", "exact")):
        args, typed = options(*words, "--no-pretrained_backbone", typed_words)
        settings, _, _ = settled(args, typed)
        student, _, _ = build(settings.detector)
        student.load_state_dict(model.state_dict())
        assert student.padding_rule == build_distillation(settings, student).teacher.padding_rule == expected


def test_other_classes_are_an_error_unless_training(coco, tmp_path):
    wide = tmp_path / "coco"
    shutil.copytree(coco, wide)
    for path in (wide / "annotations").iterdir():
        path.write_text(path.read_text().replace('"categories": [', '"categories": [{"id": 9, "name": "ninth"}, '))
    save_of_kind(tmp_path / "a.pth", "ours")
    save_of_kind(tmp_path / "unfinished.pth", "unfinished")
    message = "found a checkpoint for 7 classes, expected 10, the largest category id . 1 in the annotations; "
    evaluation = ("--coco_path", wide, "--output_dir", tmp_path / "out", "--resume", tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth: {message}fine-tune it on them \(main\.py without --eval\)"):
        main.main(*options(*evaluation, "--eval --device cpu"))
    parser = get_pruning_parser(MGP, "a test")
    for split in ("val2017", "train2017"):
        with pytest.raises(UserError, match=f"{message}fine-tune it"):
            search(MGP, *parse(parser, [*map(str, evaluation), "--device", "cpu", "--search_split", split]))
    with pytest.raises(UserError, match=rf"unfinished\.pth: {message}--start_fresh trains its weights with new class"):
        main.main(*options(*evaluation[:4], "--device cpu --resume", tmp_path / "unfinished.pth"))
    assert not (tmp_path / "out").exists()
    assert finetune(*evaluation[:4], "--start_fresh --resume", tmp_path / "unfinished.pth")[2].matches == {1: 6, 3: 1}


@pytest.mark.parametrize("kind", ["ours", "search"])
def test_finetune_ignore_draws_weights_again_even_where_names_match(kind, coco, tmp_path):
    save_of_kind(tmp_path / "a.pth", kind)
    words = ("--coco_path", coco, "--resume", tmp_path / "a.pth")
    usual, config, _ = finetune(*words)
    keys = (
        "class_embed.weight",
        "transformer.decoder.bbox_embed",
        "encoder.layers.0.self_attn.in_proj",
        "linear1.bias",
    )
    model, _, parts = finetune(*words, f"--finetune_ignore {' '.join(keys)}")
    torch.manual_seed(3)
    if kind == "search":  # the whole detector that is cut draws its initial values first
        build_model(tiny_args())
    initial = build(config)[0].state_dict()
    redrawn = {key for key in initial if "bbox_embed" in key or key.endswith(("class_embed.weight", "linear1.bias"))}
    redrawn |= {key for key in initial if "encoder.layers.0" in key and "in_proj" in key}
    assert len(redrawn) == 18 and redrawn <= initial.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, (initial if key in redrawn else usual.state_dict())[key]), key
    assert parts.summary.endswith(f"; 12 weights left out by --finetune_ignore {' '.join(keys)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--finetune_ignore class_embed", "found no --resume"),
        ("--resume {tmp}/a.pth --eval --finetune_ignore class_embed", "found --eval"),
        ("--resume {tmp}/unfinished.pth --finetune_ignore class_embed", "found a training run to continue"),
        (
            "--resume {tmp}/a.pth --finetune_ignore class_embed neck",
            "neck: found no weight of that name in .*a.pth",
        ),
    ],
)
def test_invalid_finetune_ignore_is_an_error(words, message, tmp_path):
    root = write_self_annotated(tmp_path / "coco")
    save(tmp_path / "a.pth", categories=None)
    save(tmp_path / "unfinished.pth", categories=None, training={"optimizer": {}, "epoch": 1})
    with pytest.raises(UserError, match=f"--finetune_ignore.*{message}"):
        finetune("--coco_path", root, words.format(tmp=tmp_path))


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    """A folder with a data set that a detector knows, in the COCO layout and file by file, and the options for that."""
    root = tmp_path_factory.mktemp("scattered")
    write_self_annotated(root / "coco")
    words = []
    for prefix in ("train", "val"):
        shutil.copy(root / "coco" / "annotations" / f"instances_{prefix}2017.json", root / f"{prefix}.json")
        shutil.copytree(root / "coco" / f"{prefix}2017", root / f"{prefix} images")
        words += [f"--{prefix}_json", root / f"{prefix}.json", f"--{prefix}_images", root / f"{prefix} images"]
    return root, words


def test_single_file_options_give_the_same_run_as_the_layout(scattered, tmp_path):
    root, named = scattered
    common = "--epochs 1 --no-pretrained_backbone --num_workers 0 --device cpu --image_size 64 --augmentation flip"
    lines = []
    for out, words in (("layout", ["--coco_path", root / "coco"]), ("named", ["--coco_path", root / "none", *named])):
        main.main(*options(common, *words, "--output_dir", tmp_path / out, "--resume", root / "coco" / "dense.pth"))
        line = json.loads((tmp_path / out / "log.txt").read_text())
        lines.append({name: value for name, value in line.items() if "seconds" not in name})
    assert lines[0] == lines[1] and lines[0]["test_AP"] > 0
    written = read_checkpoint(tmp_path / "named" / "checkpoint.pth")
    assert written.categories == {number: f"kind {number}" for number in range(1, 7)}
    # The paths belong to the run that they were typed for.
    args, typed = options("--epochs 2 --coco_path", root / "coco", "--resume", written.path)
    data = settled(args, typed)[0].data
    assert (data.train_json, data.val_images, data.image_size) == (None, None, 64)

    # Each option replaces one part of the layout; an evaluation needs no training files.
    main.main(*options("--eval --num_workers 0 --device cpu --coco_path none", *named[4:], "--resume", written.path,
                       "--output_dir", tmp_path / "eval"))  # fmt: skip
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["AP"] == pytest.approx(lines[0]["test_AP"], abs=1e-9)
    measured = [category for category in found["categories"] if category["boxes"]]
    assert [category["name"] for category in found["categories"]] == [f"kind {number}" for number in range(1, 7)]
    assert sum(c["AP"] for c in measured) / len(measured) == pytest.approx(found["AP"])
    assert all((c["AP"], c["AP50"]) == (-1, -1) for c in found["categories"] if not c["boxes"])
    boxes = json.loads((root / "val.json").read_text())["annotations"]
    assert sum(category["boxes"] for category in measured) == len(boxes) > 0
    log = (tmp_path / "eval" / "run.log").read_text()
    assert all(f"\n{category['name']}" in log for category in measured)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--val_json {tmp}/none.json --val_images {images}", r"^--val_json .*none\.json: no such file"),
        ("--val_json= --coco_path {coco}", "^--val_json : no such file"),
        (
            "--val_json {json} --val_images {json}",
            r"^--val_images .*val\.json is not a readable folder .*Not a directory",
        ),
        ("--val_images= --coco_path {coco}", r"^--val_images  is not a readable folder .*an empty name"),
        ("--val_json {json} --val_images {tmp}", r"^--val_images .* is an empty folder; expected one with images"),
        ("--val_json {json} --coco_path {tmp}/none", "^--coco_path .*none is not a readable folder"),
        ("--val_images {images} --coco_path {tmp}/none", "^--coco_path .*none is not a readable folder"),
    ],
)
def test_a_missing_file_is_an_error_that_names_its_option(words, message, scattered, tmp_path):
    root, _ = scattered
    places = {"tmp": tmp_path, "json": root / "val.json", "images": root / "val2017", "coco": root / "coco"}
    (root / "val2017").mkdir(exist_ok=True)
    (root / "val2017" / "a.txt").touch()
    args, typed = tiny_options("--eval", words.format(**places))
    with pytest.raises(UserError, match=message):
        settled(args, typed)


def test_splits_with_different_category_names_are_an_error(scattered):
    root, _ = scattered
    (root / "renamed.json").write_text((root / "train.json").read_text().replace("kind 2", "kind two"))
    args, typed = tiny_options("--coco_path", root / "coco", "--train_json", root / "renamed.json")
    with pytest.raises(
        UserError, match=r"renamed\.json: found the name 'kind two' for category 2, expected 'kind 2' as in"
    ):
        settled(args, typed)


def test_search_on_single_files_then_training_on_other_classes(scattered, coco, tmp_path):
    root, named = scattered
    words = f"{QUICK} --device cpu --num_workers 0 --image_size 64 --batch_size 4".split()
    words += ["--coco_path", "none", *map(str, named), "--resume", str(root / "coco" / "dense.pth")]
    args, typed = parse(get_pruning_parser(MGP, "a test"), [*words, "--output_dir", str(tmp_path)])
    result = search(MGP, args, typed)
    start = json.loads((tmp_path / "search.jsonl").read_text().splitlines()[0])
    assert start["annotations"] == file_digest(root / "train.json")
    assert not {"train_json", "val_images"} & start["args"].keys()
    typed_next = next_command(args.modelname, DataConfig.from_values(vars(args)), args.use_dn, result.path)
    assert all(
        f"--{name} {root}/" in typed_next.replace("'", "") for name in ("train_json", "val_json", "train_images")
    )
    pruned = read_checkpoint(result.path)
    assert pruned.is_search and pruned.categories == {number: f"kind {number}" for number in range(1, 7)}

    out = tmp_path / "tuned"
    main.main(*options("--epochs 1 --lr 0 --lr_backbone 0 --num_workers 0 --device cpu --augmentation flip --coco_path",
                       coco, "--resume", result.path, "--output_dir", out))  # fmt: skip
    tuned = read_checkpoint(out / "checkpoint.pth")
    assert tuned.categories == {1: "kind 1", 3: "kind 3"} and tuned.num_classes == 4 and tuned.widths == result.widths
    # The weights that training began with: those of the categories of the same names are among them.
    before = pruned.state_dict["class_embed.weight"][[1, 3]]
    assert torch.allclose(tuned.state_dict["class_embed.weight"][[1, 3]], before, atol=1e-3)
    assert "new class heads for 4 classes in place of those for 7, 2 of 2 categories" in (out / "run.log").read_text()
