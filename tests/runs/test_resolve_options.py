"""Options that a run would ignore are refused; all others are accepted."""

import pytest

import export
import inference
import main
from main import get_args_parser
from models.config import refuse_unused_by_network
from pruning.schedule import GP, MGP
from runs.config import TrainingOptions
from runs.resolve_options import OF_TRAINING, refuse_unused_by_start, refuse_unused_by_training, resolve_training
from runs.search_command import get_pruning_parser
from tests.tiny_run import options, tiny_options, write_self_annotated
from tools.cost import get_cost_parser
from util.cli import parse, script_parser
from util.errors import UserError

DEFORMABLE = "-m dn_dab_deformable_detr"
FLAGS = ("save_safetensors", "tensorboard", "start_fresh", "cache_images")
WORDS = {"augmentation": "flip", "lr_schedule": "cosine", "distill": "/nonexistent", "weight_decay_on": "all",
         "distill_queries": "matching"}  # fmt: skip


def check(words: str) -> None:
    """Parse as main.py does, and check as it does without a checkpoint."""
    args, typed = parse(script_parser("a test", parents=[get_args_parser()]), words.split())
    options = TrainingOptions.from_values(vars(args))
    refuse_unused_by_start(options, typed)
    refuse_unused_by_network(options.detector, typed)
    refuse_unused_by_training(options, typed)


@pytest.mark.parametrize("name", OF_TRAINING)
def test_an_evaluation_refuses_training_options(name):
    value = "" if name in FLAGS else WORDS.get(name, "0" if name in ("dropout", "ema_decay") else "1")
    with pytest.raises(UserError, match=f"^--{name}: found with --eval, which does not train$"):
        check(f"--eval --resume a.pth --{name} {value}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval --lr 5 --distill /nonexistent", "--lr, --distill: found with --eval, which does not train"),
        ("--eval --resume a.pth --seed 3", "--seed: found with --eval and --resume, where nothing is random"),
        ("--eval --amp", "--amp: --eval does not train, expected --eval_amp"),
        ("--start_fresh", "--start_fresh: found no --resume"),
        ("--pretrained_backbone --resume a.pth", "--pretrained_backbone: found with --resume"),
        ("--distill_boxes_coef 1", "--distill_boxes_coef: found no --distill"),
        ("--lr_schedule cosine --lr_drop 40", "--lr_drop: found --lr_schedule cosine, expected step"),
        ("--no-use_dn --scalar 5 --box_noise_scale 0.4", "--scalar, --box_noise_scale: found --no-use_dn"),
        (f"{DEFORMABLE} --transformer_activation prelu", "--transformer_activation: found prelu, expected relu"),
        (f"{DEFORMABLE} --pe_temperatureH 20", "--pe_temperatureH: dn_dab_deformable_detr has the temperature 10000"),
        (f"{DEFORMABLE} --pe_temperatureW 10000", "--pe_temperatureW: dn_dab_deformable_detr has"),
        ("--num_feature_levels 4", "--num_feature_levels: dn_dab_detr has one level and no points"),
        ("--enc_n_points 4", "--enc_n_points: dn_dab_detr has one level and no points"),
        ("--dilation --return_layer layer3", "--dilation: found --return_layer layer3, expected layer4"),
        (f"{DEFORMABLE} --dilation --return_layer layer3", "--dilation: found --return_layer layer3"),
    ],
)
def test_options_without_effect_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        check(words)


@pytest.mark.parametrize(
    "words",
    [
        "-m dn_dab_detr --output_dir out --batch_size 4 --coco_path COCODIR --resume CKPT --use_dn --eval "
        "--cfgs [[[152, 416]], [[8, 136, 544]]]",
        "-m dn_dab_detr --output_dir out --coco_path COCODIR --resume PRUNED --batch_size 8 --use_dn",
        "--eval --resume a.pth --eval_amp fp16 --save_results --num_select 9 --no-pretrained_backbone",
        "--eval --seed 3",
        "--eval --val_json a.json --val_images photos --resume a.pth --image_size 640",
        "--resume a.pth --distill b.pth --distill_logits_coef 0 --amp --eval_amp bf16 --save_results",
        "--lr_drop 4 --warmup_iters 9 --no-use_dn --pretrained_backbone --dilation",
        "--lr_schedule cosine --warmup_iters 9 --scalar 3",
        f"{DEFORMABLE} --transformer_activation relu --num_patterns 0 --enc_n_points 2 --dilation --anchor_eps 1e-5",
    ],
)
def test_options_that_are_read_are_accepted(words):
    check(words)


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (lambda: get_pruning_parser(GP, ""), "--eval"),
        (lambda: get_pruning_parser(MGP, ""), "--lr 5"),
        (lambda: get_pruning_parser(MGP, ""), "--print_freq 5"),
        (lambda: export.get_export_parser(), "--epochs 4"),
        (lambda: export.get_export_parser(), "--search_images 640"),
        (lambda: inference.get_inference_parser(), "--seed 4"),
        (lambda: inference.get_inference_parser(), "--eval_amp"),
        (get_cost_parser, "--num_select 4"),
        (lambda: script_parser("", parents=[get_args_parser()]), "--keep 0.5"),
        # Abbreviations are refused: `--epoch` could become ambiguous when an option is added.
        (lambda: script_parser("", parents=[get_args_parser()]), "--epoch 5"),
        (lambda: get_pruning_parser(MGP, ""), "--map 0.1"),
    ],
)
def test_a_script_has_the_options_that_it_reads(parser, words):
    with pytest.raises(UserError, match=f"unrecognized arguments: {words}; see --help"):
        parse(parser(), ["photos", *words.split()] if "IMAGES" in parser().usage else words.split())


def test_a_whole_backbone_among_the_typed_widths_is_left_out(coco):
    backbone = "--backbone resnet18 --no-pretrained_backbone --enc_layers 1 --dec_layers 1 --hidden_dim 32 --nheads 4"
    for blocks, stored in (
        ("[[64,64],[128,128],[256,256],[512,512]]", 2),
        ("[[64,9],[128,128],[256,256],[512,512]]", 3),
    ):
        words = f"{backbone} --coco_path {coco} --cfgs [[[32,2048]],[[32,32,2048]],{blocks}]"
        args, typed = parse(script_parser("a test", parents=[get_args_parser()]), words.split())
        found = resolve_training(TrainingOptions.from_values(vars(args)), typed)[0].detector.cfgs
        assert len(found.to_list()) == stored


def test_the_checkpoint_supplies_options(coco, tmp_path):
    """It supplies the variant and a training run's schedule, denoising and teacher."""
    root = write_self_annotated(tmp_path / "data", f"{DEFORMABLE} --return_layer layer3 --num_feature_levels 3")
    common = ("--num_workers 0 --device cpu --coco_path", root, "--output_dir", tmp_path / "out", "--resume")
    with pytest.raises(UserError, match=r"--transformer_activation prelu: .*dense\.pth was made with relu"):
        main.main(*options(*common, root / "dense.pth", "--eval --transformer_activation prelu"))
    main.main(*options(*common, root / "dense.pth", "--eval --num_feature_levels 3 --transformer_activation relu"))
    main.main(*tiny_options("--epochs 1 --lr_schedule cosine --coco_path", coco, "--output_dir", tmp_path / "run"))
    again = ("--coco_path", coco, "--output_dir", tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint.pth")
    with pytest.raises(UserError, match="--lr_drop: found --lr_schedule cosine"):
        main.main(*options(*again, "--epochs 2 --lr_drop 1 --device cpu --num_workers 0"))
    with pytest.raises(UserError, match="--distill_logits_coef: found no --distill"):
        main.main(*options(*again, "--epochs 2 --distill_logits_coef 1 --device cpu --num_workers 0"))
    assert not (tmp_path / "out" / "checkpoint.pth").exists()
