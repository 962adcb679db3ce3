"""The options that scripts share, in groups, and the parser of main.py, which has all of them."""

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import engine
from datasets.transforms import TRAINING_TRANSFORMS
from models.layers import ANCHOR_EPS
from models.padding import PADDING_RULES
from util.cli import real, whole
from util.errors import UserError
from util.learning_rate import SCHEDULES

MODEL_NAMES = ("dn_dab_detr", "dn_dab_deformable_detr")
DATA_OPTIONS = ("train_json", "val_json", "train_images", "val_images")
NETWORK_TITLE = "network; it comes out of a checkpoint of this program"
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

_PRECISIONS: dict[str, Any] = {"nargs": "?", "choices": tuple(engine.AMP_DTYPES), "const": "bf16", "default": "off"}


def get_args_parser() -> argparse.ArgumentParser:
    """All options of main.py, without --help; the other scripts add those of the groups below that they read."""
    parser = argparse.ArgumentParser("DN-DETR", add_help=False, allow_abbrev=False)
    run = parser.add_argument_group("run")
    add_folder_options(run)
    add_start_options(run)
    add_safetensors_option(run)
    add_device_options(run, "mixed precision of training; --amp alone is bf16")
    add_evaluation_precision_option(
        run, "mixed precision of evaluation, while training too; off is float32, whatever --amp says"
    )
    add_seed_option(run)
    data = parser.add_argument_group("data")
    add_data_set_options(data)
    add_loader_options(data)
    log = parser.add_argument_group("log")
    add_print_option(log)
    add_board_option(log)
    network = parser.add_argument_group(NETWORK_TITLE)
    add_network_options(network)
    add_position_options(network)
    add_padding_option(network)
    add_output_options(network)
    add_initial_options(network)
    denoising = parser.add_argument_group("denoising and losses")
    add_denoising_option(denoising, "train with denoising queries")
    add_noise_options(denoising)
    add_loss_options(denoising)
    add_training_options(parser.add_argument_group("training"))
    add_distillation_options(parser.add_argument_group("distillation"))
    return parser


def option_names(*groups: Callable[[argparse._ActionsContainer], None]) -> list[str]:
    """Names of the options that the functions below add."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in groups:
        add(parser)
    return list(vars(parser.parse_args([])))


def add_folder_options(group: argparse._ActionsContainer) -> None:
    """Where a script writes, and the checkpoint that it reads."""
    group.add_argument(
        "--output_dir",
        type=os.path.expanduser,
        metavar="FOLDER",
        default="output/run",
        help="for checkpoints, results, logs and report.html, which `python -m reports FOLDER` makes anew",
    )
    group.add_argument(
        "--resume",
        type=os.path.expanduser,
        metavar="FILE",
        default=None,
        help="checkpoint to start from, of any format the README lists",
    )


def add_start_options(group: argparse._ActionsContainer) -> None:
    """What main.py does with the checkpoint."""
    group.add_argument(
        "--start_fresh",
        action="store_true",
        help="take only the weights of --resume, even if its training is unfinished",
    )
    group.add_argument(
        "--finetune_ignore",
        nargs="+",
        metavar="KEY",
        default=None,
        help="begin anew with the weights of --resume that have one of these in their names",
    )
    group.add_argument("--eval", action="store_true", help="evaluate on val2017 and stop")
    group.add_argument(
        "--save_results", action="store_true", help="write the detections on val2017 as COCO results JSON"
    )


def add_safetensors_option(group: argparse._ActionsContainer) -> None:
    """For scripts that write checkpoints."""
    group.add_argument(
        "--save_safetensors",
        action="store_true",
        help="write the weights of each checkpoint as .safetensors beside it, too, which --resume also reads",
    )


def add_device_options(group: argparse._ActionsContainer, amp_help: str) -> None:
    """Device, and the precision that `amp_help` describes."""
    group.add_argument("--device", default=None, help="cpu, cuda or cuda:N, by default cuda where there is one")
    group.add_argument("--amp", **_PRECISIONS, help=amp_help)


def add_evaluation_precision_option(group: argparse._ActionsContainer, help_text: str) -> None:
    """For scripts that print an AP."""
    group.add_argument("--eval_amp", **_PRECISIONS, help=help_text)


def add_seed_option(group: argparse._ActionsContainer) -> None:
    """For scripts that draw at random."""
    group.add_argument("--seed", type=whole(0, at_most=2**31), default=42, help="seed of every random generator")


def add_data_set_options(group: argparse._ActionsContainer) -> None:
    """The annotated images."""
    group.add_argument(
        "--coco_path", type=os.path.expanduser, metavar="FOLDER", default="data/coco", help="a data set in COCO layout"
    )
    add_split_options(group)


def add_loader_options(group: argparse._ActionsContainer) -> None:
    """How images are read."""
    group.add_argument("--batch_size", type=whole(1), default=2, help="images in a batch of one process")
    group.add_argument("--num_workers", type=whole(0), default=2, help="processes that read images, 0 for none")
    group.add_argument(
        "--image_size", type=whole(32, at_most=16384), default=800, help="short side at evaluation, in pixels"
    )


def add_print_option(group: argparse._ActionsContainer) -> None:
    """For training."""
    group.add_argument(
        "--print_freq",
        type=whole(0),
        default=100,
        help="training batches between lines of the log with losses, rate and time left; 0 for a progress bar alone",
    )


def add_board_option(group: argparse._ActionsContainer) -> None:
    """For training and searches."""
    group.add_argument(
        "--tensorboard", action="store_true", help="write losses, rates, AP and widths to OUTPUT_DIR/tensorboard"
    )


def add_split_options(group: argparse._ActionsContainer) -> None:
    """The options that take the place of parts of the COCO layout; `datasets.coco.split_of` reads them."""
    for prefix in ("train", "val"):
        group.add_argument(f"--{prefix}_json", type=os.path.expanduser, metavar="FILE", default=None,
                           help=f"COCO annotations in place of annotations/instances_{prefix}2017.json")  # fmt: skip
        group.add_argument(f"--{prefix}_images", type=os.path.expanduser, metavar="FOLDER", default=None,
                           help=f"images in place of those in {prefix}2017")  # fmt: skip


def add_network_options(group: argparse._ActionsContainer) -> None:
    """What decides the shapes of the network, its parameters and its operations."""
    group.add_argument("-m", "--modelname", choices=MODEL_NAMES, default="dn_dab_detr", help="variant")
    group.add_argument(
        "--cfgs", nargs="+", default=None, help="widths [[[attention, ffn], ...], [[self, cross, ffn], ...]] or a file"
    )
    group.add_argument("--enc_layers", type=whole(1), default=6, help="encoder layers")
    group.add_argument("--dec_layers", type=whole(1), default=6, help="decoder layers")
    group.add_argument(
        "--dim_feedforward", type=whole(1), default=2048, help="hidden channels of an FFN before pruning"
    )
    group.add_argument("--hidden_dim", type=whole(8), default=256, help="channels of the transformer")
    group.add_argument("--nheads", type=whole(1), default=8, help="attention heads")
    group.add_argument("--num_queries", type=whole(1), default=300, help="matching queries")
    group.add_argument("--num_patterns", type=whole(0), default=0, help="patterns for each anchor, 0 for none")
    group.add_argument(
        "--num_feature_levels", type=whole(1, at_most=12), default=4, help="levels of the features, deformable variant"
    )
    group.add_argument("--enc_n_points", type=whole(1), default=4, help="points read on each level, deformable encoder")
    group.add_argument("--dec_n_points", type=whole(1), default=4, help="points read on each level, deformable decoder")
    group.add_argument("--transformer_activation", choices=("prelu", "relu"), default="prelu", help="of the FFNs")
    group.add_argument("--backbone", choices=BACKBONES, default="resnet50", help="ResNet of torchvision")
    group.add_argument("--dilation", action="store_true", help="dilate layer4 in place of its stride")
    group.add_argument(
        "--return_layer", choices=("layer3", "layer4"), default="layer4", help="stage that feeds the transformer"
    )
    group.add_argument(
        "--batch_norm_type",
        choices=("FrozenBatchNorm2d", "BatchNorm2d"),
        default="FrozenBatchNorm2d",
        help="batch norm of the backbone; one trained from scratch needs BatchNorm2d",
    )


def add_padding_option(group: argparse._ActionsContainer) -> None:
    """How images of different sizes share a batch."""
    group.add_argument(
        "--padding_rule",
        choices=PADDING_RULES,
        default="exact",
        help="of images of different sizes in a batch. exact: an image gets the same boxes alone and in any batch; "
        "reference: pad as DN-DETR's code does, where boxes depend on the batch",
    )


def add_position_options(group: argparse._ActionsContainer) -> None:
    """What decides values inside the network, but no shape."""
    group.add_argument(
        "--pe_temperatureH", type=real(1e-6), default=20, help="temperature of the position's sine, height"
    )
    group.add_argument(
        "--pe_temperatureW", type=real(1e-6), default=20, help="temperature of the position's sine, width"
    )
    group.add_argument(
        "--anchor_eps",
        type=real(1e-12, 0.5),
        default=ANCHOR_EPS,
        help="least coordinate of an anchor, and least distance from 1, whose logit is taken; transformers' DAB-DETR "
        "has 1e-5, which comes with its weights",
    )


def add_output_options(group: argparse._ActionsContainer) -> None:
    """What is made of the network's outputs."""
    group.add_argument("--num_select", type=whole(1), default=300, help="detections kept for an image")


def add_initial_options(group: argparse._ActionsContainer) -> None:
    """Weights without a checkpoint, and what only training does in the network."""
    group.add_argument("--dropout", type=real(0, 1), default=0.0, help="fraction dropped in the transformer")
    group.add_argument(
        "--pretrained_backbone",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ImageNet weights; not used with --resume",
    )


def add_denoising_option(group: argparse._ActionsContainer, help_text: str) -> None:
    """Whether there are denoising queries."""
    group.add_argument("--use_dn", action=argparse.BooleanOptionalAction, default=True, help=help_text)


def add_noise_options(group: argparse._ActionsContainer) -> None:
    """The denoising queries."""
    group.add_argument("--scalar", type=whole(1), default=5, help="denoising groups, copies of every target")
    group.add_argument(
        "--label_noise_scale", type=real(0, at_most=1), default=0.2, help="probability that a label flips"
    )
    group.add_argument("--box_noise_scale", type=real(0), default=0.4, help="box noise, in half widths and heights")


def add_loss_options(group: argparse._ActionsContainer) -> None:
    """The matching and the losses."""
    group.add_argument("--set_cost_class", type=real(0), default=2, help="weight of the class in the matching")
    group.add_argument("--set_cost_bbox", type=real(0), default=5, help="weight of the L1 distance in the matching")
    group.add_argument("--set_cost_giou", type=real(0), default=2, help="weight of the GIoU in the matching")
    group.add_argument("--cls_loss_coef", type=real(0), default=1, help="weight of the focal loss")
    group.add_argument("--bbox_loss_coef", type=real(0), default=5, help="weight of the L1 loss")
    group.add_argument("--giou_loss_coef", type=real(0), default=2, help="weight of the GIoU loss")
    group.add_argument("--focal_alpha", type=real(0, at_most=1), default=0.25, help="focal weight of the positives")


def add_training_options(group: argparse._ActionsContainer) -> None:
    """Epochs, learning rates and the optimizer."""
    group.add_argument(
        "--augmentation",
        choices=tuple(TRAINING_TRANSFORMS),
        default="detr",
        help="of training images: DETR's flips, scales and crops, or flips alone at --image_size",
    )
    group.add_argument("--epochs", type=whole(1), default=50, help="epochs")
    group.add_argument("--lr", type=real(0), default=1e-4, help="learning rate")
    group.add_argument(
        "--lr_backbone",
        type=real(0),
        default=1e-5,
        help="learning rate of the backbone; 0 freezes it, with the statistics of its batch norms",
    )
    group.add_argument("--lr_schedule", choices=SCHEDULES, default="step", help="drop to a tenth, or half cosine")
    group.add_argument("--lr_drop", type=whole(1), default=40, help="epochs between the drops")
    group.add_argument("--warmup_iters", type=whole(0), default=0, help="optimizer steps of linear warm-up")
    group.add_argument("--weight_decay", type=real(0), default=1e-4, help="weight decay of AdamW")
    group.add_argument("--clip_max_norm", type=real(0), default=0.1, help="largest gradient norm, 0 for no clipping")
    group.add_argument("--accumulate", type=whole(1), default=1, help="batches for an optimizer step")
    group.add_argument("--ema_decay", type=real(0, 1), default=0.0, help="decay of the averaged weights, 0 for none")
    group.add_argument("--eval_every", type=whole(1), default=1, help="epochs between evaluations")


def add_distillation_options(group: argparse._ActionsContainer) -> None:
    """Training towards a teacher."""
    group.add_argument(
        "--distill",
        type=os.path.expanduser,
        metavar="TEACHER",
        default=None,
        help="train towards this detector's outputs, too: path of the checkpoint that a search pruned to get the "
        "detector under training; a search's own output is refused, for its weights need not be that detector's",
    )
    group.add_argument(
        "--distill_logits_coef", type=real(0), default=1, help="weight of the loss towards the teacher's logits"
    )
    group.add_argument(
        "--distill_boxes_coef",
        type=real(0),
        default=1,
        help="weight of the losses towards the teacher's boxes, in units of --bbox_loss_coef and --giou_loss_coef",
    )
    group.add_argument(
        "--distill_memory_coef", type=real(0), default=1, help="weight of the loss towards the encoder's output"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Parse `argv`; returns the options and the names of those that were typed, whatever their value.

    Options of main.py that `parser` does not have are there with their defaults, as `build_model` and others read them.

    Raises:
        UserError: what argparse would print below its whole usage.
    """
    parser.error = _refuse
    args = parser.parse_args(argv)
    silent = copy.deepcopy(parser)
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    typed = set(vars(silent.parse_args(argv)))
    return argparse.Namespace(**{**vars(get_args_parser().parse_args([])), **vars(args)}), typed


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")
