"""The deformable variant of DN-DETR."""

from argparse import Namespace

from models.backbone import Backbone
from models.denoising import DenoisingSettings
from models.dn_dab_deformable_detr.detector import NORM_GROUPS, DnDabDeformableDetr
from models.widths import Widths
from util.errors import UserError


def build(
    args: Namespace, widths: Widths | None, backbone: Backbone, denoising: DenoisingSettings | None
) -> DnDabDeformableDetr:
    """Build the detector described by `args`, with ReLU and a position encoding of temperature 10000.

    Raises:
        UserError: an option has an unsupported value.
    """
    if args.hidden_dim % NORM_GROUPS:
        raise UserError(f"--hidden_dim: found {args.hidden_dim}, expected a multiple of {NORM_GROUPS}")
    if args.num_patterns:
        raise UserError(f"--num_patterns: found {args.num_patterns}, expected 0 for {args.modelname}")
    stages = int(args.return_layer.removeprefix("layer")) - 1
    if args.num_feature_levels < stages:
        raise UserError(
            f"--num_feature_levels: found {args.num_feature_levels}, expected at least {stages}, one for each stage "
            f"from layer2 to {args.return_layer} (--return_layer)"
        )
    return DnDabDeformableDetr(
        backbone,
        widths or Widths.dense(args.enc_layers, args.dec_layers, args.hidden_dim, args.dim_feedforward),
        num_classes=args.num_classes,
        hidden_dim=args.hidden_dim,
        nheads=args.nheads,
        num_queries=args.num_queries,
        num_levels=args.num_feature_levels,
        encoder_points=args.enc_n_points,
        decoder_points=args.dec_n_points,
        dropout=args.dropout,
        anchor_eps=args.anchor_eps,
        denoising=denoising,
        padding_rule=getattr(args, "padding_rule", "exact"),
    )
