"""The dense variant of DN-DETR."""

from argparse import Namespace

from models.backbone import Backbone
from models.denoising import DenoisingSettings
from models.dn_dab_detr.detector import DnDabDetr
from models.widths import Widths


def build(args: Namespace, widths: Widths | None, backbone: Backbone, denoising: DenoisingSettings | None) -> DnDabDetr:
    """Build the detector described by `args`."""
    return DnDabDetr(
        backbone,
        widths or Widths.dense(args.enc_layers, args.dec_layers, args.hidden_dim, args.dim_feedforward),
        num_classes=args.num_classes,
        hidden_dim=args.hidden_dim,
        nheads=args.nheads,
        num_queries=args.num_queries,
        num_patterns=args.num_patterns,
        activation=args.transformer_activation,
        dropout=args.dropout,
        anchor_eps=args.anchor_eps,
        slim_names=widths is not None,
        temperatures=(args.pe_temperatureH, args.pe_temperatureW),
        denoising=denoising,
        padding_rule=getattr(args, "padding_rule", "exact"),
    )
