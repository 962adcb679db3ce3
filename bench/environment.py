"""What a figure was measured with, for the JSON files that benchmarks leave."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, versions and machine, as JSON takes them."""
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
