"""Options: names and defaults that people rely on, and which of them come out of a checkpoint."""

import argparse

import pytest

from main import get_args_parser
from models.widths import Widths
from util.errors import UserError, run_cli
from weights.checkpoint_file import Checkpoint
from weights.options import parse
from weights.stored_options import take_from_checkpoint

DEFAULTS = {
    "lr": 1e-4, "lr_backbone": 1e-5, "weight_decay": 1e-4, "clip_max_norm": 0.1, "enc_layers": 6, "dec_layers": 6,
    "dim_feedforward": 2048, "hidden_dim": 256, "nheads": 8, "num_queries": 300, "num_select": 300,
    "set_cost_class": 2, "set_cost_bbox": 5, "set_cost_giou": 2, "cls_loss_coef": 1, "bbox_loss_coef": 5,
    "giou_loss_coef": 2, "focal_alpha": 0.25, "scalar": 5, "label_noise_scale": 0.2, "box_noise_scale": 0.4,
    "pe_temperatureH": 20, "pe_temperatureW": 20, "transformer_activation": "prelu", "dropout": 0, "epochs": 50,
    "lr_drop": 40, "num_patterns": 0, "backbone": "resnet50", "seed": 42, "use_dn": True, "amp": "off",
}  # fmt: skip


def read(text: str) -> tuple[argparse.Namespace, set[str]]:
    """Options and typed names of a command line."""
    return parse(argparse.ArgumentParser(parents=[get_args_parser()]), text.split())


def test_defaults_are_those_of_detr():
    args, typed = read("")
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS and typed == set()


def test_every_option_has_a_help_text():
    assert all(action.help for action in get_args_parser()._actions)


def test_options_typed_at_their_defaults_count_as_typed():
    args, typed = read("-m dn_dab_detr --use_dn --enc_layers 6 --cfgs [[[152, 416]], [[8, 8, 8]]] --eval --amp")
    assert typed == {"modelname", "use_dn", "enc_layers", "cfgs", "eval", "amp"} and args.amp == "bf16"
    assert Widths.parse(args.cfgs).encoder == ((152, 416),)
    assert not read("--no-use_dn")[0].use_dn


@pytest.mark.parametrize(
    "text", ["--batch_size 0", "--dropout 1", "--lr -1", "--backbone vgg", "--epochs 1.5", "--nope"]
)
def test_values_out_of_range_are_one_sentence_and_exit_code_2(text, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: read(text))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert text.split()[0] in lines[0]


def checkpoint(widths: Widths, **arguments) -> Checkpoint:
    """A checkpoint with these options and no weights."""
    return Checkpoint("a.pth", "ours", {}, widths, None, 4, arguments)


def test_architecture_comes_from_the_checkpoint_and_the_rest_only_on_going_on():
    stored = {
        "enc_layers": 1,
        "dec_layers": 1,
        "image_size": 96,
        "lr": 1.0,
        "epochs": 7,
        "batch_size": 9,
        "output_dir": "x",
    }
    for continuing, lr, epochs in ((False, 1e-4, 50), (True, 1.0, 7)):
        args, typed = read("--batch_size 3")
        take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 1, 256, 2048), **stored), continuing=continuing)
        assert (args.enc_layers, args.image_size, args.lr, args.epochs, args.batch_size) == (1, 96, lr, epochs, 3)
        assert args.cfgs is None and args.output_dir != "x"


def test_typed_preferences_win_and_a_typed_architecture_must_agree():
    args, typed = read("--image_size 640 --enc_layers 1")
    take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 6, 256, 2048), enc_layers=1, image_size=96))
    assert args.image_size == 640
    args, typed = read("--enc_layers 6")
    with pytest.raises(UserError, match=r"--enc_layers 6: a\.pth was made with 1"):
        take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 6, 256, 2048), enc_layers=1))


def test_the_padding_rule_comes_with_the_checkpoint_unless_it_is_typed():
    one_layer = {"enc_layers": 1, "dec_layers": 1}
    for typed_words, stored, expected in (
        ("", {}, "exact"),
        ("", {"padding_rule": "reference"}, "reference"),
        ("--padding_rule exact", {"padding_rule": "reference"}, "exact"),
        ("--padding_rule reference", {}, "reference"),
    ):
        args, typed = read(typed_words)
        take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 1, 256, 2048), **one_layer, **stored))
        assert args.padding_rule == expected


def test_the_bound_of_anchors_comes_with_the_checkpoint_and_is_dn_detrs_where_it_tells_none():
    one_layer = {"enc_layers": 1, "dec_layers": 1}
    for stored, expected in ({}, 1e-3), ({"anchor_eps": 1e-5}, 1e-5):
        args, typed = read("")
        take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 1, 256, 2048), **one_layer, **stored))
        assert args.anchor_eps == expected
        args, typed = read("--anchor_eps 1e-4")
        with pytest.raises(UserError, match=f"anchor_eps 0.0001: a.pth was made with {expected}"):
            take_from_checkpoint(args, typed, checkpoint(Widths.dense(1, 1, 256, 2048), **one_layer, **stored))


def test_a_build_with_slim_names_is_built_so_again():
    full = Widths.dense(6, 6, 256, 2048)
    for stored, cfgs in ((full.to_list(), full), (None, None)):
        args, typed = read("")
        take_from_checkpoint(args, typed, checkpoint(full, cfgs=stored))
        assert args.cfgs == cfgs


def test_widths_of_a_slim_checkpoint_are_taken_and_checked():
    slim = Widths.parse([[[16, 64]], [[8, 8, 8]]])
    args, typed = read("--enc_layers 1 --dec_layers 1")
    take_from_checkpoint(args, typed, checkpoint(slim))
    assert args.cfgs == slim
    for text in ("--enc_layers 1 --dec_layers 2", "--enc_layers 1 --dec_layers 1 --nheads 32"):
        with pytest.raises(UserError, match=r"^a\.pth: found"):
            take_from_checkpoint(*read(text), checkpoint(slim))
