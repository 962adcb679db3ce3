"""Options of a detector, its losses and its denoising queries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from models.layers import ANCHOR_EPS
from models.padding import PADDING_RULES
from models.residual import block_widths
from models.widths import Widths
from util.cli import Config, option, real, refuse, whole

MODEL_NAMES = ("dn_dab_detr", "dn_dab_deformable_detr")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NETWORK_TITLE = "network; set by a checkpoint of this program"
# Options that are fixed in the other variant.
OF_DEFORMABLE = ("num_feature_levels", "enc_n_points", "dec_n_points")
OF_DENSE = ("pe_temperatureH", "pe_temperatureW")


@dataclass(frozen=True)
class NetworkConfig(Config):
    """Shapes, parameters and operations of the network; `cfgs` None means dense widths."""

    modelname: str = option("dn_dab_detr", "variant", short="-m", choices=MODEL_NAMES, stored="network")
    cfgs: Widths | None = option(None, nargs="+", read=Widths.parse, stored="run", help="widths [[[attention, ffn], "
        "...], [[self, cross, ffn], ...]] or a file; third list, [[block, ...], ...]: backbone stages")  # fmt: skip
    enc_layers: int = option(6, "encoder layers", type=whole(1), stored="network")
    dec_layers: int = option(6, type=whole(1), stored="network", help="decoder layers; fewer than a "
        "checkpoint has: its first ones")  # fmt: skip
    dim_feedforward: int = option(2048, "hidden channels of an FFN before pruning", type=whole(1), stored="network")
    hidden_dim: int = option(256, "channels of the transformer", type=whole(8), stored="network")
    nheads: int = option(8, "attention heads", type=whole(1), stored="network")
    num_queries: int = option(300, "matching queries", type=whole(1), stored="network")
    num_patterns: int = option(0, "patterns for each anchor, 0 for none", type=whole(0), stored="network")
    num_feature_levels: int = option(4, type=whole(1, at_most=12), stored="network", help="feature levels, "
        "deformable variant")  # fmt: skip
    enc_n_points: int = option(4, "sampling points per level, deformable encoder", type=whole(1), stored="network")
    dec_n_points: int = option(4, "sampling points per level, deformable decoder", type=whole(1), stored="network")
    transformer_activation: str = option("prelu", "activation of the FFNs", choices=("prelu", "relu"), stored="network")
    backbone: str = option("resnet50", "ResNet of torchvision", choices=BACKBONES, stored="network")
    dilation: bool = option(False, "dilate layer4 instead of striding", stored="network")
    return_layer: str = option("layer4", choices=("layer3", "layer4"), stored="network", help="stage that feeds the "
        "transformer")  # fmt: skip
    batch_norm_type: str = option("FrozenBatchNorm2d", choices=("FrozenBatchNorm2d", "BatchNorm2d"),
        stored="preferred", help="batch norm of the backbone; one trained from scratch needs BatchNorm2d")  # fmt: skip

    @property
    def matching_queries(self) -> int:
        """Number of queries that are matched to objects."""
        return self.num_queries * max(1, self.num_patterns)

    @property
    def full_widths(self) -> Widths:
        """Widths before any pruning, without those of the backbone's blocks."""
        return Widths.dense(self.enc_layers, self.dec_layers, self.hidden_dim, self.dim_feedforward)

    @property
    def full_widths_with_backbone(self) -> Widths:
        """Widths before any pruning, with those of the backbone's blocks."""
        return replace(self.full_widths, backbone=block_widths(self.backbone, self.return_layer))

    def check_widths(self, widths: Widths) -> Widths:
        """Check widths against the unpruned detector; see `Widths.check`."""
        blocks = block_widths(self.backbone, self.return_layer)
        return widths.check(nheads=self.nheads, full=self.full_widths, blocks=blocks)

    @property
    def widths(self) -> Widths:
        """Widths of the detector.

        Raises:
            UserError: `cfgs` do not fit the other options.
        """
        return self.full_widths if self.cfgs is None else self.check_widths(self.cfgs)


@dataclass(frozen=True)
class DetectorConfig(NetworkConfig):
    """Options that affect a detector's outputs.

    Attributes:
        dropout, pretrained_backbone: options only of main.py, see `TrainedDetectorConfig`.
        num_classes: largest category id + 1, from the annotations or the checkpoint; 0 until it is known.
        categories: their names by id, if known.
    """

    pe_temperatureH: float = option(20, "temperature of the sine encoding, height", type=real(1e-6), stored="network")
    pe_temperatureW: float = option(20, "temperature of the sine encoding, width", type=real(1e-6), stored="network")
    anchor_eps: float = option(ANCHOR_EPS, type=real(1e-12, 0.5), stored="network", help="lower limit in logits of an "
        "anchor's coordinate and its distance from 1; transformers' DAB-DETR has 1e-5, set by its weights")  # fmt: skip
    padding_rule: str = option("exact", choices=PADDING_RULES, stored="preferred", help="for images of different sizes "
        "in a batch. exact: an image gets the same boxes alone and in any batch; reference: pad as DN-DETR's code "
        "does, where boxes depend on the batch")  # fmt: skip
    num_select: int = option(300, "detections per image", type=whole(1), stored="preferred")
    dropout: float = 0.0
    pretrained_backbone: bool = False
    num_classes: int = 0
    categories: Mapping[int, str] | None = None


@dataclass(frozen=True)
class TrainedDetectorConfig(DetectorConfig):
    """A detector to train: dropout, and initial weights without a checkpoint."""

    dropout: float = option(0.0, "dropout in the transformer", type=real(0, 1))
    pretrained_backbone: bool = option(True, "ImageNet weights; not used with --resume")


@dataclass(frozen=True)
class LossConfig(Config):
    """Options of matching and losses."""

    set_cost_class: float = option(2, "weight of the class cost in the matching", type=real(0))
    set_cost_bbox: float = option(5, "weight of the L1 cost in the matching", type=real(0))
    set_cost_giou: float = option(2, "weight of the GIoU cost in the matching", type=real(0))
    cls_loss_coef: float = option(1, "weight of the focal loss", type=real(0))
    bbox_loss_coef: float = option(5, "weight of the L1 loss", type=real(0))
    giou_loss_coef: float = option(2, "weight of the GIoU loss", type=real(0))
    focal_alpha: float = option(0.25, "alpha of the focal loss, the weight of positives", type=real(0, at_most=1))


@dataclass(frozen=True)
class NoiseConfig(Config):
    """Options of the noise that turns targets into denoising queries."""

    scalar: int = option(5, "denoising groups, copies of every target", type=whole(1))
    label_noise_scale: float = option(0.2, "probability that a label flips", type=real(0, at_most=1))
    box_noise_scale: float = option(0.4, "box noise, in half widths and heights", type=real(0))


@dataclass(frozen=True)
class DenoisingConfig(NoiseConfig):
    """Options of denoising queries."""

    use_dn: bool = option(True, "train with denoising queries")


def refuse_unused_by_network(config: NetworkConfig, typed: Collection[str]) -> None:
    """Raise a `UserError` for typed options that the variant does not use."""
    if config.modelname == "dn_dab_detr":
        refuse(OF_DEFORMABLE, typed, "dn_dab_detr has one level and no points, expected dn_dab_deformable_detr (-m)")
    else:
        refuse(OF_DENSE, typed, f"{config.modelname} has the temperature 10000, expected dn_dab_detr (-m)")
        if config.transformer_activation != "relu":
            refuse(["transformer_activation"], typed, f"found prelu, expected relu, which {config.modelname} has")
    if config.dilation and config.return_layer != "layer4":
        refuse(["dilation"], typed, f"found --return_layer {config.return_layer}, expected layer4, which it dilates")
