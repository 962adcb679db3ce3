"""DN-DAB-DETR: backbone, transformer and heads, as a sequence of named steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.config import DetectorConfig
from models.denoising_queries import DenoisingSettings, ExtraQueries
from models.detector import Detector
from models.dn_dab_detr.decoder import Decoder, DecoderLayer
from models.dn_dab_detr.encoder import Encoder, EncoderLayer
from models.initialisation import initialise_detector
from models.layers import MLP, module_list
from models.position_encoding import pixel_encoding
from models.prunable import ParameterSlice
from models.state import DetectorState, Features


class Transformer(nn.Module):
    """Container of encoder and decoder, for the names in the state dict."""

    def __init__(self, encoder: Encoder, decoder: Decoder, num_patterns: int, hidden_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        if num_patterns:
            self.patterns = nn.Embedding(num_patterns, hidden_dim)


class DnDabDetr(Detector):
    """The dense variant of DN-DETR (arXiv 2203.01305) with any widths.

    With `cfgs`, the encoder's attention has the names of the paper's slim models.

    Args:
        config: options that affect its outputs.
        backbone: the backbone.
        denoising: noise on targets in training; None trains without denoising queries.
    """

    transformer: Transformer

    def __init__(self, config: DetectorConfig, backbone: Backbone, denoising: DenoisingSettings | None) -> None:
        (*_, stride) = backbone.strides.values()
        widths, hidden_dim = config.widths, config.hidden_dim
        super().__init__(
            widths,
            num_classes=config.num_classes,
            hidden_dim=hidden_dim,
            nheads=config.nheads,
            num_queries=config.num_queries,
            num_patterns=config.num_patterns,
            denoising=denoising,
            strides=[stride],
            image_multiple=stride,
            padding_rule=config.padding_rule,
        )
        self.stages = list(backbone.channels)[-1:]
        self.temperatures = (config.pe_temperatureH, config.pe_temperatureW)

        common = (config.nheads, config.transformer_activation, config.dropout)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, hidden_dim, 4)
        encoder_layers = [EncoderLayer(hidden_dim, layer, *common, config.cfgs is not None) for layer in widths.encoder]
        decoder_layers = [DecoderLayer(hidden_dim, w, *common, is_first=i == 0) for i, w in enumerate(widths.decoder)]
        self.transformer = Transformer(
            Encoder(encoder_layers, hidden_dim),
            Decoder(decoder_layers, hidden_dim, self.bbox_embed, config.anchor_eps),
            config.num_patterns,
            hidden_dim,
        )
        self.class_embed = nn.Linear(hidden_dim, config.num_classes)
        self.label_enc = nn.Embedding(config.num_classes + 1, hidden_dim - 1)
        self.refpoint_embed = nn.Embedding(config.num_queries, 4)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        # A list of one, because the keys in checkpoints begin with `backbone.0.body`.
        self.backbone = module_list([backbone])
        initialise_detector(self.transformer, [self.class_embed], [self.bbox_embed])

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the last stage's output to one level, B x hidden_dim x h x w."""
        (last,) = features
        return [self.input_proj(last)]

    def first_state(
        self, features: Features, targets: list[dict[str, Tensor]] | ExtraQueries | None = None
    ) -> DetectorState:
        """Add positions and queries to the features and return the input state of the first step."""
        (padding,) = features.paddings
        memory_pos = pixel_encoding(padding, self.hidden_dim, *self.temperatures, dtype=features.memory.dtype)
        memory_mask = ~padding.flatten(1)[:, None, None, :] if features.is_padded else None
        # The last row of label_enc is the content of matching queries; their indicator channel is 0.
        content = torch.cat((self.label_enc.weight[self.num_classes], self.label_enc.weight.new_zeros(1)))
        content = content.expand(self.num_queries, -1)
        anchor_logits = self.refpoint_embed.weight
        if self.num_patterns:
            patterns = self.transformer.patterns.weight.repeat_interleave(self.num_queries, dim=0)
            content = content.repeat(self.num_patterns, 1) + patterns
            anchor_logits = anchor_logits.repeat(self.num_patterns, 1)
        content, anchor_logits = (t.expand(features.memory.shape[0], -1, -1) for t in (content, anchor_logits))
        queries = self.queries(content, anchor_logits, targets)
        return DetectorState(features.memory, memory_pos, memory_mask, **queries)

    def classify(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the class logits, B x Q x num_classes; all layers share one head."""
        return self.class_embed(hidden)

    def layer_slices(self, stack: str, index: int) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices of a layer that shrink with the block."""
        return getattr(self.transformer, stack).layers[index].slices(f"transformer.{stack}.layers.{index}")
