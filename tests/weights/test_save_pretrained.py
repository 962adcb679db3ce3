"""Folders to share: every tensor and option is read back, cards have the right figures, bad folders give one line."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

import export
import inference
import main
from models.widths import Widths
from pruning.kept_channels import all_kept
from pruning.schedule import MGP
from pruning.transplant import widths_after
from runs.search_command import get_pruning_parser, search
from tests.pruning.tiny import pictures, randomise_norms, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from tests.test_imports import MODULES
from tests.tiny_run import run_script
from tools.prediction import load_detector
from util.checkpoint import rename_encoder_attention
from util.cli import parse
from util.errors import UserError, run_cli
from util.files import write_json
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint, slim_state_dict
from weights.safetensors_file import METADATA_KEY
from weights.save_pretrained import ShareOptions
from weights.save_pretrained import main as save_pretrained

safetensors = pytest.importorskip("safetensors.torch")

DEFORMABLE = "-m dn_dab_deformable_detr --return_layer layer3 --num_feature_levels 3 --enc_n_points 2"
# Options of a tiny detector, and its widths.
NETWORKS = {
    "dense": ("", None),
    "slim": ("", [[[16, 20]], [[8, 32, 16], [32, 4, 32]]]),
    "removed branches": ("", [[[0, 0]], [[0, 32, 0], [32, 0, 32]]]),
    "cut backbone": ("", [[[32, 32]], [[32, 32, 32], [32, 32, 32]], [[8], [0], [16], [64]]]),
    "trained batch norms": ("--batch_norm_type BatchNorm2d", [[[16, 20]], [[8, 32, 16], [32, 4, 32]]]),
    "few queries and layers": ("--num_queries 3 --dec_layers 1 --num_patterns 2", [[[16, 20]], [[8, 32, 16]]]),
    "deformable": (DEFORMABLE, None),
    "slim deformable": (DEFORMABLE, [[[16, 20]], [[8, 32, 16], [0, 4, 32]]]),
    "other settings": ("--nheads 2 --pe_temperatureH 7 --anchor_eps 1e-5 --num_select 4 --image_size 96 "
                       "--transformer_activation relu", None),
}  # fmt: skip
CATEGORIES = {1: "a <b>|c", 3: "b"}


def write_checkpoint(path: Path, network: str = "", cfgs: list | None = None, **more) -> torch.nn.Module:
    """A tiny detector's checkpoint; returns the detector."""
    widths = None if cfgs is None else Widths.parse(cfgs)
    model = tiny_detector(network, widths, seed=1)[0].eval()
    randomise_norms(model)
    found = {"state_dict": model.state_dict(), "widths": model.widths, "full_widths": model.widths,
             "arguments": vars(tiny_args(network, widths)), "num_classes": 7, "categories": CATEGORIES}  # fmt: skip
    save_checkpoint(path, **{**found, **more})
    return model


def share(checkpoint: Path, folder: Path, *words: str) -> str:
    """Write the folder; return its card."""
    save_pretrained([str(checkpoint), str(folder), *words])
    return (folder / "README.md").read_text()


def read(path: Path):
    """The detector of a checkpoint or a folder, with its options."""
    checkpoint = read_checkpoint(path)
    options = options_for(ShareOptions(), checkpoint)
    return build_detector(options.detector, checkpoint)[0].eval(), options, checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    """A shared detector."""
    write_checkpoint(tmp_path / "a.pth", *NETWORKS["slim"])
    share(tmp_path / "a.pth", tmp_path / "shared")
    return tmp_path / "shared"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_and_option_is_read_back(tmp_path, name):
    model = write_checkpoint(tmp_path / "a.pth", *NETWORKS[name])
    share(tmp_path / "a.pth", tmp_path / "shared")
    (_, expected, _), (found, options, checkpoint) = read(tmp_path / "a.pth"), read(tmp_path / "shared")
    assert options == expected and checkpoint.kind == "ours" and checkpoint.widths == model.widths
    assert checkpoint.categories == CATEGORIES and checkpoint.num_classes == 7
    assert found.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value) and found.state_dict()[key].dtype == value.dtype
    with torch.no_grad():
        assert torch.equal(found(pictures()[0])["pred_boxes"], model(pictures()[0])["pred_boxes"])
    assert sorted(file.name for file in (tmp_path / "shared").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip


def test_a_searchs_output_is_cut_and_typed_layers_are_dropped(tmp_path):
    whole = tiny_detector(seed=1)[0]
    kept = {name: all_kept(module) for name, module in whole.prunable_modules().items()}
    kept["encoder.0.ffn"] = {"hidden": torch.arange(3, 20)}
    write_checkpoint(tmp_path / "a.pth", kept=kept, widths=widths_after(whole.widths, kept))
    share(tmp_path / "a.pth", tmp_path / "shared")
    found = read_checkpoint(tmp_path / "shared")
    expected = rename_encoder_attention(slim_state_dict(read_checkpoint(tmp_path / "a.pth"), whole), slim=True)
    assert found.widths.of("encoder.0.ffn") == 17 and found.kept is None
    assert all(torch.equal(expected[key], value) for key, value in found.state_dict.items())
    share(tmp_path / "a.pth", tmp_path / "shallow", "--dec_layers", "1")
    assert len(read(tmp_path / "shallow")[0].widths.decoder) == 1


@pytest.mark.parametrize("script", rest_in_soak(["main", "search", "inference", "export"], ["main", "inference"]))
def test_every_script_takes_a_folder_from_another_machine(coco, tmp_path, script):
    write_checkpoint(tmp_path / "a.pth", "--return_layer layer3 --image_size 64", NETWORKS["slim"][1])
    share(tmp_path / "a.pth", tmp_path / "shared")
    (tmp_path / "a.pth").unlink()
    there = tmp_path / "elsewhere"
    shutil.move(tmp_path / "shared", there)
    words = ["--resume", str(there), "--output_dir", str(tmp_path / "out")]
    if script == "main":
        args, typed = parse(get_parser(), [*words, "--coco_path", str(coco), "--epochs", "1", "--num_workers", "0"])
        main.main(args, typed)
        assert read_checkpoint(tmp_path / "out" / "checkpoint.pth").widths == Widths.parse(NETWORKS["slim"][1])
    elif script == "search":
        more = ["--coco_path", str(coco), "--keep", "0.9", "--search_split", "train2017", "--num_workers", "0"]
        found = search(MGP, *parse(get_pruning_parser(MGP, ""), [*words, *more]))
        assert found.path.exists() and found.widths.of("encoder.0.attention") <= 16
    elif script == "inference":
        parser = inference.get_inference_parser()
        inference.main(*parse(parser, [str(coco / "val2017"), *words, "--num_workers", "0"]))
        assert (tmp_path / "out" / "results.json").exists()
    else:
        pytest.importorskip("onnx")
        results = export.main(*parse(export.get_export_parser(), [*words, "--format", "onnx"]))
        assert results[0].passed and (tmp_path / "out" / "model.onnx").exists()


def get_parser():
    return argparse.ArgumentParser(parents=[main.get_args_parser()])


def test_nothing_of_the_machine_is_in_the_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run / "checkpoint_best.pth", f"--output_dir {run} --coco_path {tmp_path / 'coco'}")
    write_run(run, read(run / "checkpoint_best.pth")[0])
    share(run / "checkpoint_best.pth", tmp_path / "shared")
    for file in (tmp_path / "shared").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def write_run(run: Path, model: torch.nn.Module, **changes) -> None:
    """What fine-tuning writes beside its checkpoints."""
    params = sum(parameter.numel() for parameter in model.parameters())
    rows = [("dense", 0.5, params + 7, None), ("fine-tuned", 0.4, params, 3)]
    keys = ("name", "ap", "params", "epoch")
    write_json(run / "comparison.json", [
        {**dict(zip(keys, row, strict=True)), "ap50": 0.9, "detector_gmacs": 0.25, "milliseconds": 12.5, **changes}
        for row in rows
    ])  # fmt: skip
    command = f"python main.py --coco_path {run.parent}/coco --resume={run.parent}/pruned.pth --output_dir {run}"
    write_json(run / "args.json", {"runs": [{"command": command}]})


def test_the_card_has_the_tables_and_the_command_of_the_run(tmp_path):
    model = write_checkpoint(tmp_path / "checkpoint_best.pth", *NETWORKS["slim"])
    write_run(tmp_path, model)
    card = share(tmp_path / "checkpoint_best.pth", tmp_path / "shared")
    params = sum(parameter.numel() for parameter in model.parameters())
    assert f"| **fine-tuned, epoch 3** | 0.4000 | {params:,} | 0.25 | 12.5 |" in card
    assert f"| dense | 0.5000 | {params + 7:,} |" in card
    assert "    python main.py --coco_path coco --resume=pruned.pth --output_dir" in card
    assert "| encoder.0.attention | 32 | 16 |" in card and "| decoder.0.cross_attention |" not in card
    assert "1 a &lt;b&gt;\\|c, 3 b" in card
    shutil.copy(tmp_path / "checkpoint_best.pth", tmp_path / "checkpoint.pth")
    assert "the row fine-tuned is that of the best epoch" in share(tmp_path / "checkpoint.pth", tmp_path / "last")


@pytest.mark.parametrize("name", ["other.pth", "checkpoint_best.pth"])
def test_figures_of_other_weights_are_not_in_the_card(tmp_path, name):
    model = write_checkpoint(tmp_path / name, *NETWORKS["slim"])
    write_run(tmp_path, model, **({"params": 5} if name == "checkpoint_best.pth" else {}))
    card = share(tmp_path / name, tmp_path / "shared")
    assert "## Results" not in card and "0.4000" not in card


def write_journal(run: Path, model: torch.nn.Module, **changes) -> None:
    """The journal of a search with two budgets."""
    params = sum(parameter.numel() for parameter in model.parameters())
    point = {"detector_gmacs": 0.5, "params": params}
    points = [{"name": "before", "file": None, "ap": 0.6, **point},
              {"name": "0.8", "file": "pruned_0.8.pth", "ap": 0.55, **point},
              {"name": "0.5", "file": "pruned_0.5.pth", "ap": 0.45, **point, **changes}]  # fmt: skip
    end = {"event": "end", "passed": True, "ap": 0.45, "images": 4, "image_size_hw": [64, 80], "points": points,
           "widths": model.widths.to_list()}  # fmt: skip
    start = {"event": "start", "base_ap": 0.6, "args": {"search_split": "train2017"}}
    (run / "search.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
    write_json(run / "args.json", {"runs": [{"command": "python prune_greedy_ad.py --keep 0.8 0.5"}]})


def test_the_card_of_a_budget_names_its_row(tmp_path):
    model = write_checkpoint(tmp_path / "pruned_0.5.pth", *NETWORKS["slim"])
    write_journal(tmp_path, model)
    card = share(tmp_path / "pruned_0.5.pth", tmp_path / "shared")
    assert "| **0.5: pruned_0.5.pth** | 0.4500 |" in card and "| 0.8: pruned_0.8.pth | 0.5500 |" in card
    assert "on 4 images of train2017 that the search saw" in card and "64 x 80 pixels" in card
    assert "    python prune_greedy_ad.py --keep 0.8 0.5" in card
    write_journal(tmp_path, model, params=5)
    assert "## Results" not in share(tmp_path / "pruned_0.5.pth", tmp_path / "other")


def test_another_card_is_moved_aside(folder, tmp_path):
    (folder / "README.md").write_text("mine")
    share(tmp_path / "a.pth", folder)
    assert "mine" in [file.read_text() for file in folder.glob("README*") if file.name != "README.md"]
    assert "# shared" in (folder / "README.md").read_text()


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without_metadata(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(weights, folder / "model.safetensors")


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file, expected the options"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: found no JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json: found no JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: found None under `format`"),
    "another program's": (change_config(format="x"), r"config\.json: found 'x' under `format`"),
    "another version": (change_config(version=2), r"config\.json: found format version 2, expected 1"),
    "widths of text": (change_config(widths="all"), r"config\.json: found str under `widths`"),
    "other widths": (change_config(widths=[[[24, 20]], [[8, 32, 16], [32, 4, 32]]]), "shape"),
    "too few layers": (change_config(widths=[[[16, 20]], [[8, 32, 16]]]), r"config\.json: found 1 decoder layers"),
    "no options": (change_config(args=None), r"config\.json: found NoneType under `args`"),
    "an odd option": (change_config(args={"nheads": 0}), r"config\.json: found 0 under `args\.nheads`"),
    "other classes": (change_config(num_classes=9), r"config\.json: found 9 under `num_classes`"),
    "odd categories": (change_config(categories={"x": "y"}), r"config\.json: found 'x': 'y' under `categories`"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "found a folder, expected a checkpoint file"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), r"model\.safetensors: cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_sentence(folder, name):
    change, message = BAD[name]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_bad_folder_ends_the_script_with_2(folder, tmp_path):
    BAD["no config"][0](folder)
    code, said = run_script("main.py", f"--eval --device cpu --resume {folder} --output_dir {tmp_path / 'out'}")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: save_pretrained([str(tmp_path / "none.pth"), str(tmp_path / "out")]))
    assert end.value.code == 2 and not (tmp_path / "out").exists()


def test_options_are_read_where_another_program_dropped_the_metadata(tmp_path):
    model = write_checkpoint(tmp_path / "a.pth", *NETWORKS["other settings"])
    share(tmp_path / "a.pth", tmp_path / "shared")
    without_metadata(tmp_path / "shared")
    found, options, checkpoint = read(tmp_path / "shared")
    assert checkpoint.kind == "ours" and options.detector.nheads == 2 and options.detector.pe_temperatureH == 7
    with torch.no_grad():
        assert torch.equal(found(pictures()[0])["pred_boxes"], model(pictures()[0])["pred_boxes"])


def test_the_metadata_only_names_the_config(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt", METADATA_KEY: "config.json"}


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    write_checkpoint(tmp_path / "a.pth")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(UserError, match="found a file, expected a folder"):
        share(tmp_path / "a.pth", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


def test_only_one_module_needs_huggingface_hub():
    users = [name for name, path in MODULES.items() if "huggingface_hub import" in path.read_text()]
    importers = [name for name, path in MODULES.items() if "weights.hub_detector" in path.read_text()]
    assert (users, importers) == (["weights.hub_detector"], [])


def test_from_pretrained_and_save_pretrained_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from weights import hub_detector

    model = write_checkpoint(tmp_path / "a.pth", *NETWORKS["removed branches"])
    first = hub_detector.PretrainedDetector.from_checkpoint(tmp_path / "a.pth")
    assert isinstance(first, hub.PyTorchModelHubMixin)
    first.save_pretrained(tmp_path / "shared")
    again = hub_detector.PretrainedDetector.from_pretrained(tmp_path / "shared")
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "shared" / "config.json").read_bytes() == (tmp_path / "twice" / "config.json").read_bytes()
    weights, twice = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("shared", "twice"))
    assert weights.keys() == twice.keys() and all(torch.equal(twice[key], weights[key]) for key in weights)
    asked = {}

    def snapshot_download(repo_id, *, allow_patterns, revision=None):
        asked.update(repo_id=repo_id, files=allow_patterns, revision=revision)
        return str(tmp_path / "shared")

    monkeypatch.setattr(hub_detector, "snapshot_download", snapshot_download)
    third = hub_detector.PretrainedDetector.from_pretrained("user/name", revision="v1")
    assert asked == {"repo_id": "user/name", "files": ["config.json", "model.safetensors"], "revision": "v1"}
    assert third.categories == {1: "a <b>|c", 3: "b"} and not third.training
    with torch.no_grad():
        for found in (again, third):
            assert torch.equal(found(pictures()[0])["pred_logits"], model(pictures()[0])["pred_logits"])
    card = hub.ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.library_name == "dn-detr-pruning" and card.data.pipeline_tag == "object-detection"
    assert "## Results" not in card.text and card.data.tags == hub.ModelCard(str(again.generate_model_card())).data.tags


def test_only_what_can_be_a_name_of_the_hub_is_asked_for_there(tmp_path, folder, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from weights import hub_detector

    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(hub_detector, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    read = hub_detector.PretrainedDetector.from_pretrained
    names = ["shard", "./shard", "../shard/a", "~/shard", "a/b/c", str(tmp_path / "shard"), "shared/model", "user/",
             "/name", "a.pth/b", r"shared\model", Path("user/name"), ""]  # fmt: skip
    for name in names:
        with pytest.raises(UserError, match="found no such folder, expected one of save_pretrained, or a model of"):
            read(name)
    assert asked == []
    for name in ("shared", "./shared", "~/shared", Path("~/shared"), folder):
        assert read(name).categories == CATEGORIES
    assert asked == [] and read("user/name").categories == CATEGORIES and asked == ["user/name"]
    assert hub_detector.PretrainedDetector.from_checkpoint("~/a.pth").categories == CATEGORIES
    assert load_detector("~/shared").names == CATEGORIES


def test_a_folder_of_pickles_is_not_read_from_pretrained(tmp_path, folder):
    pytest.importorskip("huggingface_hub")
    from weights.hub_detector import PretrainedDetector

    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        PretrainedDetector.from_pretrained(folder)
