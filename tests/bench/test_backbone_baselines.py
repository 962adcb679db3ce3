"""Baselines for the backbone: every row has the MACs that the table says, and only what it names is done to it."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import engine
from bench import backbone_baselines as bench
from bench.backbone_baselines import (
    REESTIMATED,
    Results,
    best_channels,
    cut_blocks,
    magnitude,
    random_scores,
    rows_of,
    uniform_blocks,
)
from bench.backbone_torch_pruning import TOLERANCE, Setting, prune_backbone
from bench.batch_norms import norms_unfrozen, with_norms_reestimated
from bench.subject import CPU, Subject
from bench.tables import backbone_baselines as docs_table
from bench.torch_pruning_baseline import loss_gradients
from pruning.cost import cost_of
from pruning.gates import gates_applied
from pruning.kept_channels import check_kept
from tests.pruning.tiny import VARIANTS, pictures, randomise_norms, tiny_detector
from tests.tiny_run import write_self_annotated
from util.errors import UserError

SIZE_HW = (64, 64)
NORMS = ("FrozenBatchNorm2d", "BatchNorm2d")
NETWORKS = {**VARIANTS, "bottlenecks": "--backbone resnet50 --return_layer layer3"}
each_norm = pytest.mark.parametrize("norm", NORMS)


def detector(network="", norm="FrozenBatchNorm2d"):
    model, criterion, _ = tiny_detector(f"{network} --batch_norm_type {norm}")
    randomise_norms(model)
    return model.eval(), criterion


def share(slim, model):
    return cost_of(slim, SIZE_HW).detector_gmacs / cost_of(model, SIZE_HW).detector_gmacs


def batches(sizes=((64, 64), (64, 64), (64, 64))):
    """Two batches of other images."""
    return [pictures(sizes, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_self_annotated(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def subject(folder):
    return Subject(str(folder), str(folder / "dense.pth"), train_images=1, search_images=2, batch_size=1)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("keep", [0.9, 0.95, 1.0])
def test_uniform_blocks_have_the_macs_and_kept_sets_that_can_be_cut(network, keep):
    model, _ = detector(NETWORKS[network])
    widths = uniform_blocks(model, SIZE_HW, keep)
    modules = model.prunable_modules("detector")
    shares = [width / modules[name].width for name, width in widths.items()]
    assert max(shares) - min(shares) <= 1 / min(modules[name].width for name in widths)  # one channel's rounding
    for score in (lambda m, part: magnitude(model.state_dict(), m, part), random_scores(0)):
        kept = best_channels(model, widths, score)
        for name, kept_of_module in kept.items():
            check_kept(modules[name], kept_of_module)
        slim = cut_blocks(model, kept)
        assert share(slim, model) == pytest.approx(keep, rel=TOLERANCE)
        images, _ = pictures(((64, 64),))
        with torch.no_grad(), gates_applied(model, kept):
            gated = model(images)
        with torch.no_grad():
            torch.testing.assert_close(slim(images)["pred_boxes"], gated["pred_boxes"], rtol=1e-5, atol=1e-5)


def test_a_budget_that_blocks_cannot_meet_is_an_error():
    model, _ = detector()
    with pytest.raises(UserError, match=r"--keep 0\.05: .* reaches 0\.\d+ of"):
        uniform_blocks(model, SIZE_HW, 0.05)


def test_magnitude_is_the_product_of_squared_weights_in_and_out():
    model, _ = detector("--backbone resnet50 --return_layer layer3")
    module = model.prunable_modules("detector")["backbone.layer2.1"]
    block = model.backbone[0].body["layer2"][1]
    for part, before, after in (("inner1", block.conv1, block.conv2), ("inner2", block.conv2, block.conv3)):
        found = magnitude(model.state_dict(), module, part)
        expected = before.weight[5].double().square().sum() * after.weight[:, 5].double().square().sum()
        assert float(found[5]) == pytest.approx(float(expected))
        kept = best_channels(model, {module.name: 3}, lambda m, p: magnitude(model.state_dict(), m, p))
        worst_kept = found[kept[module.name][part]].min()
        assert int((found >= worst_kept).sum()) == 3


def test_random_channels_differ_by_seed_and_block_and_repeat():
    model, _ = detector()
    widths = uniform_blocks(model, SIZE_HW, 0.9)
    first, again, other = (best_channels(model, widths, random_scores(seed)) for seed in (0, 0, 1))
    name = "backbone.layer4.0"
    assert torch.equal(first[name]["inner"], again[name]["inner"])
    assert not torch.equal(first[name]["inner"], other[name]["inner"])


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
@each_norm
def test_torch_pruning_removes_inner_channels_alone_at_the_macs_asked(importance, ranking, norm):
    pytest.importorskip("torch_pruning")
    model, criterion = detector(norm=norm)
    before = copy.deepcopy(model.state_dict())
    gradients = loss_gradients(model, batches(), criterion, "backbone")
    slim = prune_backbone(model, Setting(importance, "inner", ranking), 0.9, SIZE_HW, gradients)
    assert share(slim, model) == pytest.approx(0.9, rel=TOLERANCE)
    cut_axes = {
        (piece.key, piece.axis)
        for name, module in model.prunable_modules("detector").items()
        if name.startswith("backbone")
        for piece in module.parameter_slices()
    }
    assert list(slim.state_dict()) == list(before)
    for key, value in slim.state_dict().items():
        smaller = {(key, axis) for axis, size in enumerate(value.shape) if size < before[key].shape[axis]}
        assert smaller <= cut_axes
        if value.shape == before[key].shape:
            assert torch.equal(value, before[key]), key
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in (*slim.parameters(), *model.parameters()))
    kinds = [type(m) for m in slim.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {kind.__name__ for kind in kinds} == {norm}
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (slim, model)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_torch_pruning_of_all_groups_leaves_what_the_transformer_reads(variant, importance):
    pytest.importorskip("torch_pruning")
    model, criterion = detector(VARIANTS[variant])
    gradients = loss_gradients(model, batches(), criterion, "backbone")
    slim = prune_backbone(model, Setting(importance, "all", "uniform"), 0.7, SIZE_HW, gradients)
    assert share(slim, model) == pytest.approx(0.7, rel=TOLERANCE)
    assert slim.backbone[0].body["conv1"].out_channels < model.backbone[0].body["conv1"].out_channels
    images, _ = pictures()
    with torch.no_grad():
        for stages in (slim.stages, model.stages):
            maps = [m.backbone[0](images[0][None], stages) for m in (slim, model)]
            assert [x.shape for x in maps[0]] == [x.shape for x in maps[1]]
        slim(images)
    after = {k: v for k, v in slim.state_dict().items() if not k.startswith("backbone")}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in after.items())


def test_taylor_goes_by_the_gradients():
    pytest.importorskip("torch_pruning")
    model, criterion = detector()
    gradients = loss_gradients(model, batches(), criterion, "backbone")
    key = "backbone.0.body.layer4.0.conv1.weight"
    gradients = {name: torch.zeros_like(g) for name, g in gradients.items()}
    gradients[key][[3, 8, 21]] = 1.0
    slim = prune_backbone(model, Setting("taylor", "inner", "uniform"), 0.9, SIZE_HW, gradients)
    left = slim.state_dict()[key]
    for channel in (3, 8, 21):
        assert (left == model.state_dict()[key][channel]).all(dim=(1, 2, 3)).any()


def test_a_budget_out_of_torch_prunings_reach_is_an_error():
    pytest.importorskip("torch_pruning")
    model, _ = detector()
    with pytest.raises(UserError, match=r"--keep 0\.05: Torch-Pruning \(magnitude, inner, uniform\) came within"):
        prune_backbone(model, Setting("magnitude", "inner", "uniform"), 0.05, SIZE_HW, {})


def test_the_budget_is_found_though_torch_pruning_leaves_whole_what_would_vanish():
    pytest.importorskip("torch_pruning")
    model, _ = detector()
    slim = prune_backbone(model, Setting("magnitude", "inner", "global"), 0.88, SIZE_HW, {})
    assert share(slim, model) == pytest.approx(0.88, rel=TOLERANCE)  # at a ratio of 0.8, layer1 is whole again


def test_torch_pruning_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match="pip install"):
        prune_backbone(detector()[0], Setting("magnitude", "inner", "uniform"), 0.9, SIZE_HW, {})


@each_norm
def test_reestimated_statistics_are_those_computed_by_hand(norm):
    model, _ = detector(norm=norm)
    before = copy.deepcopy(model.state_dict())
    found = with_norms_reestimated(model, batches())
    body, new = model.backbone[0].body, found.backbone[0].body
    means, variances, inner = [], [], []
    for images, _ in batches():
        with torch.no_grad():
            x = body["conv1"](torch.stack(images))
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
            scale = body["bn1"].weight / (x.var((0, 2, 3), correction=0) + body["bn1"].eps).sqrt()
            normalised = (x - mean[:, None, None]) * scale[:, None, None] + body["bn1"].bias[:, None, None]
            y = body["layer1"][0].conv1(body["maxpool"](normalised.relu()))
        means.append(mean)
        variances.append(variance)
        inner.append(y.mean((0, 2, 3)))
    torch.testing.assert_close(new["bn1"].running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new["bn1"].running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new["layer1"][0].bn1.running_mean, torch.stack(inner).mean(0), rtol=1e-4, atol=1e-5)
    assert type(new["bn1"]).__name__ == norm
    assert not any(module.training for module in found.modules())
    changed = {key for key, value in found.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.rsplit(".", 1)[1].startswith(("running_", "num_batches")) for key in changed)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    if norm == "BatchNorm2d":
        assert new["bn1"].momentum == body["bn1"].momentum


def test_statistics_of_images_of_other_sizes_have_no_padding():
    model, _ = detector()
    sizes = ((64, 64), (64, 96), (64, 64))
    found = with_norms_reestimated(model, batches(sizes)[:1])
    images, _ = batches(sizes)[0]
    alone = [[images[0], images[2]], [images[1]]]
    expected = with_norms_reestimated(model, [(part, None) for part in alone])
    for key, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


def test_unfrozen_norms_give_the_same_outputs_and_freeze_again_smaller():
    model, _ = detector()
    x = torch.stack(pictures(((64, 64),))[0])
    with torch.no_grad():
        expected = model.feature_maps(x)[0]
        with norms_unfrozen(model.backbone[0]):
            assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
            torch.testing.assert_close(model.feature_maps(x)[0], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.feature_maps(x)[0], expected)


def test_every_row_of_the_table_has_the_macs_of_its_budget(subject, tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr("bench.subject.BLOCK_UNIT", 1)  # the tiny blocks have fewer channels than the default's step
    results = Results(subject, tmp_path / "r.json", {"name": "tiny"})
    for row in rows_of(subject, lambda: subject, 0.9):
        bench.measure(results, subject, row, 0.9)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 1 + sum(1 + row.repairs for row in rows_of(subject, lambda: subject, 0.9))
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows[1:]:
        assert row["share"] == pytest.approx(0.9, rel=TOLERANCE), row["name"]
    assert len(next(row for row in rows if row["name"] == "uniform, random")["ap_seeds"]) == 3


def test_a_row_is_added_by_one_call_and_judged_by_the_same_evaluator(subject, tmp_path, capsys):
    path = tmp_path / "r.json"
    results = Results(subject, path, {"name": "tiny"})
    kept = best_channels(subject.dense, uniform_blocks(subject.dense, subject.image_size_hw, 0.9), random_scores(0))
    slim = cut_blocks(subject.dense, kept)
    added = results.add("mine", 0.9, slim)
    expected = engine.evaluate(slim, subject.postprocess, subject.val, subject.val_truth, device=CPU, progress=False)
    assert added["ap"] == expected.stats["AP"]
    assert added["params"] == cost_of(slim).params
    assert json.loads(path.read_text())["rows"][-1] == added
    with pytest.raises(UserError, match=r"mine: found 1\.000 of the dense detector's MACs, expected 0\.9 at most"):
        results.add("mine", 0.9, subject.dense)
    bench.print_table(results.figures)
    assert "mine" in capsys.readouterr().out


def test_a_second_call_continues_unless_the_settings_changed(folder, tmp_path, monkeypatch):
    words = ["tiny", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth"), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *words, "--search_images", "2", "--keep", "0.9"])
    monkeypatch.setattr(
        bench, "rows_of", lambda subject, own, keep: [bench.Row("a", lambda keep, seed: cut_somehow(subject))]
    )
    bench.main()
    path = tmp_path / "backbone_baselines_tiny.json"
    first = json.loads(path.read_text())
    assert [row["name"] for row in first["rows"]] == ["dense", "a", "a" + REESTIMATED]
    assert first["own_images"] == 2  # all that there are
    assert (tmp_path / "backbone_baselines_tiny.png").stat().st_size > 1000
    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", lambda *arguments, **options: pytest.fail("measured twice"))
        bench.main()
    assert json.loads(path.read_text()) == first
    monkeypatch.setattr("sys.argv", ["bench", *words, "--search_images", "1", "--keep", "0.9"])
    bench.main()
    assert json.loads(path.read_text())["search_images"] == 1


def cut_somehow(subject):
    widths = uniform_blocks(subject.dense, subject.image_size_hw, 0.9)
    return cut_blocks(subject.dense, best_channels(subject.dense, widths, random_scores(0)))


def test_the_table_of_the_docs_shows_both_norms_and_the_range_of_seeds(tmp_path):
    rows = [
        {"name": "dense", "keep": 1.0, "ap": 0.6, "ap_seeds": [0.6]},
        {"name": "a", "keep": 0.5, "ap": 0.2, "ap_seeds": [0.1, 0.3]},
        {"name": "a" + REESTIMATED, "keep": 0.5, "ap": 0.4, "ap_seeds": [0.4]},
        {"name": "b", "keep": 0.65, "ap": 0.55, "ap_seeds": [0.55]},
    ]
    (tmp_path / "backbone_baselines_demo.json").write_text(json.dumps({"rows": rows}))
    lines = docs_table(tmp_path).splitlines()
    assert lines[0] == "|  | demo, 65 % | demo, 50 % |"
    assert lines[2:] == ["| dense | 60.0 | 60.0 |", "| a |  | 20.0 ± 10.0 / 40.0 |", "| b | 55.0 |  |"]
