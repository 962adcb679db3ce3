"""Time how pictures are read on one core: as version 0.2.0 did, and now.

    python -m bench.pictures --images 100 --output bench/results/pictures.json

Version 0.2.0 resized and normalised in the workers, which sent float32 images. Now they send uint8, and the device
normalises; a GPU also resizes. Both ways take turns, and give the same images to the bit. Times are CPU time of all
processes for each image, so that other work on the machine counts little. The JPEGs are drawn.
"""

from __future__ import annotations

import functools
import io
import json
import math
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as picture_functions

from datasets.coco import CPU, CocoDataset, build_loader
from datasets.decode import FORMATS, read_upright
from datasets.packing import pack
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transforms, model_input, resized, scaled
from util.cli import script_parser, user_path, whole
from util.environment import environment
from util.errors import run_cli
from util.files import write_json

SIZE_HW = (480, 640)
BATCH_SIZE = 4
OBJECTS = 7  # in each picture, as in COCO
# What is timed; the names of the table. For a GPU, what it does itself, the copies to it and page-locking are missing.
STEPS = (
    "decode",
    "resize",
    "normalise",
    "work of a worker",
    "work of a worker, for a GPU",
    "loader without workers",
    "loader with one worker",
    "loader with one worker, for a GPU",
)


class FormerDataset(CocoDataset):
    """The data set of version 0.2.0: each sample is a normalised float32 image with its target."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image (3 x h x w) and its target."""
        image, _, target = self.sample(index)
        return image, target

    def picture(self, index: int) -> Tensor:
        """Return an image (uint8 3 x H x W)."""
        return former_decode(self.image_path(index))


def former_decode(path: Path) -> Tensor:
    """Decode a file to uint8 3 x H x W."""
    with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
        image.load()
        return picture_functions.pil_to_tensor(image.convert("RGB"))


class FormerModelInput(v2.Transform):
    """Normalise a uint8 image (3 x H x W)."""

    def __init__(self) -> None:
        super().__init__()
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        self.scale, self.shift = 1 / (255 * std), -torch.tensor(IMAGENET_MEAN)[:, None, None] / std

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Normalise an image; boxes are unchanged."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = inpt.as_subclass(Tensor).to(torch.float32, memory_format=torch.contiguous_format)
        return tv_tensors.Image(torch.addcmul(self.shift, pixels, self.scale))


def former_transforms(image_size: int) -> v2.Compose:
    """Return the transforms of evaluation, with the resize and the normalisation in them."""
    return v2.Compose([v2.Resize(image_size, max_size=scaled(1333, image_size)), FormerModelInput()])


def former_pack(batch: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list, list]:
    """Pack a batch of float32 images to one tensor, their shapes, and targets."""
    targets = [{name: value.numpy() for name, value in target.items()} for _, target in batch]
    return torch.cat([image.flatten() for image, _ in batch]), [image.shape for image, _ in batch], targets


def former_batches(dataset: Dataset, num_workers: int) -> Iterable[list[Tensor]]:
    """Yield the images of each batch."""
    loader: DataLoader = DataLoader(dataset, BATCH_SIZE, num_workers=num_workers, collate_fn=former_pack)
    for flat, shapes, targets in loader:
        parts = flat.split([math.prod(shape) for shape in shapes])
        [{name: torch.from_numpy(np.asarray(value)) for name, value in target.items()} for target in targets]
        yield [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def draw_set(folder: Path, images: int, seed: int = 0) -> Path:
    """Write JPEGs of soft shapes and noise, about as large as COCO's, to `folder`; return their annotation file."""
    generator = np.random.default_rng(seed)
    height, width = SIZE_HW
    tables: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(images):
        blocks = Image.fromarray(generator.integers(0, 256, (15, 20, 3), np.uint8))
        soft = np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        pixels = (soft + generator.normal(0, 16, soft.shape)).clip(0, 255).astype(np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=90)
        tables["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for box in (generator.random((OBJECTS, 4)) * [width / 2, height / 2, width / 2, height / 2]).tolist():
            entry = {"id": len(tables["annotations"]) + 1, "image_id": number, "category_id": 1, "bbox": box}
            tables["annotations"].append(entry)
    path = folder / "annotations.json"
    path.write_text(json.dumps(tables), encoding="utf-8")
    return path


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its processes that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


Run = Callable[[], object]


def pairs(folder: Path, annotation_file: Path, image_size: int) -> dict[str, tuple[Run, Run]]:
    """Return for each of `STEPS` two functions that take it over all pictures, the former way and now."""
    former = FormerDataset(folder, annotation_file, former_transforms(image_size))
    dataset = CocoDataset(folder, annotation_file, eval_transforms(image_size))
    indices = range(len(dataset))
    paths = [dataset.image_path(index) for index in indices]
    pictures = [dataset.picture(index) for index in indices]
    sizes_hw = [dataset.sample(index).size_hw for index in indices]
    levels = [resized(picture, size_hw) for picture, size_hw in zip(pictures, sizes_hw, strict=True)]
    normalise = FormerModelInput()

    def each(function: Callable[..., object], *arguments: Iterable[Any]) -> Run:
        def run() -> None:
            for values in zip(*arguments, strict=True):
                function(*values)

        return run

    def passes(batches: Callable[[], Iterable[Any]]) -> Run:
        return lambda: [None for _ in batches()]

    def packed(resizes: bool) -> Run:
        return each(lambda index: pack([dataset.sample(index)], resizes=resizes), indices)

    former_worker = each(lambda index: former_pack([former[index]]), indices)
    found: list[tuple[Run, Run]] = [
        (each(former_decode, paths), each(read_upright, paths)),
        (each(lambda p, size: picture_functions.resize(p, list(size)), pictures, sizes_hw),
         each(resized, pictures, sizes_hw)),
        (each(lambda p: normalise(tv_tensors.Image(p)), levels), each(model_input, levels, sizes_hw)),
        (former_worker, packed(True)),
        (former_worker, packed(False)),
    ]  # fmt: skip
    for num_workers in (0, 1):
        loader = build_loader(dataset, BATCH_SIZE, shuffle=False, num_workers=num_workers, device=CPU)
        found.append(
            (passes(functools.partial(former_batches, former, num_workers)), passes(functools.partial(iter, loader)))
        )
    for_gpu: DataLoader = DataLoader(
        loader.dataset, BATCH_SIZE, num_workers=1, collate_fn=functools.partial(pack, resizes=False)
    )
    found.append((found[-1][0], passes(functools.partial(iter, for_gpu))))
    return dict(zip(STEPS, found, strict=True))


def measure(images: int, rounds: int, image_size: int = 800) -> dict[str, Any]:
    """Return the CPU milliseconds an image of each step, medians of the rounds, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotation_file = draw_set(folder, images)
        kilobytes = sum(path.stat().st_size for path in folder.glob("*.jpg")) / images / 1000
        steps = pairs(folder, annotation_file, image_size)
        times: dict[str, list[list[float]]] = {step: [[], []] for step in steps}
        for turn in range(rounds + 1):
            for step, ways in steps.items():
                for found, way in zip(times[step], ways, strict=True):
                    start = cpu_seconds()
                    way()
                    if turn:  # the first is for warm-up
                        found.append(1000 * (cpu_seconds() - start) / images)
        size_hw = CocoDataset(folder, annotation_file, eval_transforms(image_size)).sample(0).size_hw
    rows = []
    for step, found in times.items():
        before, now = map(statistics.median, found)
        rows.append({"step": step, "ms_before": before, "ms_now": now, "times_as_fast": before / now})
    made = {"environment": environment(), "images": images, "rounds": rounds, "kilobytes": kilobytes}
    return {**made, "size_hw": SIZE_HW, "resized_hw": size_hw, "rows": rows}


def main() -> None:
    """Run the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.pictures")
    parser.add_argument("--images", type=whole(1), default=100, help="number of pictures")
    parser.add_argument("--rounds", type=whole(1), default=5, help="rounds to time, after a warm-up round")
    parser.add_argument("--output", type=user_path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.images, args.rounds)
    print(f"{'':<34} {'ms before':>10} {'ms now':>8} {'times as fast':>14}")
    for row in found["rows"]:
        print(f"{row['step']:<34} {row['ms_before']:>10.2f} {row['ms_now']:>8.2f} {row['times_as_fast']:>14.1f}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)


if __name__ == "__main__":
    run_cli(main)
