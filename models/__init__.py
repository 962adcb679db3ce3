"""Detectors and how to build them from command-line arguments."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

from models import dn_dab_deformable_detr, dn_dab_detr
from models.backbone import Backbone
from models.criterion import Criterion
from models.denoising import DenoisingSettings
from models.detector import Detector
from models.matcher import HungarianMatcher
from models.post_process import PostProcess
from models.residual import block_widths
from models.widths import Widths
from util.errors import UserError

MODELS: dict[str, Callable[[Namespace, Widths | None, Backbone, DenoisingSettings | None], Detector]] = {
    "dn_dab_detr": dn_dab_detr.build,
    "dn_dab_deformable_detr": dn_dab_deformable_detr.build,
}
# For the log; the deformable variant's releases never had them.
LOGS_BOX_PARTS = ("dn_dab_detr",)


def full_widths(args: Namespace, with_backbone: bool = False) -> Widths:
    """Return the widths before any pruning, with those of the backbone's blocks if `with_backbone`."""
    widths = Widths.dense(args.enc_layers, args.dec_layers, args.hidden_dim, args.dim_feedforward)
    return replace(widths, backbone=block_widths(args.backbone, args.return_layer)) if with_backbone else widths


def check_widths(widths: Widths, args: Namespace) -> Widths:
    """Check widths against the unpruned detector that the arguments describe; see `Widths.check`."""
    blocks = block_widths(args.backbone, args.return_layer)
    return widths.check(nheads=args.nheads, full=full_widths(args), blocks=blocks)


def build_model(args: Namespace) -> tuple[Detector, Criterion, dict[str, PostProcess]]:
    """Model, criterion and postprocessors for the arguments of `main.get_args_parser`.

    `args.num_classes` is set from the annotations or the checkpoint. `args.cfgs` is None for a dense detector, or its
    widths as a `Widths` or as anything that `Widths.parse` takes, such as a nested list.

    Raises:
        UserError: where options do not fit together.
    """
    for option, divisor in (("hidden_dim", args.nheads), ("hidden_dim", 4)):
        if getattr(args, option) % divisor:
            raise UserError(f"--{option}: found {getattr(args, option)}, expected a multiple of {divisor}")
    widths = args.cfgs if isinstance(args.cfgs, Widths | None) else Widths.parse(args.cfgs)
    if widths is not None:
        widths = check_widths(widths, args)
    backbone = Backbone(
        args.backbone,
        args.return_layer,
        args.dilation,
        args.batch_norm_type,
        args.pretrained_backbone,
        frozen=args.lr_backbone == 0,
        widths=None if widths is None else widths.backbone,
    )
    denoising = DenoisingSettings(args.scalar, args.label_noise_scale, args.box_noise_scale) if args.use_dn else None
    model = MODELS[args.modelname](args, widths, backbone, denoising)
    matcher = HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, args.focal_alpha)
    weights = {
        "loss_ce": args.cls_loss_coef,
        "loss_bbox": args.bbox_loss_coef,
        "loss_giou": args.giou_loss_coef,
    }
    criterion = Criterion(
        matcher, args.dec_layers, weights, args.focal_alpha, log_box_parts=args.modelname in LOGS_BOX_PARTS
    )
    return model, criterion, {"bbox": PostProcess(args.num_select)}
