"""Detector, training, evaluation and search give the same results on CUDA as on the CPU (`make gpu-check`)."""

import copy

import pytest
import torch

import engine
import main
from datasets.coco import annotation_path, build_dataset, build_loader
from datasets.coco_eval import GroundTruth
from datasets.transforms import IMAGENET_STD
from pruning.moments import Moments
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.golden import recipe
from tests.pruning.tiny import pictures, tiny_detector
from tests.tiny_run import built, options, settled, tiny_options, write_self_annotated
from util.cli import parse

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU, a check that the tests still run
# Relative to the CPU's loss in float32: bf16 has 8 bits of mantissa and fp16 has 11, and rounding adds up over layers.
LOSS_TOLERANCE = {"off": 1e-3, "bf16": 0.1, "fp16": 0.05}
QUICK_SEARCH = "--map_tol 0.3 --skip_eval_converge 0.2 --attention_unit 4 --ffn_unit 16"


@pytest.fixture(autouse=True)
def full_float32():
    """Disables TF32, whose products have only three correct digits."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize("name", recipe.NETWORKS)
def test_the_golden_outputs(name):
    model, _, _ = recipe.built(name)
    model.to(CUDA).eval()
    with torch.no_grad():
        outputs = model([image.to(CUDA) for image in recipe.inputs()[0]])
    expected = recipe.figures(name)
    for field in ("logits", "boxes"):
        torch.testing.assert_close(
            outputs[f"pred_{field}"].cpu(), torch.from_numpy(expected[f"pred_{field}"]), rtol=0, atol=1e-3
        )


def test_moments_of_float32_products_are_those_of_float64_also_with_tf32():
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(4000, 256, generator=generator)) + 10
    weights = torch.rand(4000, generator=generator)
    torch.backends.cuda.matmul.allow_tf32 = True  # the fixture restores it
    there = Moments.of(x.to(CUDA), x[:, :8].to(CUDA), weights.to(CUDA), torch.float32)
    found = Moments.over_processes(there)
    assert there.xx.device.type == CUDA.type and found.xx.device.type == "cpu"
    expected = Moments.of(x, x[:, :8], weights)
    for name in ("covariance_xx", "covariance_yx", "covariance_yy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("amp", list(LOSS_TOLERANCE))
def test_a_training_step_has_the_loss_of_the_cpu(amp):
    """Without denoising queries, whose noise differs between the devices' generators."""
    on_cpu, criterion, _ = tiny_detector("--no-use_dn")
    on_cuda = copy.deepcopy(on_cpu).to(CUDA)
    before = on_cuda.class_embed.weight.detach().clone()
    images, targets = pictures()
    batch = [(images, [{**target, "image_id": torch.tensor(i)} for i, target in enumerate(targets)])]

    def losses(model, device, precision):
        # A low scale: the first step of fp16 must not be skipped for an overflow.
        scaler = torch.amp.GradScaler("cuda", init_scale=16.0) if precision == "fp16" else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return engine.train_one_epoch(
            model, copy.deepcopy(criterion).to(device), batch, optimizer,
            device=device, clip_max_norm=0.1, amp=precision, scaler=scaler, progress=False,
        )  # fmt: skip

    expected, found = losses(on_cpu, CPU, "off"), losses(on_cuda, CUDA, amp)
    assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE[amp])
    assert not torch.equal(on_cuda.class_embed.weight, before)
    assert all(parameter.isfinite().all() for parameter in on_cuda.parameters())


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A data set that its detector, dense.pth, finds everything in."""
    return write_self_annotated(tmp_path_factory.mktemp("annotated"))


def test_evaluation_gives_the_figures_of_the_cpu(annotated, tmp_path):
    words = ("--coco_path", annotated, "--output_dir", tmp_path, "--num_workers 0 --eval")
    words += ("--resume", annotated / "dense.pth", "--device")
    on_cpu, on_cuda = (main.main(*options(*words, device)) for device in ("cpu", CUDA.type))
    assert on_cpu["AP"] > 0.1
    assert on_cuda == pytest.approx(on_cpu, abs=0.02)


@pytest.mark.parametrize("augmentation", [None, "detr"])
@pytest.mark.parametrize("image_size", [40, 200])  # below and above those of the pictures
def test_images_resized_on_a_gpu_are_nearly_those_of_the_cpu(coco, augmentation, image_size):
    args, _ = tiny_options("--coco_path", coco, "--image_size", image_size)
    dataset = build_dataset("val2017", args, augmentation=augmentation)
    plain, there = (build_loader(dataset, 2, shuffle=False, num_workers=1, device=device) for device in (CPU, CUDA))
    for (images, targets), (expected_images, expected_targets) in zip(there, plain, strict=True):
        for image, expected in zip(images, expected_images, strict=True):
            assert image.device.type == CUDA.type and image.shape == expected.shape
            levels = (image.cpu() - expected).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
            assert levels.max() <= 2.001 and (levels > 1.5).float().mean() <= 1e-3
            assert (levels > 0.5).float().mean() <= 0.05
        for target, expected in zip(targets, expected_targets, strict=True):
            assert all(torch.equal(target[key], value) for key, value in expected.items())


@pytest.mark.parametrize("cache_device", ["same", "cpu"])
def test_a_search_completes_and_its_output_evaluates(annotated, tmp_path, cache_device):
    words = f"--coco_path {annotated} --output_dir {tmp_path} --resume {annotated}/dense.pth --device {CUDA} "
    words += f"--num_workers 0 --search_split val2017 --cache_device {cache_device} {QUICK_SEARCH}"
    args, typed = parse(get_pruning_parser(MGP, "a test"), words.split())
    result = search(MGP, args, typed)
    args, typed = options("--coco_path", annotated, "--resume", result.path, "--eval")
    settings, checkpoint, _ = settled(args)
    model, _, postprocessors = built(settings, checkpoint)
    assert model.widths == result.widths
    truth = GroundTruth(annotation_path(annotated, "val2017"))
    loader = build_loader(build_dataset("val2017", settings.data), 2, shuffle=False)
    found = engine.evaluate(
        model.to(CUDA), postprocessors["bbox"], loader, truth, device=CUDA, progress=False
    )  # fmt: skip
    assert found.stats["AP"] == pytest.approx(result.ap, abs=0.02)
