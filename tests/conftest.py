"""Fixtures that several tests share."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from reports.plots import cost_axis
from tests.tiny_run import write_coco

# The files that take longest, in the order in which two workers take them: both then end at about the same time.
SLOW_FILES = (
    "test_export.py",
    "test_resume.py",
    "test_processes.py",
    "test_ops.py",
    "test_build.py",
    "test_cuda_emulation.py",
    "test_batches.py",
    "test_end_to_end.py",
    "test_main.py",
    "test_crash.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slow files first; tests of one file stay together."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A data set of 4 + 4 images; not to be changed."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module", autouse=True)
def draw_reports():
    """Reports stay empty, and pictures of a search are no pictures, where tests are not about them.

    Drawing them takes longer than many a tiny run.
    """

    def write(path: Path, *_: object) -> None:
        path.write_bytes(b"a picture")

    drawings = SimpleNamespace(plot_widths=write, plot_ap_against_cost=write, plot_curve=write, cost_axis=cost_axis)
    with mock.patch("reports.report.render", return_value=""), mock.patch("runs.search_results.plots", drawings):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are quickest on one thread, and every machine then sums in the same order."""
    torch.set_num_threads(1)
