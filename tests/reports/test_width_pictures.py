"""Pictures of widths with removed modules."""

from models.widths import Widths
from reports.charts import widths_plots
from reports.plots import plot_widths

BEFORE = Widths.parse([[[32, 32]], [[32, 32, 32]], [[8], [16]]])
AFTER = Widths.parse([[[0, 8]], [[0, 32, 0]], [[0], [16]]])


def test_pictures_show_modules_of_width_0(tmp_path):
    assert len(widths_plots(BEFORE, AFTER)) == 3
    plot_widths(tmp_path / "widths.png", BEFORE, AFTER)
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")
