"""Tiny detectors with calibrated residual blocks, for tests of their reconstruction."""

import functools

import pytest
import torch

from pruning import convolution_moments
from pruning.cache_plan import Storage
from pruning.calibration import Calibration
from pruning.reconstruction import Reconstruction
from pruning.state_cache import PassCounter, StateCache
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, randomise_norms, tiny_detector

CPU = torch.device("cpu")
DETECTORS = {
    "basic": "--batch_norm_type BatchNorm2d",
    "basic, frozen, deformable": VARIANTS["deformable"],
    "bottleneck": "--backbone resnet_tiny_bottleneck --return_layer layer3",
    "bottleneck, deformable, dilated": f"{VARIANTS['deformable']} --backbone resnet_tiny_bottleneck "
    "--batch_norm_type BatchNorm2d --dilation",
}
SIZES = ((96, 96), (96, 96), (64, 96), (64, 96), (96, 64))
GROUPS = ((0, 1), (2, 3), (4,))


def batches_of(groups=GROUPS, sizes=SIZES, counts=(2, 2, 2, 2, 2)):
    """Batches of the same pictures, grouped in any way, with `counts` boxes each."""
    images, _ = pictures(sizes, seed=3)
    boxes = [{"boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.5, 0.2, 0.5]]).repeat(count, 1)[:count],
              "labels": torch.tensor([1, 3]).repeat(count)[:count],
              "image_id": torch.tensor(number)} for number, count in enumerate(counts[:len(images)])]  # fmt: skip
    return ListedBatches([([images[i] for i in group], [boxes[i] for i in group]) for group in groups])


def in_double(batches):
    return ListedBatches([([image.double() for image in images], targets) for images, targets in batches])


class Setting:
    """A tiny detector whose blocks are calibrated on a few pictures."""

    def __init__(self, words, batches=None, dtype=torch.float32, numbers=None, **storage):
        self.model, self.criterion, _ = tiny_detector(words)
        randomise_norms(self.model)
        self.model.to(dtype).eval()
        self.criterion.eval()
        self.batches = batches or batches_of()
        self.modules = self.model.prunable_modules("detector")
        self.blocks = [name for name in self.modules if name in self.model.block_names]
        counter = PassCounter(dict.fromkeys(self.model.steps_in("detector"), 1.0))
        plan = (lambda features, front_bytes: Storage(**storage)) if storage else None
        self.cache = StateCache(
            self.model, self.batches, counter, device=CPU, scope="detector", numbers=numbers, plan=plan
        )
        self.calibration = Calibration(self.model, self.criterion, self.cache, range(len(self.batches)), CPU)
        self.at_first = {key: value.clone() for key, value in self.model.state_dict().items()}

    def reconstruction(self, level):
        self.restore()
        self.cache.forget()
        return Reconstruction(self.calibration, level)

    def restore(self):
        self.model.load_state_dict(self.at_first)
        for module in self.modules.values():
            module.set_gate(None)

    def begin(self, reconstruction, name):
        self.cache.move_to(name)
        reconstruction.begin(name)
        return self.modules[name]

    def cut(self, level, kept, names=None):
        """The damage of each module, cut one after the other."""
        reconstruction, damages = self.reconstruction(level), {}
        for name in names or self.modules:
            self.begin(reconstruction, name)
            damages[name] = reconstruction.apply(kept[name])
        return damages

    def inputs_of(self, name):
        """The block's input for each batch."""
        self.cache.move_to(name)
        return [state.maps for state, _ in self.cache.states()]

    def error(self, name, targets, is_one_sided=False, metric=None):
        """The weighted mean over pixels of the squared error before the block's last ReLU."""
        module, wrong, weights = self.modules[name], [], []
        number = len(module.parts) + 1
        of_norm = self.calibration.sensitivities[f"{name}.bn{number}"]
        for x, target, of_tokens in zip(self.inputs_of(name), targets, of_norm.token_weights, strict=True):
            found = module.layer.pre_activation(number, x) + module.layer.identity(x)
            difference = (found.relu() - target.relu() if is_one_sided else found - target).double()
            wrong.append(difference.flatten(2).transpose(1, 2).flatten(0, 1))
            weights.append(of_tokens.sqrt().flatten())
        wrong, weights = torch.cat(wrong), torch.cat(weights)
        metric = torch.eye(wrong.shape[1], dtype=wrong.dtype) if metric is None else metric
        return float((weights * ((wrong @ metric) * wrong).sum(1)).sum() / weights.sum())

    def targets(self, name):
        """What the unpruned detector has before a block's last ReLU, for each batch."""
        self.restore()
        self.cache.forget()
        layer = self.modules[name].layer
        number = len(self.modules[name].parts) + 1
        return [layer.pre_activation(number, x) + layer.identity(x) for x in self.inputs_of(name)]

    def assert_as_at_first(self):
        for key, value in self.model.state_dict().items():
            assert torch.equal(value, self.at_first[key]), key
        assert all(not any(m.layer.gate(m.block)) for m in self.modules.values())


@functools.cache
def setting_of(words, has_every_position=False):
    """A setting; with `has_every_position`, fits use every output position while `positions_per_image` is patched."""
    with pytest.MonkeyPatch.context() as patch:
        if has_every_position:
            use_every_position(patch)
        return Setting(words)


def use_every_position(patch):
    patch.setattr(convolution_moments, "positions_per_image", lambda unknowns, positions, images: positions)


def random_kept(module, share, seed=0):
    """That share of the channels, equally many of each head, each part apart."""
    generator = torch.Generator().manual_seed(seed)
    head_width = module.width // module.nheads
    width = max(1, round(share * head_width))

    def indices():
        heads = [torch.randperm(head_width, generator=generator)[:width] for _ in range(module.nheads)]
        return torch.cat([chosen.sort().values + head * head_width for head, chosen in enumerate(heads)])

    return {part: indices() for part in module.parts}


def random_sets(setting, share=0.5, seed=0):
    return {name: random_kept(module, share, seed) for name, module in setting.modules.items()}


def assert_close_outputs(found, expected, atol=1e-5):
    for one, other in zip([*found["aux_outputs"], found], [*expected["aux_outputs"], expected], strict=True):
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(one[key], other[key], atol=atol, rtol=atol)
