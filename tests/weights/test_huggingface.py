"""DAB-DETR of transformers: the same weights give the same outputs, and errors name what does not fit."""

import json
import os
import re

import pytest
import torch

import inference
from datasets.coco import annotation_path
from models import build
from models.config import DetectorConfig
from models.padding import PaddedImages
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.pruning.tiny import pictures
from tests.tiny_run import built, options, settled, write_self_annotated, write_split
from tools.prediction import PredictionOptions, load_detector
from util.checkpoint import load_weights
from util.cli import parse
from util.errors import UserError
from util.files import file_digest
from weights.build import options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.class_heads import find_new_parts
from weights.huggingface import weights_digest

pytest.importorskip("timm")
pytest.importorskip("safetensors")
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SIZES = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "hidden_size": 32,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "num_labels": 7,
         "backbone": "resnet18", "use_pretrained_backbone": False}  # fmt: skip


def tiny(**changes) -> torch.nn.Module:
    """A tiny detector of transformers with random weights."""
    torch.manual_seed(0)
    model = transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.dim() == 1:
                tensor.normal_(1 if "norm" in name or ".bn" in name else 0, 0.2)
        model.bbox_predictor.layers[-1].weight.normal_(0, 0.2)  # zero when built
        # Anchors beyond either bound on the logits, where DN-DETR's bound and transformers' differ.
        model.model.query_refpoint_embeddings.weight[0] = torch.tensor([-9.0, 9.0, -8.0, 8.0])
    return model


def detector_of(path) -> tuple[torch.nn.Module, DetectorConfig]:
    """The detector of a checkpoint with its weights, and its options."""
    checkpoint = read_checkpoint(path)
    config = options_for(DetectorConfig(), checkpoint)
    model, _, _ = build(config)
    load_weights(model, checkpoint.state_dict, path)
    return model.eval(), config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_patterns": 2, "activation_function": "relu", "encoder_layers": 2},
        {"dilation": True, "backbone": "resnet50", "temperature_height": 7, "encoder_ffn_dim": 24},
    ],
    ids=["plain", "patterns", "dilated"],
)
def test_outputs_agree_with_transformers_on_a_padded_batch(tmp_path, changes):
    theirs = tiny(**changes)
    theirs.save_pretrained(tmp_path)
    ours, config = detector_of(tmp_path)
    assert config.anchor_eps == 1e-5 and config.num_patterns == changes.get("num_patterns", 0)
    batch = torch.stack([torch.nn.functional.pad(image, (0, 96 - image.shape[2])) for image in pictures()[0]])
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, :, 64:] = True
    with torch.no_grad():
        expected = theirs(batch, pixel_mask=(~padding).long())
        found = ours(PaddedImages(batch, padding))
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-4)
    assert expected.pred_boxes.std() > 0.05 and expected.logits.std() > 0.05


def test_every_file_format_gives_the_same_weights(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "folder" / "pytorch_model.bin")
    whole = read_checkpoint(tmp_path / "folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        other = read_checkpoint(tmp_path / "folder" / name)
        assert (other.kind, other.arguments, other.widths) == (whole.kind, whole.arguments, whole.widths)
        assert all(torch.equal(other.state_dict[key], value) for key, value in whole.state_dict.items())
    torch.save(model.state_dict(), tmp_path / "alone.pth")
    alone = read_checkpoint(tmp_path / "alone.pth").arguments
    differing = {name: (value, alone[name]) for name, value in whole.arguments.items() if value != alone[name]}
    assert differing == {"nheads": (4, 8)}


NAMES = {0: "crescent", 1: "ring", 2: "cross"}


def saved_with(folder, model=None, **config):
    """`folder` with a tiny detector of three classes, and `config` in its config.json."""
    (tiny(num_labels=3) if model is None else model).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (None, None),
        ({}, None),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, None),
        ({"0": "N/A", "1": " a\nring\r\n", "2": "cross"}, {1: "a ring", 2: "cross"}),
        ({"2": "cross", "0": "LABEL_1"}, {0: "LABEL_1", 2: "cross"}),
    ],
)
def test_names_in_its_config_are_the_categories(tmp_path, labels, names):
    assert read_checkpoint(saved_with(tmp_path, id2label=labels)).categories == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"3": "star"}, r"found the id 3 under id2label, expected ids below 3, the classes of model\.safetensors"),
        ({"one\n": "ring"}, r"found 'one\\n': 'ring' under id2label, expected names by id"),
        ({"1": ["ring"]}, r"found '1': \['ring'\] under id2label"),
        (["ring"], r"found \['ring'\] under id2label"),
        ({"9" * 5000: "ring"}, r"found '9{39}\.\.\.: 'ring' under id2label"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_an_error(tmp_path, labels, message):
    with pytest.raises(UserError, match=rf"config\.json: {message}") as error:
        read_checkpoint(saved_with(tmp_path, id2label=labels))
    assert len(str(error.value).splitlines()) == 1


def write_named(root, names):
    """A data set with categories of these names by id."""
    for seed, split in enumerate(("train2017", "val2017")):
        write_split(root, split, 2, seed)
        path = annotation_path(root, split)
        tables = json.loads(path.read_text())
        tables["categories"] = [{"id": number, "name": name} for number, name in names.items()]
        for item in tables["annotations"]:
            item["category_id"] = min(item["category_id"], 2)
        path.write_text(json.dumps(tables))
    return root


def test_other_category_ids_are_refused_in_evaluation_and_keep_heads_by_name_in_training(tmp_path):
    theirs = saved_with(tmp_path / "theirs", id2label=NAMES)
    permuted = write_named(tmp_path / "permuted", {0: "ring", 1: "cross", 2: "crescent"})
    words = ("--resume", theirs, "--device cpu --num_workers 0 --coco_path")
    with pytest.raises(UserError, match="found 'crescent' as category 0 of the checkpoint, expected 'ring'"):
        settled(*options(*words, permuted, "--eval"))
    searching = f"--resume {theirs} --coco_path {permuted} --output_dir {tmp_path / 'out'} --device cpu"
    with pytest.raises(UserError, match="found 'crescent' as category 0 of the checkpoint, expected 'ring'"):
        search(MGP, *parse(get_pruning_parser(MGP, ""), searching.split()))
    args, typed = options(*words, permuted)
    settings, checkpoint, continuing = settled(args, typed)
    new_parts = find_new_parts((), settings.detector, checkpoint, evaluating=False, continuing=continuing)
    assert "3 of 3 categories carried over by name (ring, cross, crescent)" in new_parts.summary
    model = built(settings, checkpoint, new_parts)[0]
    before = checkpoint.state_dict["class_embed.bias"]
    assert torch.equal(model.class_embed.bias, before[[1, 2, 0]]) and len(set(before.tolist())) == 3
    args, typed = options(*words, write_named(tmp_path / "same", NAMES), "--eval")
    assert settled(args, typed)[0].detector.categories == NAMES


def test_its_names_are_drawn(tmp_path):
    path = str(saved_with(tmp_path, id2label=NAMES))
    args, typed = parse(inference.get_inference_parser(), ["x.jpg", "--resume", path, "--device", "cpu"])
    settings = PredictionOptions.from_values(vars(args))
    assert load_detector(path, "cpu", settings, typed).names == NAMES


def sharded(folder, suffix):
    """A folder with a tiny detector whose weights are in several files, its index, and the same in one file."""
    model = tiny()
    model.save_pretrained(folder / "whole")
    if suffix == ".safetensors":
        model.save_pretrained(folder / "parts", max_shard_size="2MB")
        return folder / "whole", folder / "parts", folder / "parts" / "model.safetensors.index.json"
    (folder / "parts").mkdir()
    weights = list(model.state_dict().items())
    halves = {"pytorch_model-1.bin": dict(weights[::2]), "pytorch_model-2.bin": dict(weights[1::2])}
    for name, part in halves.items():
        torch.save(part, folder / "parts" / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in halves.items() for key in part}}
    (folder / "parts" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "parts" / "config.json").write_bytes((folder / "whole" / "config.json").read_bytes())
    return folder / "whole", folder / "parts", folder / "parts" / "pytorch_model.bin.index.json"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_several_files_are_those_of_one(tmp_path, suffix):
    whole, parts, index = sharded(tmp_path, suffix)
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    expected = read_checkpoint(whole)
    for path in (parts, index):
        found = read_checkpoint(path)
        assert (found.path, found.arguments, found.widths) == (index, expected.arguments, expected.widths)
        assert found.state_dict.keys() == expected.state_dict.keys()
        assert all(torch.equal(found.state_dict[key], value) for key, value in expected.state_dict.items())


def test_an_index_that_does_not_match_its_files_is_an_error(tmp_path):
    _, parts, index = sharded(tmp_path, ".bin")
    content = json.loads(index.read_text())
    key = next(iter(content["weight_map"]))
    for weight_map, message in (
        ({**content["weight_map"], key: "pytorch_model-2.bin"}, rf"pytorch_model-2\.bin: found no {re.escape(key)}"),
        ({**content["weight_map"], key: "gone.bin"}, r"gone\.bin: no such file"),
        ({**content["weight_map"], key: "../whole/model.safetensors"}, "expected the name of a file beside it"),
        ({**content["weight_map"], key: 3}, "expected the name of a file beside it"),
        ({**content["weight_map"], key: index.name}, r"index\.json: cannot be read as a checkpoint"),
        ({}, r"found \{\} under weight_map"),
        ([], r"found \[\] under weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            read_checkpoint(parts)
    index.write_text("{")
    with pytest.raises(UserError, match="found no JSON"):
        read_checkpoint(parts)


def test_the_digest_of_weights_in_several_files_is_that_of_all(tmp_path):
    """A search resumes only with the same weights."""
    whole, _, index = sharded(tmp_path, ".bin")
    assert weights_digest(whole / "model.safetensors") == file_digest(whole / "model.safetensors")
    before = weights_digest(index)
    path = index.with_name("pytorch_model-2.bin")
    weights = torch.load(path)
    weights["class_embed.bias" if "class_embed.bias" in weights else next(iter(weights))] += 1
    torch.save(weights, path)
    assert weights_digest(index) != before


def test_the_output_of_a_search_keeps_anchor_eps(tmp_path):
    tiny().save_pretrained(tmp_path / "theirs")
    whole = read_checkpoint(tmp_path / "theirs")
    data = write_self_annotated(tmp_path / "data", "--backbone resnet18 --anchor_eps 1e-5", whole.state_dict)
    words = (
        f"--resume {tmp_path / 'theirs'} --coco_path {data} --output_dir {tmp_path / 'out'} --keep 0.5 --image_size 64 "
        "--num_workers 0 --device cpu --calibration_images 2 --batch_size 2 --save_safetensors"
    )
    result = search(MGP, *parse(get_pruning_parser(MGP, ""), words.split()))
    assert sum(width for _, width in result.widths.items()) < sum(width for _, width in whole.widths.items())
    pruned = read_checkpoint(result.path)
    assert pruned.is_search and pruned.arguments["anchor_eps"] == 1e-5
    args, typed = options(f"--resume {result.path} --coco_path {data} --eval --device cpu")
    settings, checkpoint, _ = settled(args, typed)
    found = []
    for again in (checkpoint, read_checkpoint(tmp_path / "out" / "pruned.safetensors")):
        slim = built(settings, again)[0].eval()
        assert slim.widths == result.widths
        with torch.no_grad():
            found.append(slim(pictures()[0])["pred_boxes"])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.encoder.layers.0.self_attn.k_proj.bias", "no model.encoder.layers.0.self_attn.k_proj.bias, expected"),
        ("class_embed.bias", "found no class_embed.bias"),
        ("model.query_refpoint_embeddings.weight", "no model.query_refpoint_embeddings.weight"),
        ("model.backbone.conv_encoder.model._backbone.layer3.0.conv1.weight", r"blocks under .*conv_encoder"),
    ],
)
def test_missing_keys_are_named_in_the_error(tmp_path, missing, message):
    weights = tiny().state_dict()
    del weights[missing]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth: .*{message}"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_query_pos": True}, "keep_query_pos"),
        ({"model_type": "detr"}, "model type 'detr'"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads"),
        ({"temperature_height": "hot"}, "pe_temperatureH"),
    ],
)
def test_an_unsupported_config_is_an_error(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        detector_of(tmp_path)


@pytest.mark.parametrize("digits", [7, 5000])
def test_a_huge_layer_number_is_an_error(tmp_path, digits):
    key = f"model.encoder.layers.{'9' * digits}.fc1.weight"
    torch.save({**tiny().state_dict(), key: torch.ones(32, 32)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"the key encoder.layers.99"):
        read_checkpoint(tmp_path / "a.pth")


def test_unknown_keys_and_folders_without_weights_are_errors(tmp_path):
    weights = {**tiny().state_dict(), "model.encoder.norm.weight": torch.ones(32)}
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"the key encoder.norm.weight"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"expected a checkpoint file, or model.safetensors"):
        read_checkpoint(tmp_path)


def test_a_loaded_detector_is_saved_as_our_checkpoint_with_its_anchor_eps(tmp_path):
    tiny().save_pretrained(tmp_path)
    model, config = detector_of(tmp_path)
    save_checkpoint(tmp_path / "ours.pth", state_dict=model.state_dict(), widths=model.widths,
                    full_widths=model.widths, arguments=config.values(), num_classes=7)  # fmt: skip
    again, config = detector_of(tmp_path / "ours.pth")
    assert config.anchor_eps == 1e-5
    with torch.no_grad():
        for key in ("pred_logits", "pred_boxes"):
            assert torch.equal(again(pictures()[0])[key], model(pictures()[0])[key])
