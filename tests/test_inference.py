"""inference.py on the images of a tiny data set: detections, pictures, output files and errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
import main
from datasets.coco import annotation_path
from pruning.kept_channels import all_kept
from pruning.transplant import widths_after
from tests.pruning.tiny import tiny_detector
from tests.tiny_run import TINY, options, write_self_annotated
from tools import prediction as predict
from util.cli import parse
from util.errors import UserError, run_cli
from weights.checkpoint_file import Checkpoint, read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set that its detector dense.pth knows, that detector cut by a search, and as a foreign file."""
    root = write_self_annotated(tmp_path_factory.mktemp("annotated") / "coco", "--backbone resnet18")
    dense = read_checkpoint(root / "dense.pth")
    model = tiny_detector("--backbone resnet18")[0]
    kept = {name: all_kept(module) for name, module in model.prunable_modules().items()}
    kept["encoder.0.ffn"] = {"hidden": torch.arange(16)}
    kept["backbone.layer2.0"] = {"inner": torch.arange(8, 108)}
    widths = widths_after(model.widths_in("detector"), kept)
    save_checkpoint(root / "pruned.pth", state_dict=dense.state_dict, widths=widths, full_widths=dense.widths,
                    kept=kept, arguments=dense.arguments, num_classes=7, trace=[])  # fmt: skip
    torch.save({"model": dense.state_dict}, root / "foreign.pth")
    return root


def detect(out: Path, *words: str | Path) -> None:
    """Run inference.py on a CPU, writing to `out`."""
    words = [word for text in words for word in (text.split() if isinstance(text, str) else [str(text)])]
    parser = inference.get_inference_parser()
    inference.main(*parse(parser, [*words, "--output_dir", str(out), "--num_workers", "0", "--device", "cpu"]))


def read(path: Path):
    return json.loads(path.read_text())


def evaluated(root: Path, out: Path, checkpoint: str) -> list[dict]:
    """Detections that main.py finds on val2017."""
    main.main(*options("--coco_path", root, "--output_dir", out, "--num_workers 0 --device cpu --batch_size 2",
                       "--eval --save_results --resume", root / checkpoint))  # fmt: skip
    return read(out / "results.json")


def assert_same_results(found: list[dict], expected: list[dict]) -> None:
    """The same detections, up to the rounding of batches of other images."""
    for entries in (found, expected):
        assert {tuple(entry) for entry in entries} == {("image_id", "category_id", "bbox", "score")}
    assert [(e["image_id"], e["category_id"]) for e in found] == [(e["image_id"], e["category_id"]) for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)  # pixels
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_results_are_those_of_an_evaluation(root, tmp_path):
    names = annotation_path(root, "val2017")
    detect(tmp_path / "out", root / "val2017", "--batch_size 2 --resume", root / "dense.pth", "--names", names)
    assert_same_results(read(tmp_path / "out" / "results.json"), evaluated(root, tmp_path / "eval", "dense.pth"))
    images = read(tmp_path / "out" / "images.json")
    listed = {image["file_name"]: image["id"] for image in read(names)["images"]}
    assert {Path(image["file_name"]).name: image["id"] for image in images["images"]} == listed
    assert {entry["id"]: entry["name"] for entry in images["categories"]}[3] == "kind 3"
    for image in images["images"]:
        picture = Image.open(tmp_path / "out" / image["picture"])
        # Enlarged by a whole factor, so that labels can be read.
        assert (
            picture.width % image["width"] == 0 and picture.width / image["width"] == picture.height / image["height"]
        )
    # What inference.py writes of its images serves it as --names.
    detect(tmp_path / "again", root / "val2017/3.jpg", "--resume", root / "dense.pth", "--names",
           tmp_path / "out/images.json")  # fmt: skip
    assert [entry["id"] for entry in read(tmp_path / "again" / "images.json")["images"]] == [listed["3.jpg"]]


@pytest.mark.parametrize("boxes", ["upright", "as stored"])
def test_photos_on_their_side_are_read_alike_in_evaluation_and_inference(root, tmp_path, boxes):
    """Wide pictures stored with EXIF orientation 6; boxes count in the picture upright, or in the stored pixels."""
    shutil.copytree(root, tmp_path / "coco")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = [entry["file_name"] for entry in read(annotation_path(root, "val2017"))["images"] if entry["width"] == 80]
    plain = tmp_path / "plain"
    shutil.copytree(root, plain)
    for name in wide:
        picture = Image.open(root / "val2017" / name)
        picture.save(plain / "val2017" / name, "PNG")  # without the loss of another JPEG
        stored = picture.transpose(Image.Transpose.ROTATE_90) if boxes == "upright" else picture
        stored.save(tmp_path / "coco" / "val2017" / name, "PNG", exif=exif)
    wanted = evaluated(plain, tmp_path / "wanted", "dense.pth")
    assert evaluated(tmp_path / "coco", tmp_path / "eval", "dense.pth") == wanted
    names = annotation_path(tmp_path / "coco", "val2017")
    words = (tmp_path / "coco" / "val2017", "--batch_size 2 --resume", root / "dense.pth")
    detect(tmp_path / "out", *words, "--names", names)
    assert_same_results(read(tmp_path / "out" / "results.json"), wanted)
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in read(names)["images"]}
    assert sizes == {e["id"]: (e["width"], e["height"]) for e in read(tmp_path / "out" / "images.json")["images"]}
    # Unlisted images are turned upright.
    detect(tmp_path / "unlisted", *words)
    sides = [(e["width"], e["height"]) for e in read(tmp_path / "unlisted" / "images.json")["images"]]
    assert sides.count((80, 64) if boxes == "upright" else (64, 80)) == len(wide) > 0
    assert f"by their EXIF orientation: {len(wide)}\n" in (tmp_path / "unlisted" / "run.log").read_text()


def test_names_need_no_annotations_and_listed_sizes_are_compared(root, tmp_path):
    tables = read(annotation_path(root, "val2017"))
    del tables["annotations"]
    tables["images"][0].update(width=128, height=128)
    (tmp_path / "image_info.json").write_text(json.dumps(tables))
    (tmp_path / "notes.txt").write_text("")
    shutil.copytree(root / "val2017", tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("")
    detect(tmp_path / "out", tmp_path / "photos", "--batch_size 2 --resume", root / "dense.pth", "--names",
           tmp_path / "image_info.json")  # fmt: skip
    assert_same_results(read(tmp_path / "out" / "results.json"), evaluated(root, tmp_path / "eval", "dense.pth"))
    log = (tmp_path / "out" / "run.log").read_text()
    assert f"{tmp_path}/image_info.json: 1 of 7 images read differ from their listed size" in log
    assert "skipped 1 file (.txt: 1) without an image suffix" in log


def test_two_detectors_are_drawn_side_by_side_with_what_they_cost(root, tmp_path):
    detect(tmp_path / "out", root / "val2017", "--batch_size 2 --compare", root / "dense.pth", root / "pruned.pth",
           "--names", annotation_path(root, "val2017"))  # fmt: skip
    for name in ("dense", "pruned"):
        found = read(tmp_path / "out" / f"results_{'slim' if name == 'pruned' else name}.json")
        assert_same_results(found, evaluated(root, tmp_path / name, f"{name}.pth"))
    dense, slim = read(tmp_path / "out" / "compare.json")
    of_block = 28 * (64 * 9 + 128 * 9)  # channels gone, of 3x3 convolutions from 64 channels and to 128
    of_transformer = dense["transformer_params"] - slim["transformer_params"]
    assert dense["params"] - slim["params"] == of_transformer + of_block > of_block
    assert slim["widths"][0][0][1] == 16 and min(dense["ms_per_image"], slim["ms_per_image"]) > 0
    entry = read(tmp_path / "out" / "images.json")["images"][0]
    picture = Image.open(tmp_path / "out" / entry["picture"])
    assert picture.width > 2 * 640 - 100 and picture.height > entry["height"] * (picture.width // 2 // entry["width"])


def test_a_box_does_not_move_when_other_images_are_named_beside_it(root, tmp_path):
    """The images are 64 and 80 pixels wide at stride 32."""
    paths = [root / f"val2017/{number}.jpg" for number in range(5)]
    detect(tmp_path / "all", *paths, "--batch_size 5 --resume", root / "dense.pth")
    together = read(tmp_path / "all" / "results.json")
    for number, path in enumerate(paths, start=1):
        detect(tmp_path / "alone", path, "--batch_size 5 --resume", root / "dense.pth")
        alone = [{**entry, "image_id": number} for entry in read(tmp_path / "alone" / "results.json")]
        assert_same_results([entry for entry in together if entry["image_id"] == number], alone)


def test_a_foreign_checkpoint_takes_its_network_from_the_command_line(root, tmp_path):
    network = TINY.replace("--num_workers 0", "").replace("--device cpu", "").replace("resnet_tiny", "resnet18")
    network = network.replace("--no-pretrained_backbone", "").replace("--return_layer layer3", "--return_layer layer4")
    stored = read_checkpoint(root / "dense.pth").arguments
    network += " ".join(
        f" --{name} {stored[name]}" for name in ("num_queries", "dim_feedforward", "dec_layers", "nheads")
    )
    detect(tmp_path / "foreign", root / "val2017", network, "--resume", root / "foreign.pth")
    detect(tmp_path / "ours", root / "val2017", "--batch_size 2 --resume", root / "dense.pth")
    assert read(tmp_path / "foreign" / "results.json") == read(tmp_path / "ours" / "results.json")


def test_names_are_those_of_the_annotations_given_or_else_of_the_checkpoint_or_else_ids(root, tmp_path, monkeypatch):
    def names(*words: str | Path) -> dict[int, str]:
        detect(tmp_path / "out", root / "val2017/1.jpg", "--resume", root / "dense.pth", *words)
        return {entry["id"]: entry["name"] for entry in read(tmp_path / "out" / "images.json")["categories"]}

    def with_names(path: str | Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        object.__setattr__(checkpoint, "categories", {1: "one", 2: "two"})
        return checkpoint

    assert names() == {number: str(number) for number in range(7)}
    monkeypatch.setattr(predict, "read_checkpoint", with_names)
    assert names() == {1: "one", 2: "two"}
    assert names("--names", annotation_path(root, "val2017"))[1] == "kind 1"


def test_a_damaged_image_is_named_and_the_others_keep_their_ids(root, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name in ("a/0.jpg", "1.jpg", "1.png"):
        shutil.copy(root / "val2017" / "1.jpg", tmp_path / name)
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    detect(tmp_path / "out", tmp_path, tmp_path / "a", "--resume", root / "dense.pth", "--max_images 4")
    assert f"{tmp_path}/0.jpg cannot be read as an image: found no known format" in capsys.readouterr().out
    entries = read(tmp_path / "out" / "images.json")["images"]
    assert [(entry["id"], Path(entry["picture"]).name) for entry in entries] == [
        (2, "1.jpg"), (3, "1-2.jpg"), (4, "0-2.jpg")]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir()) == ["0-2.jpg", "1-2.jpg", "1.jpg"]
    found = {entry["image_id"] for entry in read(tmp_path / "out" / "results.json")}
    assert found == {2, 3, 4} and "0.jpg cannot be read" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.parametrize("detectors", ["--resume {root}/dense.pth", "--compare {root}/dense.pth {root}/pruned.pth"])
def test_it_fails_only_if_no_image_is_left(root, tmp_path, capsys, detectors):
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    (tmp_path / "1.png").write_bytes((root / "val2017" / "1.jpg").read_bytes()[:300])
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: detect(tmp_path / "out", tmp_path, detectors.format(root=root)))
    message = capsys.readouterr()
    assert end.value.code == 2 and message.out.count("cannot be read as an image") == 2
    assert message.err.startswith("error: found no image that can be read among 2")


def test_a_picture_never_replaces_an_input(root, tmp_path):
    (tmp_path / "pictures").mkdir()
    shutil.copy(root / "val2017" / "1.jpg", tmp_path / "pictures")
    with pytest.raises(UserError, match="found an input where pictures go"):
        detect(tmp_path, tmp_path / "pictures", "--resume", root / "dense.pth")


MISTAKES = {
    "no such image": ("nowhere.jpg --resume {root}/dense.pth", "nowhere.jpg: found no such file or folder"),
    "an empty folder": ("{root}/annotations --resume {root}/dense.pth", "annotations: found no images in the folder"),
    "an empty glob": ("{root}/*.jpg --resume {root}/dense.pth", "*.jpg: found no images by the glob"),
    "no checkpoint": ("{root}/val2017", "--resume, --compare: found neither"),
    "two ways": ("{root}/val2017 --resume a --compare a b", "--resume, --compare: found both"),
    "missing checkpoint": ("{root}/val2017 --resume nowhere.pth", "nowhere.pth: no such file"),
    "an option of training": ("{root}/val2017 --resume a --lr 1", "unrecognized arguments: --lr 1"),
    "an option of a data set": ("{root}/val2017 --resume a --coco_path b", "unrecognized arguments: --coco_path b"),
    "an option of the other variant": (
        "{root}/val2017 --resume {root}/dense.pth --enc_n_points 4",
        "--enc_n_points: dn_dab_detr has one level and no points",
    ),
    "widths twice": ("{root}/val2017 --compare a b --cfgs [[],[]]", "--cfgs: found --compare as well"),
    "another network": ("{root}/val2017 --resume {root}/dense.pth --enc_layers 4", "--enc_layers 4"),
    "names of no file": ("{root}/val2017 --resume {root}/dense.pth --names no.json", "no.json does not exist"),
    "a score above 1": ("{root}/val2017 --resume {root}/dense.pth --score_threshold 2", "expected a number in [0, 1]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_one_line_error_and_nothing_is_written(root, tmp_path, mistake):
    words, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        detect(tmp_path / "out", words.format(root=root))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="found several processes"):
        detect(tmp_path / "out", root / "val2017", "--resume", root / "dense.pth")
