"""Base class of the DN-DETR variants: backbone and projections, a sequence of named steps, and heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone, PartialFeatures
from models.denoising_queries import (
    DenoisingSettings,
    ExtraQueries,
    NoisedTargets,
    draw_noise,
    noised_queries,
    query_mask,
)
from models.layers import inverse_sigmoid
from models.padding import (
    PaddedImages,
    group_by_size,
    join_maps,
    pad_images,
    padding_of_map,
    resize_padding,
)
from models.prunable import KINDS, ParameterSlice, PrunableModule, residual_block_module
from models.state import BackboneState, DenoisingQueries, DetectorState, Features, QueryFields, State
from models.widths import BACKBONE, Widths
from util.errors import UserError


class Detector(nn.Module, ABC):
    """Base class of the variants.

    A subclass adds `backbone` (a list of one), `transformer` (with `encoder` and `decoder`, each with `step`),
    `label_enc` and its heads.

    Args:
        widths: channels of each attention and FFN, and of each residual block of the backbone if some are pruned.
        num_classes: largest category id + 1.
        hidden_dim: channels of features and queries.
        nheads: number of attention heads.
        num_queries: number of matching queries.
        num_patterns: number of patterns for each anchor, 0 for none.
        denoising: noise on targets in training; None trains without denoising queries.
        strides: stride of each feature level, in pixels.
        image_multiple: padded training images have sides that are a multiple of this: the backbone's stride, in pixels.
        padding_rule: one of `models.padding.PADDING_RULES`.
    """

    widths: Widths
    backbone: Sequence[Backbone]
    transformer: nn.Module
    stages: Sequence[str]  # of the backbone, that the transformer reads
    label_enc: nn.Embedding
    refpoint_embed: nn.Embedding
    query_embeddings: Sequence[str] = ("refpoint_embed",)  # with a row for each of `num_queries`

    def __init__(
        self,
        widths: Widths,
        *,
        num_classes: int,
        hidden_dim: int,
        nheads: int,
        num_queries: int,
        num_patterns: int,
        denoising: DenoisingSettings | None,
        strides: Sequence[int],
        image_multiple: int,
        padding_rule: str,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.num_classes = num_classes
        self.hidden_dim = hidden_dim
        self.nheads = nheads
        self.num_queries = num_queries
        self.num_patterns = num_patterns
        self.denoising = denoising
        self.strides = strides
        self.image_multiple = image_multiple
        self.padding_rule = padding_rule
        self.step_names = tuple(name for name in widths.names() if not name.startswith(f"{BACKBONE}."))

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the backbone's residual blocks, such as `backbone.layer3.1`, in network order."""
        return tuple(f"{BACKBONE}.{name}" for name in self.backbone[0].residual_blocks())

    def steps_in(self, scope: str) -> tuple[str, ...]:
        """Return the names of the steps of a scope, in network order."""
        return (*self.block_names, *self.step_names) if scope == "detector" else self.step_names

    @abstractmethod
    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the outputs of the stages `stages` to B x hidden_dim x h x w for each level, finest first."""

    def feature_maps(self, batch: Tensor, begun: PartialFeatures | None = None) -> list[Tensor]:
        """Project the features of images (B x 3 x H x W) to B x hidden_dim x h x w for each level, finest first.

        `begun` has what the backbone's first layers give for them.
        """
        return self.project(self.backbone[0](batch, self.stages, begun))

    @abstractmethod
    def first_state(
        self, features: Features, targets: list[dict[str, Tensor]] | ExtraQueries | None = None
    ) -> DetectorState:
        """Add positions and queries to the features and return the input state of the first step."""

    @abstractmethod
    def classify(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the class logits (B x Q x num_classes) of a decoder layer's output (B x Q x hidden_dim)."""

    @abstractmethod
    def layer_slices(self, stack: str, index: int) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices of a layer of `encoder` or `decoder` that shrink with the block."""

    def forward(
        self,
        images: list[Tensor] | Tensor | PaddedImages,
        targets: list[dict[str, Tensor]] | ExtraQueries | None = None,
    ) -> dict:
        """Detect objects.

        Args:
            images: normalised; a list of 3 x H x W, a B x 3 x H x W, or padded images. In eval mode, a list gives each
                image the result that it has alone, unless the padding rule is the reference's; see `features`.
            targets: in training, a dict for each image with `boxes` (N x 4 cxcywh in [0, 1]) and `labels` (N), from
                which denoising queries are made; or, in either mode, queries drawn before.

        Returns:
            `pred_logits` (B x Q x num_classes), `pred_boxes` (B x Q x 4 cxcywh in [0, 1]) and `aux_outputs`, the same
            two for each earlier layer. In training also `memory`, the encoder's output (B x S x D). With denoising
            queries also `denoising`: `layout`, and `pred_logits` and `pred_boxes` with a leading axis of layers. With
            shared anchors also `anchors`: a list with the same two for each kind.
        """
        return self.outputs(self.run_steps(self.prepare(images, targets)))

    def features(self, images: list[Tensor] | Tensor | PaddedImages) -> Features:
        """Compute the projected backbone features of images.

        In eval mode, a list of images is processed in groups of equal size and the feature maps are padded, so each
        image has the features that it has alone. In training mode, and always under the reference's padding rule, the
        images are padded instead; see `pad`.

        Args:
            images: normalised; a list of 3 x H x W, a B x 3 x H x W, or padded images.
        """
        if isinstance(images, Tensor):
            return self._features_of_batch(PaddedImages(images, None))
        if isinstance(images, PaddedImages):
            return self._features_of_batch(images)
        if self.training or self.padding_rule == "reference":
            return self._features_of_batch(self.pad(images))
        groups = group_by_size(images)
        if len(groups) == 1:
            return self._features_of_batch(PaddedImages(groups[0].batch, None))
        maps_by_group = [self.feature_maps(group.batch) for group in groups]
        levels = [join_maps(groups, maps) for maps in zip(*maps_by_group, strict=True)]
        return Features(_pixels([maps for maps, _ in levels]), tuple(padding for _, padding in levels), is_padded=True)

    def pad(self, images: list[Tensor]) -> PaddedImages:
        """Pad images (each 3 x H x W) as in training.

        Sides are multiples of the backbone's stride, so that an image has as many rows and columns on its feature map
        as alone. Under the reference's rule, images are padded to the largest height and width.
        """
        return pad_images(images, 1 if self.padding_rule == "reference" else self.image_multiple)

    def _features_of_batch(self, images: PaddedImages) -> Features:
        return self._as_features(self.feature_maps(images.batch, images.begun), images.padding)

    def _as_features(self, maps: Sequence[Tensor], padding_of_images: Tensor | None) -> Features:
        paddings = []
        for level, stride in zip(maps, self.strides, strict=True):
            rows, columns = level.shape[-2:]
            if padding_of_images is None:
                padding = level.new_zeros(1, rows, columns, dtype=torch.bool)
            elif self.padding_rule == "reference":
                padding = resize_padding(padding_of_images, (rows, columns))
            else:
                padding = padding_of_map(padding_of_images, (rows, columns), stride)
            paddings.append(padding)
        return Features(_pixels(maps), tuple(paddings), is_padded=padding_of_images is not None)

    def prepare(
        self,
        images: list[Tensor] | Tensor | PaddedImages,
        targets: list[dict[str, Tensor]] | ExtraQueries | None = None,
    ) -> DetectorState:
        """Return the input state of the first step: features, positions and queries."""
        return self.first_state(self.features(images), targets)

    def queries(self, content: Tensor, anchor_logits: Tensor, targets: list[dict] | ExtraQueries | None) -> QueryFields:
        """Return the query fields of a state: the matching queries after the denoising and other extra queries.

        Args:
            content: content of the matching queries, B x Q x hidden_dim.
            anchor_logits: B x Q x 4.
            targets: as in `forward`.
        """
        if isinstance(targets, list):
            noise = draw_noise(targets, self.num_classes, self.denoising) if self.training else None
            targets = ExtraQueries(noise)
        mask = layout = None
        if targets is not None and (targets.noise is not None or targets.anchors_cxcywh):
            extra = _embed(targets, content, self.label_enc)
            layout = extra.layout
            mask = query_mask(layout, content.shape[1], content.device)
            content = torch.cat((extra.content, content), dim=1)
            anchor_logits = torch.cat((extra.anchor_logits, anchor_logits), dim=1)
        anchors = anchor_logits.sigmoid()
        return QueryFields(queries=content, query_mask=mask, anchors=anchors, live_anchors=anchors, denoising=layout)

    def stem_state(self, images: list[Tensor]) -> BackboneState:
        """Return the input state of the first residual block.

        Args:
            images: each 3 x H x W, normalised; of one size, unless the padding rule is the reference's.
        """
        if self.padding_rule != "reference" and len({image.shape for image in images}) > 1:
            found = ", ".join(sorted({f"{image.shape[1]} x {image.shape[2]}" for image in images}))
            raise UserError(
                f"--scope detector: found images of {found} pixels in one batch, expected one size, or "
                "--padding_rule reference"
            )
        padded = self.pad(images) if self.padding_rule == "reference" else PaddedImages(torch.stack(images), None)
        return BackboneState(self.backbone[0].stem(padded.batch), padding=padded.padding)

    def front(self, images: list[Tensor], scope: str) -> Features | BackboneState:
        """Run everything before the first step of a scope; see `features` and `stem_state`."""
        return self.stem_state(images) if scope == "detector" else self.features(images)

    def start(self, front: Features | BackboneState) -> DetectorState | BackboneState:
        """Return the input state of the first step of a scope, given the result of `front`."""
        return self.first_state(front) if isinstance(front, Features) else front

    def run_steps(self, state: State, start: str | None = None, stop: str | None = None) -> Any:
        """Run the steps from `start` (inclusive, None for the first) to `stop` (exclusive, None for the end).

        The steps of a `BackboneState` begin with the residual blocks. After the last block its features are projected,
        and the result is the input state of the first step after the backbone.
        """
        names = self.steps_in("detector" if isinstance(state, BackboneState) else "transformer")
        first = 0 if start is None else names.index(start)
        last = len(names) if stop is None else names.index(stop)
        for name in names[first:last]:
            if isinstance(state, BackboneState):
                state = self._run_block(name, state)
            else:
                stack, index, block = name.split(".")
                state = getattr(self.transformer, stack).step(int(index), block, state)
        return state

    def _run_block(self, name: str, state: BackboneState) -> DetectorState | BackboneState:
        maps = self.backbone[0].residual_blocks()[name.removeprefix(f"{BACKBONE}.")](state.maps)
        stage = self.backbone[0].stage_ended_by(name)
        levels = (*state.levels, maps) if stage in self.stages else state.levels
        if name != self.block_names[-1]:
            return state.replace(maps=maps, levels=levels)
        return self.first_state(self._as_features(self.project(levels), state.padding))

    def outputs(self, state: DetectorState) -> dict:
        """Return the outputs of a state after the last step; see `forward`."""
        extra = [state.denoising.num_queries, *state.denoising.anchors] if state.denoising else []
        logits = [_parts(self.classify(layer, hidden), extra) for layer, hidden in enumerate(state.hidden)]
        boxes = [_parts(of_layer, extra) for of_layer in state.boxes]
        layers = [{"pred_logits": a[-1], "pred_boxes": b[-1]} for a, b in zip(logits, boxes, strict=True)]
        outputs = {**layers[-1], "aux_outputs": layers[:-1]}
        if self.training:
            outputs["memory"] = state.memory
        if state.denoising:
            denoising, *anchors = (
                {
                    "pred_logits": torch.stack([parts[index] for parts in logits]),
                    "pred_boxes": torch.stack([parts[index] for parts in boxes]),
                }
                for index in range(len(extra))
            )
            if state.denoising.num_queries:
                outputs["denoising"] = {"layout": state.denoising, **denoising}
            if anchors:
                outputs["anchors"] = anchors
        return outputs

    def keep_queries(self, indices: Tensor) -> None:
        """Keep only the matching queries with these anchors; their parameters stay as they are."""
        for name in self.query_embeddings:
            rows = getattr(self, name).weight.detach()[indices.to(self.refpoint_embed.weight.device)]
            setattr(self, name, nn.Embedding.from_pretrained(rows, freeze=False))
        self.num_queries = len(indices)

    def widths_in(self, scope: str) -> Widths:
        """Return the widths of the modules of a scope; only the scope `detector` lists those of a whole backbone."""
        return replace(self.widths, backbone=self.backbone[0].widths) if scope == "detector" else self.widths

    def prunable_modules(self, scope: str = "transformer") -> dict[str, PrunableModule]:
        """Return the modules of a scope by name, in network order; those of width 0 have nothing to prune.

        Args:
            scope: one of `models.prunable.SCOPES`: `transformer` has every attention and FFN, `detector` also every
                residual block of the backbone.
        """
        modules = {}
        if scope == "detector":
            for name, residual_block in self.backbone[0].residual_blocks().items():
                if residual_block.width:
                    modules[f"{BACKBONE}.{name}"] = residual_block_module(f"{BACKBONE}.{name}", residual_block)
        for name in self.step_names:
            width = self.widths.of(name)
            if not width:
                continue
            stack, index, block = name.split(".")
            slices = self.layer_slices(stack, int(index))[block]
            groups = 1 if block == "ffn" else self.nheads
            layer = getattr(self.transformer, stack).layers[int(index)]
            other_keys = tuple(f"transformer.{stack}.layers.{index}.{key}" for key in layer.other_parameters(block))
            modules[name] = PrunableModule(name, KINDS[block], width, groups, layer, slices, other_keys)
        return modules


def _embed(extra: ExtraQueries, content: Tensor, label_enc: nn.Embedding) -> NoisedTargets:
    """Return the contents and anchor logits of extra queries; `content` is that of the matching ones (B x Q x D)."""
    parts = [] if extra.noise is None else [noised_queries(extra.noise, label_enc)]
    contents, logits = [part.content for part in parts], [part.anchor_logits for part in parts]
    if extra.content_queries is not None:
        content = content[:, extra.content_queries]
    sizes = []
    for anchors in extra.anchors_cxcywh.values():
        sizes.append(anchors.shape[1])
        contents.append(content[:, torch.arange(anchors.shape[1], device=content.device) % content.shape[1]])
        logits.append(inverse_sigmoid(anchors))
    layout = extra.noise.layout if extra.noise is not None else DenoisingQueries(0, 0)
    return NoisedTargets(torch.cat(contents, 1), torch.cat(logits, 1), replace(layout, anchors=tuple(sizes)))


def _pixels(maps: Sequence[Tensor]) -> Tensor:
    """Flatten the maps (B x D x h x w) of all levels to B x S x D, level after level, each row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def _parts(of_queries: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split B x Q x C into the first queries, `sizes` of them, and the other ones."""
    return of_queries.split([*sizes, of_queries.shape[1] - sum(sizes)], dim=1) if sizes else (of_queries,)
