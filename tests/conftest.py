"""Fixtures that several tests share."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.tiny_run import write_coco


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A data set of 4 + 4 images; not to be changed."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module", autouse=True)
def draw_reports():
    """Reports stay empty where tests are not about them: drawing one takes longer than many a tiny run."""
    with mock.patch("reports.report.render", return_value=""):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are quickest on one thread, and every machine then sums in the same order."""
    torch.set_num_threads(1)
