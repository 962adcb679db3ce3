"""DN-DAB-Deformable-DETR: backbone, transformer over several levels, and heads, as a sequence of named steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.denoising import DenoisingSettings
from models.detector import Detector
from models.dn_dab_deformable_detr.attention import DeformableAttention
from models.dn_dab_deformable_detr.decoder import Decoder, DecoderLayer, decoder_layer_slices
from models.dn_dab_deformable_detr.encoder import Encoder, EncoderLayer, encoder_layer_slices
from models.dn_dab_deformable_detr.state import DeformableState, LevelSizes
from models.initialisation import initialise_detector
from models.layers import ANCHOR_EPS, MLP, module_list
from models.position_encoding import pixel_encoding
from models.prunable import ParameterSlice
from models.state import Features, QueryFields
from models.widths import Widths

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
        backbone: the backbone; each stage from layer2 to its last is a feature level.
        widths: channels of each attention (value channels of deformable attention) and FFN.
        num_classes: largest category id + 1.
        num_levels: number of feature levels; convolutions of stride 2 compute those beyond the backbone's.
        encoder_points, decoder_points: number of points that a head samples on each level.
        anchor_eps: lower bound of an anchor coordinate and of its distance from 1 when its logit is computed.
        denoising: noise on targets in training; None trains without denoising queries.
        padding_rule: one of `models.padding.PADDING_RULES`.
    """

    transformer: Transformer

    def __init__(
        self,
        backbone: Backbone,
        widths: Widths,
        *,
        num_classes: int,
        hidden_dim: int = 256,
        nheads: int = 8,
        num_queries: int = 300,
        num_levels: int = 4,
        encoder_points: int = 4,
        decoder_points: int = 4,
        dropout: float = 0.0,
        anchor_eps: float = ANCHOR_EPS,
        denoising: DenoisingSettings | None = None,
        padding_rule: str = "exact",
    ) -> None:
        stages = [stage for stage in backbone.channels if stage != "layer1"]
        strides = [backbone.strides[stage] for stage in stages]
        super().__init__(
            widths,
            num_classes=num_classes,
            hidden_dim=hidden_dim,
            nheads=nheads,
            num_queries=num_queries,
            num_patterns=0,
            denoising=denoising,
            strides=[*strides, *(strides[-1] * 2**level for level in range(1, num_levels - len(stages) + 1))],
            image_multiple=strides[-1],
            padding_rule=padding_rule,
        )
        self.num_levels = num_levels
        self.points = {"encoder": encoder_points, "decoder": decoder_points}
        self.stages = stages
        common = (nheads, num_levels)
        self.bbox_embed = module_list(MLP(hidden_dim, hidden_dim, hidden_dim, 4) for _ in widths.decoder)
        self.transformer = Transformer(
            Encoder([EncoderLayer(hidden_dim, w, *common, encoder_points, dropout) for w in widths.encoder]),
            Decoder(
                [DecoderLayer(hidden_dim, w, *common, decoder_points, dropout) for w in widths.decoder],
                hidden_dim,
                self.bbox_embed,
                anchor_eps,
                anchors_on_padded_map=padding_rule == "reference",
            ),
            num_levels,
            hidden_dim,
        )
        self.class_embed = module_list(nn.Linear(hidden_dim, num_classes) for _ in widths.decoder)
        self.label_enc = nn.Embedding(num_classes + 1, hidden_dim - 1)
        self.tgt_embed = nn.Embedding(num_queries, hidden_dim - 1)
        self.refpoint_embed = nn.Embedding(num_queries, 4)
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

    def first_state(self, features: Features, targets: list[dict[str, Tensor]] | None = None) -> DeformableState:
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

    def feature_maps(self, batch: Tensor) -> list[Tensor]:
        """Project the features of images (B x 3 x H x W) to B x hidden_dim x h x w for each level, finest first."""
        features = self.backbone[0](batch, self.stages)
        maps: list[Tensor] = []
        for index, projection in enumerate(self.input_proj):
            last = len(features) - 1
            maps.append(projection(features[min(index, last)] if index <= last + 1 else maps[-1]))
        return maps

    def _queries(self, batch_size: int, targets: list[dict] | None) -> QueryFields:
        content: Tensor = self.tgt_embed.weight
        # The matching queries' indicator channel is 0.
        content = torch.cat((content, content.new_zeros(len(content), 1)), dim=1)
        content, anchor_logits = (t.expand(batch_size, -1, -1) for t in (content, self.refpoint_embed.weight))
        fields = self.queries(content, anchor_logits, targets)
        if self.training and fields["denoising"] is None:
            # DistributedDataParallel waits for the gradient of every parameter, also of the unused label_enc.
            fields["queries"] = fields["queries"] + 0 * self.label_enc.weight.sum()
        return fields

    def classify(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the class logits of the layer's head, B x Q x num_classes."""
        return self.class_embed[layer](hidden)

    def layer_slices(self, stack: str, index: int) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices of a layer that shrink with the block."""
        slices = encoder_layer_slices if stack == "encoder" else decoder_layer_slices
        return slices(f"transformer.{stack}.layers.{index}")


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
