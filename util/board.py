"""Write scalars for TensorBoard (`--tensorboard`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from util import distributed
from util.errors import UserError
from util.files import move_aside
from util.logging import get_logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class Board:
    """Write event files to `output_dir/tensorboard` in the main process.

    Args:
        output_dir: the run's folder.
        enabled: write anything at all.

    Raises:
        UserError: the package is missing; raised in every process and before anything is written.
    """

    def __init__(self, output_dir: Path, enabled: bool) -> None:
        if enabled and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard: found no package tensorboard, expected it (pip install tensorboard)")
        self.folder = output_dir / FOLDER
        self.enabled = enabled and distributed.is_main()
        self._writer: SummaryWriter | None = None

    def open(self, done: int = 0) -> None:
        """Continue an older run after step `done`; if 0, move older event files aside and start new ones."""
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            if not done:
                move_aside(self.folder)
            # Steps that a killed run wrote after its last checkpoint are written again.
            self._writer = SummaryWriter(str(self.folder), purge_step=done + 1 if done else None)
        except OSError as error:
            self._give_up(error)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Add a point to the curve of each name; values that are not finite are skipped."""
        if self._writer is None:
            return
        try:
            for name, value in scalars.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Warn and write no more curves: this must not end a run, least of all one process of several."""
        get_logger().warning("--tensorboard: %s cannot be written (%s); no more curves", self.folder, error)
        self._writer = None

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
