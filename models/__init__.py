"""Detectors and how to build them."""

from argparse import Namespace
from collections.abc import Callable

from models.backbone import Backbone
from models.config import DenoisingConfig, DetectorConfig, LossConfig, TrainedDetectorConfig
from models.criterion import Criterion
from models.denoising_queries import DenoisingSettings
from models.detector import Detector
from models.dn_dab_deformable_detr.detector import DnDabDeformableDetr
from models.dn_dab_detr.detector import DnDabDetr
from models.matcher import HungarianMatcher
from models.post_process import PostProcess
from util.errors import UserError, shorten

MODELS: dict[str, Callable[[DetectorConfig, Backbone, DenoisingSettings | None], Detector]] = {
    "dn_dab_detr": DnDabDetr,
    "dn_dab_deformable_detr": DnDabDeformableDetr,
}
# For the log; releases of the deformable variant never had them.
LOGS_BOX_PARTS = ("dn_dab_detr",)


def build_model(args: Namespace) -> tuple[Detector, Criterion, dict[str, PostProcess]]:
    """Build model, criterion and postprocessors for the arguments of `main.get_args_parser`.

    `args.num_classes` is set from the annotations or the checkpoint. `args.cfgs` is None for a dense detector, or
    anything that `Widths.parse` accepts, such as `Widths` or a nested list.

    Raises:
        UserError: where options do not fit together.
    """
    values = vars(args)
    return build(
        TrainedDetectorConfig.from_values(values),
        LossConfig.from_values(values),
        DenoisingConfig.from_values(values),
        freeze_backbone=getattr(args, "lr_backbone", None) == 0,
    )


def build(
    config: DetectorConfig,
    losses: LossConfig | None = None,
    denoising: DenoisingConfig | None = None,
    *,
    freeze_backbone: bool = False,
) -> tuple[Detector, Criterion, dict[str, PostProcess]]:
    """Build model, criterion and postprocessors; without `denoising` the model has no denoising queries.

    Raises:
        UserError: where options do not fit together.
    """
    if type(config.num_classes) is not int or config.num_classes < 1:
        raise UserError(f"num_classes: found {shorten(config.num_classes)}, expected the largest category id + 1")
    for divisor in (config.nheads, 4):
        if config.hidden_dim % divisor:
            raise UserError(f"--hidden_dim: found {config.hidden_dim}, expected a multiple of {divisor}")
    backbone = Backbone(
        config.backbone,
        config.return_layer,
        config.dilation,
        config.batch_norm_type,
        config.pretrained_backbone,
        frozen=freeze_backbone,
        widths=config.widths.backbone,
    )
    settings = None
    if denoising is not None and denoising.use_dn:
        settings = DenoisingSettings(denoising.scalar, denoising.label_noise_scale, denoising.box_noise_scale)
    model = MODELS[config.modelname](config, backbone, settings)
    losses = losses or LossConfig()
    matcher = HungarianMatcher(losses.set_cost_class, losses.set_cost_bbox, losses.set_cost_giou, losses.focal_alpha)
    weights = {
        "loss_ce": losses.cls_loss_coef,
        "loss_bbox": losses.bbox_loss_coef,
        "loss_giou": losses.giou_loss_coef,
    }
    criterion = Criterion(
        matcher, config.dec_layers, weights, losses.focal_alpha, log_box_parts=config.modelname in LOGS_BOX_PARTS
    )
    return model, criterion, {"bbox": PostProcess(config.num_select)}
