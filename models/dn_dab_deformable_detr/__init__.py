"""The deformable variant of DN-DETR."""

from models.backbone import Backbone
from models.config import DetectorConfig
from models.denoising import DenoisingSettings
from models.dn_dab_deformable_detr.detector import NORM_GROUPS, DnDabDeformableDetr
from util.errors import UserError


def build(config: DetectorConfig, backbone: Backbone, denoising: DenoisingSettings | None) -> DnDabDeformableDetr:
    """Build the detector described by `config`, with ReLU and a position encoding of temperature 10000.

    Raises:
        UserError: an option has an unsupported value.
    """
    if config.hidden_dim % NORM_GROUPS:
        raise UserError(f"--hidden_dim: found {config.hidden_dim}, expected a multiple of {NORM_GROUPS}")
    if config.num_patterns:
        raise UserError(f"--num_patterns: found {config.num_patterns}, expected 0 for {config.modelname}")
    stages = int(config.return_layer.removeprefix("layer")) - 1
    if config.num_feature_levels < stages:
        raise UserError(
            f"--num_feature_levels: found {config.num_feature_levels}, expected at least {stages}, one for each stage "
            f"from layer2 to {config.return_layer} (--return_layer)"
        )
    return DnDabDeformableDetr(
        backbone,
        config.widths,
        num_classes=config.num_classes,
        hidden_dim=config.hidden_dim,
        nheads=config.nheads,
        num_queries=config.num_queries,
        num_levels=config.num_feature_levels,
        encoder_points=config.enc_n_points,
        decoder_points=config.dec_n_points,
        dropout=config.dropout,
        anchor_eps=config.anchor_eps,
        denoising=denoising,
        padding_rule=config.padding_rule,
    )
