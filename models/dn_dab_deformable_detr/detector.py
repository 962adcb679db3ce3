"""DN-DAB-Deformable-DETR: backbone, transformer over several levels, and heads, as a sequence of named steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.config import DetectorConfig
from models.denoising_queries import DenoisingSettings, ExtraQueries
from models.detector import Detector
from models.dn_dab_deformable_detr.attention import DeformableAttention
from models.dn_dab_deformable_detr.decoder import Decoder, DecoderLayer
from models.dn_dab_deformable_detr.encoder import Encoder, EncoderLayer
from models.dn_dab_deformable_detr.state import DeformableState, LevelSizes
from models.initialisation import initialise_detector
from models.layers import MLP, module_list
from models.position_encoding import pixel_encoding
from models.prunable import ParameterSlice
from models.state import Features, QueryFields
from util.errors import UserError

NORM_GROUPS = 32
TEMPERATURE = 10000
BOX_SIZE_BIAS = -2.0  # initial size logit of the first layer's boxes: about an eighth of the anchor's odds


class MapNorm(nn.GroupNorm):
    """Group normalisation of feature maps that also accepts groups of one value, which `nn.GroupNorm` rejects.

    Such a value becomes the bias. This happens with 32 channels on a map of one pixel, at any batch size.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a feature map, B x C x h x w."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Transformer(nn.Module):
    """Container of encoder, decoder and level embedding, for the names in the state dict."""

    def __init__(self, encoder: Encoder, decoder: Decoder, num_levels: int, hidden_dim: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(num_levels, hidden_dim))
        self.encoder = encoder
        self.decoder = decoder


class DnDabDeformableDetr(Detector):
    """The deformable variant of DN-DETR (arXiv 2203.01305, 2010.04159) with any widths.

    Args:
        config: options that affect its outputs. Convolutions of stride 2 compute the feature levels beyond those of the
            backbone.
        backbone: the backbone; each stage from layer2 to its last is a feature level.
        denoising: noise on targets in training; None trains without denoising queries.

    Raises:
        UserError: an option has an unsupported value.
    """

    transformer: Transformer
    query_embeddings = ("refpoint_embed", "tgt_embed")

    def __init__(self, config: DetectorConfig, backbone: Backbone, denoising: DenoisingSettings | None) -> None:
        _check_options(config)
        widths, hidden_dim, num_levels = config.widths, config.hidden_dim, config.num_feature_levels
        stages = [stage for stage in backbone.channels if stage != "layer1"]
        strides = [backbone.strides[stage] for stage in stages]
        super().__init__(
            widths,
            num_classes=config.num_classes,
            hidden_dim=hidden_dim,
            nheads=config.nheads,
            num_queries=config.num_queries,
            num_patterns=0,
            denoising=denoising,
            strides=[*strides, *(strides[-1] * 2**level for level in range(1, num_levels - len(stages) + 1))],
            image_multiple=strides[-1],
            padding_rule=config.padding_rule,
        )
        self.num_levels = num_levels
        self.points = {"encoder": config.enc_n_points, "decoder": config.dec_n_points}
        self.stages = stages
        common = (config.nheads, num_levels)
        self.bbox_embed = module_list(MLP(hidden_dim, hidden_dim, hidden_dim, 4) for _ in widths.decoder)
        self.transformer = Transformer(
            Encoder(
                [EncoderLayer(hidden_dim, w, *common, config.enc_n_points, config.dropout) for w in widths.encoder]
            ),
            Decoder(
                [DecoderLayer(hidden_dim, w, *common, config.dec_n_points, config.dropout) for w in widths.decoder],
                hidden_dim,
                self.bbox_embed,
                config.anchor_eps,
                anchors_on_padded_map=config.padding_rule == "reference",
            ),
            num_levels,
            hidden_dim,
        )
        self.class_embed = module_list(nn.Linear(hidden_dim, config.num_classes) for _ in widths.decoder)
        self.label_enc = nn.Embedding(config.num_classes + 1, hidden_dim - 1)
        self.tgt_embed = nn.Embedding(config.num_queries, hidden_dim - 1)
        self.refpoint_embed = nn.Embedding(config.num_queries, 4)
        self.input_proj = nn.ModuleList(
            _projections([backbone.channels[s] for s in self.stages], num_levels, hidden_dim)
        )
        # A list of one, because the keys in checkpoints begin with `backbone.0.body`.
        self.backbone = module_list([backbone])
        self._initialise()

    def _initialise(self) -> None:
        initialise_detector(self.transformer, self.class_embed, self.bbox_embed)
        nn.init.normal_(self.transformer.level_embed)
        nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], BOX_SIZE_BIAS)
        for module in self.transformer.modules():
            if isinstance(module, DeformableAttention):
                module.initialise_sampling()
        for convolution in self.input_proj.modules():
            if isinstance(convolution, nn.Conv2d) and convolution.bias is not None:
                nn.init.xavier_uniform_(convolution.weight)
                nn.init.zeros_(convolution.bias)

    def first_state(
        self, features: Features, targets: list[dict[str, Tensor]] | ExtraQueries | None = None
    ) -> DeformableState:
        """Add positions and queries to the features and return the input state of the first step."""
        dtype = features.memory.dtype
        positions = [
            pixel_encoding(padding, self.hidden_dim, TEMPERATURE, TEMPERATURE, shift=0.5, dtype=dtype) + embedding
            for padding, embedding in zip(features.paddings, self.transformer.level_embed, strict=True)
        ]
        mask = torch.cat([~padding.flatten(1) for padding in features.paddings], dim=1).unsqueeze(-1)
        return DeformableState(
            memory=features.memory,
            memory_pos=torch.cat(positions, dim=1),
            memory_mask=mask if features.is_padded else None,
            levels=LevelSizes(tuple((padding.shape[1], padding.shape[2]) for padding in features.paddings)),
            valid_ratios=torch.stack([_valid_ratio(padding, dtype) for padding in features.paddings], dim=1),
            **self._queries(features.memory.shape[0], targets),
        )

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the stages' outputs to B x hidden_dim x h x w for each level, finest first."""
        maps: list[Tensor] = []
        for index, projection in enumerate(self.input_proj):
            last = len(features) - 1
            maps.append(projection(features[min(index, last)] if index <= last + 1 else maps[-1]))
        return maps

    def _queries(self, batch_size: int, targets: list[dict] | ExtraQueries | None) -> QueryFields:
        content: Tensor = self.tgt_embed.weight
        # The matching queries' indicator channel is 0.
        content = torch.cat((content, content.new_zeros(len(content), 1)), dim=1)
        content, anchor_logits = (t.expand(batch_size, -1, -1) for t in (content, self.refpoint_embed.weight))
        fields = self.queries(content, anchor_logits, targets)
        if self.training and (fields["denoising"] is None or not fields["denoising"].num_queries):
            # DistributedDataParallel waits for the gradient of every parameter, also of the unused label_enc.
            fields["queries"] = fields["queries"] + 0 * self.label_enc.weight.sum()
        return fields

    def classify(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the class logits of the layer's head, B x Q x num_classes."""
        return self.class_embed[layer](hidden)

    def layer_slices(self, stack: str, index: int) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices of a layer that shrink with the block."""
        return getattr(self.transformer, stack).layers[index].slices(f"transformer.{stack}.layers.{index}")


def _check_options(config: DetectorConfig) -> None:
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


def _projections(channels: list[int], num_levels: int, hidden_dim: int) -> list[nn.Sequential]:
    """Return 1x1 convolutions of the stages, then 3x3 ones of stride 2 of the last stage and of each previous level."""
    convolutions = [nn.Conv2d(count, hidden_dim, kernel_size=1) for count in channels]
    for index in range(len(channels), num_levels):
        count = channels[-1] if index == len(channels) else hidden_dim
        convolutions.append(nn.Conv2d(count, hidden_dim, kernel_size=3, stride=2, padding=1))
    return [nn.Sequential(convolution, MapNorm(NORM_GROUPS, hidden_dim)) for convolution in convolutions]


def _valid_ratio(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fractions of width and height that are not padding (B x 2), from padding B x h x w.

    The result is float64 for features of that type, else float32.
    """
    valid = (~padding).to(torch.promote_types(dtype, torch.float32))
    return torch.stack((valid[:, 0].mean(1), valid[:, :, 0].mean(1)), dim=-1)
