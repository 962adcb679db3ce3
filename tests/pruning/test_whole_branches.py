"""Modules of width 0: searches that remove them, every way to store and load them, training, export, compilation."""

import json

import pytest
import torch

import export
from main import main
from models.widths import Widths
from pruning.kept_channels import none_kept
from pruning.transplant import cut_state_dict, widths_after
from tests.pruning.test_end_to_end import SMALL, ap_of, write_folder
from tests.pruning.test_resume import search_with, words_of
from tests.pruning.tiny import VARIANTS, pictures, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from tests.tiny_run import TINY, built, settled, tiny_options, write_self_annotated
from tests.trust.forked import job, run_jobs
from util.cli import parse
from util.errors import UserError
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint, save_checkpoint

UNITS = "--scope detector --attention_unit 4 --ffn_unit 16 --block_unit 4 --min_units 0"
KINDS = {
    "keep": "--keep 0.83 --search_split val2017",
    "keep params": "--keep 0.3 --cost params --search_split val2017",
    "visit": "--search visit --map_tol 0.9 --decay_points 0 --skip_eval_converge 0.6",
    "paper": "--search paper --map_tol 0.9 --decay_points 0 --skip_eval_converge 0.6 --num_candidates_attention 8 "
    "--num_candidates_ffn 9",
}
SEARCHES = [(variant, kind) for variant in VARIANTS for kind in KINDS]
QUICK = [("dense", "keep"), ("dense", "visit"), ("dense", "paper"), ("deformable", "keep")]
# All kinds of modules removed, some of them in the first layer of their stack.
REMOVED = {
    "dense": Widths.parse([[[0, 8], [8, 0]], [[0, 8, 0], [8, 0, 8]], [[0], [16], [0]]]),
    "no attention to queries": Widths.parse([[[0, 0], [0, 0]], [[0, 8, 8], [0, 8, 8]], [[8], [0], [32]]]),
    "deformable": Widths.parse([[[0, 8], [8, 0]], [[0, 8, 0], [8, 0, 8]], [[0], [16], [0]]]),
    "deformable, nothing": Widths.parse([[[0, 0], [0, 0]], [[0, 0, 0], [0, 0, 0]], [[0], [0], [0]]]),
}
TWO_LAYERS = "--enc_layers 2"


def network_of(name):
    words = VARIANTS["deformable" if "deformable" in name else "dense"]
    return f"{words} {TWO_LAYERS} {'' if 'deformable' in name else '--return_layer layer3'}"


def cut_detector(name, removes_blocks=True):
    """A tiny detector with these modules removed, its dense one, and the options of both."""
    network, widths = network_of(name), REMOVED[name]
    dense = tiny_detector(network)[0].eval()
    kept = {}
    for module_name, module in dense.prunable_modules("detector" if removes_blocks else "transformer").items():
        width = widths.of(module_name)
        heads = torch.arange(module.width).view(module.nheads, -1)[:, : width // module.nheads]
        kept[module_name] = {part: heads.flatten() for part in none_kept(module)}
    widths = widths_after(dense.widths_in("detector" if removes_blocks else "transformer"), kept)
    slim = tiny_detector(network, widths, seed=1)[0].eval()
    slim.load_state_dict(cut_state_dict(with_slim_names(dense), kept, slim_named(dense, network)))
    return slim, dense, network


def slim_named(dense, network):
    named = tiny_detector(network, dense.widths)[0]
    return named.prunable_modules("detector")


def with_slim_names(dense):
    return {
        key.replace("self_attn.", "") if "encoder" in key and ("in_proj" in key or "out_proj" in key) else key: value
        for key, value in dense.state_dict().items()
    }


@torch.no_grad()
def outputs(model):
    images, _ = pictures()
    found = model(images)
    return torch.cat([found["pred_logits"].flatten(), found["pred_boxes"].flatten()])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_folder(tmp_path_factory.mktemp("whole"), words) for name, words in VARIANTS.items()}


@pytest.mark.parametrize(("variant", "kind"), rest_in_soak(SEARCHES, QUICK))
def test_a_search_removes_modules_and_its_map_is_that_of_the_cut_detector(folders, tmp_path, variant, kind):
    root = folders[variant]
    result = search_with(words_of(root, tmp_path, f"{UNITS} {KINDS[kind]}"))
    removed = [name for name, width in result.widths.items() if not width]
    assert removed
    args = tiny_args(f"{SMALL} --coco_path {root} --resume {result.path} --eval")
    slim = built(*settled(args)[:2])
    assert slim[0].widths_in("detector") == result.widths
    assert not {*removed} & {*slim[0].prunable_modules("detector")}
    split = read_checkpoint(result.path).arguments["search_split"]
    assert ap_of(slim[0], slim[2]["bbox"], args, split) == pytest.approx(result.ap, abs=1e-3)
    if kind != "keep":
        return
    # What is left is cut again.
    more = f"{UNITS} --attention_unit 1 --ffn_unit 1 --block_unit 1 --keep 0.99 --search_split val2017"
    again = search_with(words_of(root, tmp_path / "again", more).replace(f"{root}/dense.pth", str(result.path)))
    assert all(again.widths.of(name) == 0 for name in removed)
    assert sum(width for _, width in again.widths.items()) < sum(width for _, width in result.widths.items())


def test_a_detector_without_modules_is_not_searched(folders, tmp_path):
    args = tiny_args("")
    slim = tiny_detector("", no_widths := Widths.parse([[[0, 0]], [[0, 0, 0], [0, 0, 0]]]))[0]
    save_checkpoint(
        tmp_path / "slim.pth", state_dict=slim.state_dict(), widths=no_widths, full_widths=no_widths,
        arguments=vars(args), num_classes=7,
    )  # fmt: skip
    words = words_of(folders["dense"], tmp_path, "--keep 0.5").replace(f"{folders['dense']}/dense", f"{tmp_path}/slim")
    with pytest.raises(UserError, match=r"slim\.pth: found no attention and FFN above width 0, expected one to prune"):
        search_with(words)
    with pytest.raises(UserError, match="found less than the smallest widths cost"):
        search_with(f"{words} --scope detector")


def test_a_budget_below_one_unit_everywhere_needs_width_0(folders, tmp_path):
    words = words_of(folders["dense"], tmp_path, f"{UNITS} {KINDS['keep']}")
    with pytest.raises(UserError, match=r"--keep 0\.83: found less than the smallest widths cost"):
        search_with(words.replace("--min_units 0", "--min_units 1"))


@pytest.mark.parametrize("name", REMOVED)
def test_every_format_gives_the_same_detector(folders, tmp_path, name):
    slim, dense, network = cut_detector(name)
    expected, widths = outputs(slim), slim.widths_in("detector")
    assert torch.isfinite(expected).all()
    arguments = vars(tiny_args(network, slim.widths))
    content = {"widths": widths, "full_widths": dense.widths_in("detector"), "arguments": arguments, "num_classes": 7}
    save_checkpoint(tmp_path / "slim.pth", state_dict=slim.state_dict(), **content, safetensors=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "slim.safetensors").rename(tmp_path / "folder" / "model.safetensors")
    for path, cfgs in (("slim.pth", None), ("folder", None), ("folder/model.safetensors", None), ("slim.pth", widths)):
        args = tiny_args(f"{network} --eval --coco_path {folders['dense']} --resume {tmp_path / path}", cfgs)
        loaded, _, _ = built(*settled(args, ("cfgs",) if cfgs else ())[:2])
        assert loaded.widths_in("detector") == widths
        torch.testing.assert_close(outputs(loaded.eval()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", REMOVED)
def test_widths_of_a_foreign_file_are_read_from_its_shapes(folders, tmp_path, name):
    slim, _, network = cut_detector(name, removes_blocks=False)
    torch.save({"model": slim.state_dict()}, tmp_path / "foreign.pth")
    checkpoint = read_checkpoint(tmp_path / "foreign.pth")
    assert checkpoint.widths == slim.widths
    assert checkpoint.kind == ("release" if "deformable" in name else "paper_slim")
    assert ("deformable" in checkpoint.arguments["modelname"]) == ("deformable" in name)
    for cfgs in (None, slim.widths):
        args = tiny_args(f"{network} --coco_path {folders['dense']} --eval --resume {tmp_path / 'foreign.pth'}", cfgs)
        loaded, _, _ = built(*settled(args, ("cfgs",) if cfgs else ())[:2])
        torch.testing.assert_close(outputs(loaded.eval()), outputs(slim), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "deformable"])
def test_a_detector_with_removed_modules_compiles(name):
    slim = cut_detector(name)[0]
    torch.testing.assert_close(outputs(torch.compile(slim, backend="eager")), outputs(slim))


@pytest.mark.parametrize("name", rest_in_soak([*REMOVED], ["dense"]))
def test_a_detector_with_removed_modules_is_exported_without_them(folders, tmp_path, name):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    slim, dense, network = cut_detector(name)
    save_checkpoint(
        tmp_path / "slim.pth", state_dict=slim.state_dict(), widths=slim.widths_in("detector"),
        full_widths=dense.widths_in("detector"), arguments=vars(tiny_args(network, slim.widths)), num_classes=7,
    )  # fmt: skip
    words = f"--resume {tmp_path / 'slim.pth'} --output_dir {tmp_path} --format onnx --image_size_hw 96 128"
    (result,) = export.main(*parse(export.get_export_parser(), words.split()))
    assert result.passed
    graph = onnx.load_model(tmp_path / "slim.onnx").graph
    assert all(0 not in weight.dims for weight in graph.initializer)


def test_training_with_distillation_changes_the_biases_that_are_left(tmp_path):
    write_self_annotated(tmp_path / "data", f"{TWO_LAYERS} --return_layer layer3")
    dense = tmp_path / "data" / "dense.pth"
    widths = REMOVED["dense"]
    checkpoint = read_checkpoint(dense)
    whole, _, _ = build_detector(
        settled(tiny_args(f"--eval --coco_path {tmp_path / 'data'} --resume {dense}"))[0].detector, checkpoint
    )
    kept = {name: none_kept(m) for name, m in whole.prunable_modules("detector").items() if not widths.of(name)}
    save_checkpoint(
        tmp_path / "pruned.pth", state_dict=whole.state_dict(), kept=kept,
        widths=widths_after(whole.widths_in("detector"), kept), full_widths=whole.widths_in("detector"),
        arguments=checkpoint.arguments, num_classes=7,
    )  # fmt: skip
    out = tmp_path / "out"
    main(*tiny_options(f"--coco_path {tmp_path / 'data'} --resume {tmp_path / 'pruned.pth'} --output_dir {out} "
                       f"--enc_layers 2 --epochs 1 --lr 1e-3 --distill {dense}"))  # fmt: skip
    tuned = read_checkpoint(out / "checkpoint.pth")
    assert tuned.widths.of("encoder.0.attention") == 0 and tuned.kept is None
    bias = "transformer.decoder.layers.0.self_attn.out_proj.bias"
    assert not torch.equal(tuned.state_dict[bias], whole.state_dict()[bias])
    assert json.loads((out / "log.txt").read_text().splitlines()[-1])["epoch"] == 0


def test_processes_train_together_where_no_attention_uses_shared_layers(tmp_path):
    root = write_self_annotated(tmp_path / "data", "")
    cfgs = "[[[0,8]],[[0,0,8],[0,0,8]]]"
    words = f"{TINY} --coco_path {root} --cfgs {cfgs} --epochs 2 --scalar 2 --batch_size 1 --output_dir {tmp_path}/out"
    run_jobs(tmp_path / "jobs.json", [job(2, "main", " ".join(words.split()))])
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pth").widths == Widths.parse(cfgs)
