"""DN-DAB-DETR: backbone, transformer and heads, as a sequence of named steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.denoising import DenoisingSettings, noised_queries, query_mask
from models.dn_dab_detr.decoder import Decoder, DecoderLayer, decoder_layer_slices
from models.dn_dab_detr.encoder import Encoder, EncoderLayer, encoder_layer_slices
from models.initialisation import initialise_detector
from models.layers import MLP
from models.padding import pad_images
from models.position_encoding import pixel_encoding
from models.prunable import PrunableModule
from models.state import DetectorState, Features
from models.widths import Widths

KINDS = {
    "attention": "encoder_attention",
    "self_attention": "self_attention",
    "cross_attention": "cross_attention",
    "ffn": "ffn",
}


class Transformer(nn.Module):
    """Encoder and decoder; a container that gives the state dict its names."""

    def __init__(self, encoder: Encoder, decoder: Decoder, num_patterns: int, hidden_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        if num_patterns:
            self.patterns = nn.Embedding(num_patterns, hidden_dim)


class DnDabDetr(nn.Module):
    """The dense variant of DN-DETR (arXiv 2203.01305) with any widths.

    Args:
        backbone: gives the features.
        widths: channels of every attention and FFN.
        num_classes: largest category id + 1.
        slim_names: name the encoder's attention as the paper's slim models do.
        temperatures: of the pixel encoding, for height and width.
        denoising: how targets are noised in training; None trains without denoising queries.
    """

    def __init__(
        self,
        backbone: Backbone,
        widths: Widths,
        *,
        num_classes: int,
        hidden_dim: int = 256,
        nheads: int = 8,
        num_queries: int = 300,
        num_patterns: int = 0,
        activation: str = "prelu",
        dropout: float = 0.0,
        slim_names: bool = False,
        temperatures: tuple[float, float] = (20, 20),
        denoising: DenoisingSettings | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.num_patterns = num_patterns
        self.nheads = nheads
        self.hidden_dim = hidden_dim
        self.slim_names = slim_names
        self.temperatures = temperatures
        self.denoising = denoising
        self.step_names = widths.names()

        common = (nheads, activation, dropout)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, hidden_dim, 4)
        encoder_layers = [EncoderLayer(hidden_dim, layer, *common, slim_names) for layer in widths.encoder]
        decoder_layers = [DecoderLayer(hidden_dim, w, *common, is_first=i == 0) for i, w in enumerate(widths.decoder)]
        self.transformer = Transformer(
            Encoder(encoder_layers, hidden_dim),
            Decoder(decoder_layers, hidden_dim, self.bbox_embed),
            num_patterns,
            hidden_dim,
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes)
        self.label_enc = nn.Embedding(num_classes + 1, hidden_dim - 1)
        self.refpoint_embed = nn.Embedding(num_queries, 4)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        # A list of one, because the checkpoints' keys begin with `backbone.0.body`.
        self.backbone = nn.ModuleList([backbone])
        initialise_detector(self.transformer, [self.class_embed], [self.bbox_embed])

    def forward(self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None) -> dict:
        """Detect objects.

        Args:
            images: list of 3 x H x W, or one B x 3 x H x W, normalised.
            targets: in training, a dict for each image with `boxes` (N x 4 cxcywh in [0, 1]) and `labels` (N);
                they add the denoising queries.

        Returns:
            `pred_logits` B x Q x num_classes, `pred_boxes` B x Q x 4 (cxcywh in [0, 1]), `aux_outputs`: the same two
            for each earlier layer; in training also `memory`, the encoder's output (B x S x D); with denoising queries
            also `denoising`: `layout`, `pred_logits` and `pred_boxes` with a leading axis of layers.
        """
        return self.outputs(self.run_steps(self.prepare(images, targets)))

    def prepare(self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None) -> DetectorState:
        """The state in front of the first step: features, positions and queries."""
        return self.first_state(self.features(images), targets)

    def features(self, images: list[Tensor] | Tensor) -> Features:
        """What the backbone and the projection behind it make of images; see `forward`."""
        batch, padding, is_padded = pad_images(images)
        features, padding = self.backbone[0](batch, padding)
        memory = self.input_proj(features).flatten(2).transpose(1, 2)
        return Features(memory, (padding if is_padded else padding[:1],), is_padded)

    def first_state(self, features: Features, targets: list[dict[str, Tensor]] | None = None) -> DetectorState:
        """The state in front of the first step, with positions and queries added to the features."""
        (padding,), batch_size = features.paddings, len(features.memory)
        memory_pos = pixel_encoding(padding, self.hidden_dim, *self.temperatures)
        memory_mask = ~padding.flatten(1)[:, None, None, :] if features.is_padded else None
        # The last row of label_enc is "no object yet"; the matching queries' indicator channel is 0.
        content = torch.cat((self.label_enc.weight[self.num_classes], self.label_enc.weight.new_zeros(1)))
        content = content.expand(self.num_queries, -1)
        anchor_logits = self.refpoint_embed.weight
        if self.num_patterns:
            patterns = self.transformer.patterns.weight.repeat_interleave(self.num_queries, dim=0)
            content = content.repeat(self.num_patterns, 1) + patterns
            anchor_logits = anchor_logits.repeat(self.num_patterns, 1)
        content = content.expand(batch_size, -1, -1)
        anchor_logits = anchor_logits.expand(batch_size, -1, -1)
        mask = layout = noised = None
        if self.training and targets is not None and self.denoising is not None:
            noised = noised_queries(targets, self.label_enc, self.num_classes, self.denoising)
        if noised is not None:
            layout = noised.layout
            mask = query_mask(layout, content.shape[1], content.device)
            content = torch.cat((noised.content, content), dim=1)
            anchor_logits = torch.cat((noised.anchor_logits, anchor_logits), dim=1)
        anchors = anchor_logits.sigmoid()
        return DetectorState(
            features.memory, memory_pos, memory_mask, content, mask, anchors, anchors, denoising=layout
        )

    def run_steps(self, state: DetectorState, start: str | None = None, stop: str | None = None) -> DetectorState:
        """Run the steps from `start` (included; None is the first) to `stop` (excluded; None runs to the end)."""
        first = 0 if start is None else self.step_names.index(start)
        last = len(self.step_names) if stop is None else self.step_names.index(stop)
        for name in self.step_names[first:last]:
            stack, index, block = name.split(".")
            state = getattr(self.transformer, stack).step(int(index), block, state)
        return state

    def outputs(self, state: DetectorState) -> dict:
        """Logits and boxes of a state at the end of the steps; see `forward`."""
        logits = [self.class_embed(hidden) for hidden in state.hidden]
        split = state.denoising.num_queries if state.denoising else 0
        layers = [
            {"pred_logits": layer_logits[:, split:], "pred_boxes": boxes[:, split:]}
            for layer_logits, boxes in zip(logits, state.boxes, strict=True)
        ]
        outputs = {**layers[-1], "aux_outputs": layers[:-1]}
        if self.training:
            outputs["memory"] = state.memory
        if state.denoising:
            outputs["denoising"] = {
                "layout": state.denoising,
                "pred_logits": torch.stack([layer_logits[:, :split] for layer_logits in logits]),
                "pred_boxes": torch.stack([boxes[:, :split] for boxes in state.boxes]),
            }
        return outputs

    def prunable_modules(self) -> dict[str, PrunableModule]:
        """Every attention and FFN by name, in network order."""
        modules = {}
        for name, width in self.widths.items():
            stack, index, block = name.split(".")
            prefix = f"transformer.{stack}.layers.{index}"
            if stack == "encoder":
                slices = encoder_layer_slices(prefix, self.slim_names)
            else:
                slices = decoder_layer_slices(prefix, is_first=int(index) == 0)
            groups = 1 if block == "ffn" else self.nheads
            layer = getattr(self.transformer, stack).layers[int(index)]
            modules[name] = PrunableModule(name, KINDS[block], width, groups, layer, slices[block])
        return modules
