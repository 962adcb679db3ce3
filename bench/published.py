"""Costs of the widths that the paper published: `python -m bench.published`.

Huang et al., J. Donghua Univ. (Eng.) 42(1), 2025: ResNet-50, 6 + 6 layers, 300 queries, 91 classes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from models import build
from models.config import DetectorConfig
from models.widths import Widths
from pruning.cost import PAPER_IMAGE_SIZE_HW, Cost, cost_of, cost_table
from util.environment import environment
from util.errors import run_cli
from util.files import write_json

COCO_CLASSES = 91
GP_WIDTHS = Widths.parse(
    "[[[152,416],[232,1408],[216,1504],[232,1248],[224,1472],[248,1344]],"
    "[[8,136,544],[184,192,1216],[240,168,1920],[232,256,800],[256,192,960],[256,216,1216]]]"
)
MGP_WIDTHS = Widths.parse(
    "[[[160,32],[176,672],[216,608],[224,1344],[248,1248],[248,1152]],"
    "[[8,96,640],[120,120,1248],[224,160,1120],[176,144,576],[224,256,672],[216,152,1472]]]"
)
# COCO AP on val2017 as the paper reports it, slim detectors fine-tuned; not measured here.
PAPER_AP_POINTS = {"dense": 44.6, "GP of the paper": 45.4, "MGP of the paper": 45.3}
PUBLISHED = {"dense": None, "GP of the paper": GP_WIDTHS, "MGP of the paper": MGP_WIDTHS}


def published_costs() -> dict[str, Cost]:
    """Return the costs of the dense detector and of the published widths for an image of 800 x 1088 pixels."""
    costs = {}
    for name, widths in PUBLISHED.items():
        with torch.device("meta"):
            model, _, _ = build(DetectorConfig(num_classes=COCO_CLASSES, cfgs=widths))
        costs[name] = cost_of(model, PAPER_IMAGE_SIZE_HW)
    return costs


def main() -> None:
    """Print the table and write the JSON."""
    costs = published_costs()
    print(cost_table(list(costs.items())))
    path = Path(__file__).resolve().parent / "results" / "published_costs.json"
    write_json(path, {
        "image_size_hw": PAPER_IMAGE_SIZE_HW, "environment": environment(),
        "costs": {name: cost.to_dict() for name, cost in costs.items()},
    })  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
