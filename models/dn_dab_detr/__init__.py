"""The dense variant of DN-DETR."""

from models.backbone import Backbone
from models.config import DetectorConfig
from models.denoising import DenoisingSettings
from models.dn_dab_detr.detector import DnDabDetr


def build(config: DetectorConfig, backbone: Backbone, denoising: DenoisingSettings | None) -> DnDabDetr:
    """Build the detector described by `config`."""
    return DnDabDetr(
        backbone,
        config.widths,
        num_classes=config.num_classes,
        hidden_dim=config.hidden_dim,
        nheads=config.nheads,
        num_queries=config.num_queries,
        num_patterns=config.num_patterns,
        activation=config.transformer_activation,
        dropout=config.dropout,
        anchor_eps=config.anchor_eps,
        slim_names=config.cfgs is not None,
        temperatures=(config.pe_temperatureH, config.pe_temperatureW),
        denoising=denoising,
        padding_rule=config.padding_rule,
    )
