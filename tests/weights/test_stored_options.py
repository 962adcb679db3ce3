"""Options: their names and defaults, and which of them a checkpoint supplies."""

import pytest

from main import get_args_parser
from models.widths import Widths
from runs.config import TrainingOptions
from util.cli import options_of, parse
from util.errors import UserError, run_cli
from weights.checkpoint_file import read_checkpoint
from weights.formats import Checkpoint
from weights.stored_options import take_from_checkpoint

DEFAULTS = {
    "lr": 1e-4, "lr_backbone": 1e-5, "weight_decay": 1e-4, "clip_max_norm": 0.1, "enc_layers": 6, "dec_layers": 6,
    "dim_feedforward": 2048, "hidden_dim": 256, "nheads": 8, "num_queries": 300, "num_select": 300,
    "set_cost_class": 2, "set_cost_bbox": 5, "set_cost_giou": 2, "cls_loss_coef": 1, "bbox_loss_coef": 5,
    "giou_loss_coef": 2, "focal_alpha": 0.25, "scalar": 5, "label_noise_scale": 0.2, "box_noise_scale": 0.4,
    "pe_temperatureH": 20, "pe_temperatureW": 20, "transformer_activation": "prelu", "dropout": 0, "epochs": 50,
    "lr_drop": 40, "num_patterns": 0, "backbone": "resnet50", "seed": 42, "use_dn": True, "amp": "off",
}  # fmt: skip


def read(text: str) -> tuple[TrainingOptions, set[str]]:
    """Options and typed names of a command line."""
    args, typed = parse(get_args_parser(), text.split())
    return TrainingOptions.from_values(vars(args)), typed


def taken(text: str, checkpoint: Checkpoint, **more: bool) -> dict:
    """All options by name, after the checkpoint's were applied."""
    return take_from_checkpoint(*read(text), checkpoint, **more).values()


def test_defaults_are_those_of_detr():
    args, typed = parse(get_args_parser(), [])
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS and typed == set()
    assert TrainingOptions().values() == TrainingOptions.from_values(vars(args)).values()


def test_every_option_has_a_help_text():
    assert all(action.help for action in get_args_parser()._actions)


def test_options_typed_at_their_defaults_count_as_typed():
    options, typed = read("-m dn_dab_detr --use_dn --enc_layers 6 --cfgs [[[152, 416]], [[8, 8, 8]]] --eval --amp")
    assert typed == {"modelname", "use_dn", "enc_layers", "cfgs", "eval", "amp"} and options.run.amp == "bf16"
    assert options.detector.cfgs.encoder == ((152, 416),)
    assert not read("--no-use_dn")[0].denoising.use_dn


@pytest.mark.parametrize(
    "text", ["--batch_size 0", "--dropout 1", "--lr -1", "--backbone vgg", "--epochs 1.5", "--nope"]
)
def test_values_out_of_range_are_a_one_line_error_with_exit_code_2(text, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: read(text))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert text.split()[0] in lines[0]


def checkpoint(widths: Widths, **arguments) -> Checkpoint:
    """A checkpoint with these options and no weights."""
    return Checkpoint("a.pth", "ours", {}, widths, None, 4, arguments)


def test_the_checkpoint_supplies_the_architecture_and_all_else_only_when_resuming():
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
        source = checkpoint(Widths.dense(1, 1, 256, 2048), **stored)
        found = taken("--batch_size 3", source, continuing=continuing)
        expected = {"enc_layers": 1, "image_size": 96, "lr": lr, "epochs": epochs, "batch_size": 3, "cfgs": None}
        assert found == {**found, **expected} and found["output_dir"] != "x"


def test_typed_preferences_take_precedence_and_a_typed_architecture_must_agree():
    widths = Widths.dense(1, 6, 256, 2048)
    found = taken("--image_size 640 --enc_layers 1", checkpoint(widths, enc_layers=1, image_size=96))
    assert found["image_size"] == 640
    with pytest.raises(UserError, match=r"--enc_layers 6: a\.pth was made with 1"):
        taken("--enc_layers 6", checkpoint(widths, enc_layers=1))


def test_the_padding_rule_comes_with_the_checkpoint_unless_it_is_typed():
    one_layer = {"enc_layers": 1, "dec_layers": 1}
    for typed_words, stored, expected in (
        ("", {}, "exact"),
        ("", {"padding_rule": "reference"}, "reference"),
        ("--padding_rule exact", {"padding_rule": "reference"}, "exact"),
        ("--padding_rule reference", {}, "reference"),
    ):
        found = taken(typed_words, checkpoint(Widths.dense(1, 1, 256, 2048), **one_layer, **stored))
        assert found["padding_rule"] == expected


def test_anchor_eps_comes_from_the_checkpoint_or_is_that_of_dn_detr():
    one_layer = {"enc_layers": 1, "dec_layers": 1}
    for stored, expected in ({}, 1e-3), ({"anchor_eps": 1e-5}, 1e-5):
        source = checkpoint(Widths.dense(1, 1, 256, 2048), **one_layer, **stored)
        assert taken("", source)["anchor_eps"] == expected
        with pytest.raises(UserError, match=f"anchor_eps 0.0001: a.pth was made with {expected}"):
            taken("--anchor_eps 1e-4", source)


def test_slim_names_are_kept_when_a_checkpoint_is_loaded():
    full = Widths.dense(6, 6, 256, 2048)
    for stored, cfgs in ((full.to_list(), full), (None, None)):
        assert taken("", checkpoint(full, cfgs=stored))["cfgs"] == cfgs


def test_widths_of_a_slim_checkpoint_are_taken_and_checked():
    slim = Widths.parse([[[16, 64]], [[8, 8, 8]]])
    assert taken("--enc_layers 1 --dec_layers 1", checkpoint(slim))["cfgs"] == slim
    for text in ("--enc_layers 1 --dec_layers 2", "--enc_layers 1 --dec_layers 1 --nheads 32"):
        with pytest.raises(UserError, match=r"^a\.pth: found"):
            taken(text, checkpoint(slim))


def test_a_checkpoint_of_an_older_version_passes_the_checks():
    source = read_checkpoint("checkpoints/demo.pth")
    found = taken("", source, continuing=True)
    known = options_of(TrainingOptions)
    expected = {name: value for name, value in source.arguments.items() if name in known}
    assert len(expected) > 40 and found == {**found, **{
        name: value for name, value in expected.items() if known[name].metadata["stored"] != "run"
    }}  # fmt: skip
    assert found["hidden_dim"] == source.arguments["hidden_dim"] and found["cfgs"] is None
