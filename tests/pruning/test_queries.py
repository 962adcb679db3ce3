"""Queries that find most: the choice, and detectors that keep them."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from pruning.queries import choose_queries, found_objects, most_found
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_detector
from tests.test_main import SLOW
from tests.tiny_run import options, write_self_annotated
from util.cli import parse
from util.errors import NonFiniteLossError, UserError
from weights.checkpoint_file import read_checkpoint

CPU = torch.device("cpu")
each_variant = pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)


def value(table: np.ndarray, columns) -> float:
    return float(table[:, list(columns)].max(axis=1).sum())


def test_the_chosen_queries_find_almost_as_much_as_the_best_ones():
    for seed in range(20):
        table = np.random.default_rng(seed).random((6, 7)) ** 3
        for count in range(1, 8):
            chosen = most_found(table, count)
            best = max(value(table, columns) for columns in itertools.combinations(range(7), count))
            assert len(set(chosen)) == count and chosen == sorted(chosen)
            assert value(table, chosen) >= (1 - 1 / np.e) * best
            if count == 1:
                assert value(table, chosen) == best


def test_each_query_is_the_one_that_adds_most():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        table = np.round(generator.random((30, 9)) ** 2, 1 + seed % 2)  # ties, and columns that add nothing
        chosen, best = [], np.zeros(len(table))
        for count in range(1, 10):
            gains = [float(np.maximum(column - best, 0).sum()) for column in table.T.copy()]
            order = sorted({*range(9)} - {*chosen}, key=lambda c: (-gains[c], -table.T.copy()[c].sum(), c))
            chosen.append(order[0])
            best = np.maximum(best, table[:, order[0]])
            assert most_found(table, count) == sorted(chosen)


def test_few_gains_are_computed_again(monkeypatch):
    table, computed = np.random.default_rng(0).random((50, 200)) ** 8, []
    maximum = np.maximum
    monkeypatch.setattr(np, "maximum", lambda *arrays: computed.append(arrays) or maximum(*arrays))
    most_found(table, 100)
    assert len(computed) < 100 * 200 / 4 and all(array.ndim == 1 for array, _ in computed)


def test_scores_that_are_not_finite_choose_nothing():
    model = tiny_detector()[0]
    torch.nn.init.constant_(model.class_embed.bias, float("nan"))
    images, targets = pictures()
    targets = [{**t, "orig_size": torch.ones(2), "image_id": torch.tensor(7 + i)} for i, t in enumerate(targets)]
    with pytest.raises(NonFiniteLossError, match=r"^--keep_queries 3: scores or boxes are not finite, .* \[7, 8\]$"):
        choose_queries(model, ListedBatches([(images, targets)]), 3, device=CPU)


def test_a_second_query_for_the_same_objects_is_left_for_one_that_finds_others():
    table = np.array([[0.9, 0.8, 0.0], [0.9, 0.8, 0.0], [0.0, 0.0, 0.3]])
    assert most_found(table, 2) == [0, 2]
    assert most_found(np.array([[0.9, 0.2, 0.5, 0.0]]), 3) == [0, 1, 2]


def test_an_object_is_found_by_class_and_overlap():
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    logits = torch.full((4, 3), -30.0)
    logits[:3, 1] = torch.tensor([0.0, 30.0, 0.0])  # of the object's class; the last query is sure of another class
    logits[3, 2] = 30.0
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]])
    np.testing.assert_allclose(found_objects(logits, boxes, target, 4), [[0.5, 1 / 3, 0, 0]], atol=1e-6)
    # Two patterns of two anchors: queries 0 and 2 are the first anchor's.
    np.testing.assert_allclose(found_objects(logits, boxes, target, 2), [[0.5, 1 / 3]], atol=1e-6)


@pytest.mark.parametrize("network", [*VARIANTS.values(), "--num_patterns 2"], ids=[*VARIANTS, "patterns"])
def test_kept_queries_give_what_they_give_in_the_whole_detector_without_attention_to_the_others(network):
    model = tiny_detector(network)[0].eval()
    kept = torch.tensor([0, 2, 3])
    rows = torch.cat([kept + 5 * pattern for pattern in range(max(1, model.num_patterns))])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, _ = pictures()
    with torch.no_grad():
        state = model.prepare(images)
        mask = torch.zeros(2 * [state.queries.shape[1]], dtype=torch.bool)
        mask[:, rows] = True
        whole = model.outputs(model.run_steps(state.replace(query_mask=mask)))
        model.keep_queries(kept)
        found = model(images)
    for name, parameter in model.state_dict().items():
        cut = name.removesuffix(".weight") in model.query_embeddings
        assert torch.equal(parameter, before[name][kept] if cut else before[name])
    assert all(parameter.requires_grad for parameter in model.transformer.parameters())
    for ours, theirs in zip([*found["aux_outputs"], found], [*whole["aux_outputs"], whole], strict=True):
        assert ours["pred_logits"].shape[1] == len(rows)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(ours[name], theirs[name][:, rows], atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=VARIANTS)
def root(request, tmp_path_factory) -> Path:
    """A data set annotated by its detector dense.pth, which has twelve queries."""
    return write_self_annotated(tmp_path_factory.mktemp(request.param), f"{VARIANTS[request.param]} --num_queries 12")


def test_images_without_objects_choose_nothing():
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "orig_size": torch.ones(2)}
    loader = ListedBatches([(pictures()[0], [nothing, nothing])])
    loader.coco = SimpleNamespace(annotation_file="a.json")
    with pytest.raises(UserError, match=r"^a\.json: found no boxes to choose queries by \(--keep_queries\)$"):
        choose_queries(tiny_detector()[0], loader, 3, device=CPU)


def words(root: Path, out: Path, *more: str | Path) -> tuple:
    return options("--coco_path", root, "--output_dir", out, "--num_workers 0 --device cpu --batch_size 2 --resume",
                   root / "dense.pth", *more)  # fmt: skip


def test_an_evaluation_with_fewer_queries_gives_ap_before_and_after(root, tmp_path):
    dense = main.main(*words(root, tmp_path / "dense", "--eval"))
    stats = main.main(*words(root, tmp_path / "fewer", "--eval --keep_queries 3"))
    content = json.loads((tmp_path / "fewer" / "eval.json").read_text())
    assert content["AP_with_all_queries"] == dense["AP"] != stats["AP"] == content["AP"]
    log = (tmp_path / "fewer" / "run.log").read_text()
    assert "--keep_queries 3: keeping those of 12 queries that find most objects in the first 2 images" in log
    same = main.main(*words(root, tmp_path / "same", "--eval --keep_queries 12"))
    assert same == dense and "keep_queries" not in (tmp_path / "same" / "run.log").read_text()


def test_fine_tuning_saves_exact_rows_and_a_smaller_number(root, tmp_path):
    still = "--lr 0 --lr_backbone 0 --weight_decay 0 --no-use_dn"
    main.main(*words(root, tmp_path, SLOW, still, "--epochs 1 --keep_queries 3 --distill", root / "dense.pth"))
    found, source = read_checkpoint(tmp_path / "checkpoint.pth"), read_checkpoint(root / "dense.pth")
    assert found.arguments["num_queries"] == 3 and found.arguments["num_select"] == 3 * 7
    before = source.state_dict["refpoint_embed.weight"]
    rows = [int((before == row).all(1).nonzero()) for row in found.state_dict["refpoint_embed.weight"]]
    assert rows == sorted(rows)
    for name, parameter in found.state_dict.items():
        cut = name in ("refpoint_embed.weight", "tgt_embed.weight")
        assert torch.equal(parameter, source.state_dict[name][rows] if cut else source.state_dict[name])
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["train_loss_distill_memory"] < 1e-6 and "AP before fine-tuning" in (tmp_path / "run.log").read_text()
    main.main(*options("--coco_path", root, "--output_dir", tmp_path / "on", SLOW, "--epochs 2 --keep_queries 3",
                       "--resume", tmp_path / "checkpoint.pth"))  # fmt: skip
    with pytest.raises(UserError, match=r"^--keep_queries 2: .* with 3 queries, which cannot continue with fewer;"):
        main.main(*options("--coco_path", root, "--output_dir", tmp_path / "on", SLOW, "--epochs 2 --keep_queries 2",
                           "--resume", tmp_path / "checkpoint.pth"))  # fmt: skip


def prune(root: Path, out: Path, more: str = ""):
    text = (f"--coco_path {root} --output_dir {out} --resume {root}/dense.pth --batch_size 2 --num_workers 0 "
            f"--device cpu --keep 0.7 --attention_unit 2 --ffn_unit 8 --search_split val2017 {more}")  # fmt: skip
    return search(MGP, *parse(get_pruning_parser(MGP, "a test"), text.split()))


def test_a_search_prunes_the_detector_with_the_kept_queries_and_resumes(root, tmp_path):
    if "deformable" in str(root):
        pytest.skip("one variant is enough")
    result = prune(root, tmp_path / "whole", "--keep_queries 4")
    found = read_checkpoint(result.path)
    assert found.arguments["num_queries"] == 4 and found.state_dict["refpoint_embed.weight"].shape == (4, 4)
    log = (tmp_path / "whole" / "run.log").read_text()
    assert "--keep_queries 4: keeping those of 12 queries" in log and "with all queries AP on val2017 is" in log
    lines = (tmp_path / "whole" / "search.jsonl").read_text().splitlines(keepends=True)
    assert len(json.loads(lines[0])["queries"]) == 4
    (tmp_path / "parts").mkdir()
    for queries, told in ((3, "found a search with"), (4, None)):
        (tmp_path / "parts" / "search.jsonl").write_text("".join(lines[:2]))
        if told:
            with pytest.raises(UserError, match=told):
                prune(root, tmp_path / "parts", f"--keep_queries {queries} --resume_search")
        else:
            again = prune(root, tmp_path / "parts", f"--keep_queries {queries} --resume_search")
            assert again.widths == result.widths and again.ap == result.ap
    stats = main.main(*options("--coco_path", root, "--output_dir", tmp_path / "eval", "--num_workers 0 --device cpu",
                               "--batch_size 2 --eval --resume", result.path))  # fmt: skip
    assert stats["AP"] == pytest.approx(result.ap, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--keep_queries 13 --eval", r"^--keep_queries 13: .*dense\.pth has 12 queries, expected 1 to 12$"),
        (
            "--keep_queries 3 --finetune_ignore refpoint_embed",
            "not loaded from --resume, expected all",
        ),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(root, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        main.main(*words(root, tmp_path, more))
    with pytest.raises(UserError, match=r"^--keep_queries: found no --resume"):
        main.main(*options("--coco_path", root, "--output_dir", tmp_path, "--device cpu --keep_queries 3 --eval"))
    assert not list(tmp_path.glob("*.json"))
