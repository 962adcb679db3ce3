"""How channels are chosen and what becomes of the layers around them: everything of a search but its schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way to prune a module to a width.

    Attributes:
        search: `global` predicts every module's damage and prices all widths at once, halving the range of what may
            stay; `bisect` visits one module after the other, ranks its channels once and halves the range of its
            widths; `grow` visits, too, and adds the best of a few drawn channels to an empty module step by step,
            scoring anew each time (Huang et al. 2025).
        ranking: one of `pruning.scores.RANKINGS`.
        direction: one of `pruning.selection.DIRECTIONS`, how a ranking becomes an order; a search that grows has its
            own.
        reconstruction: one of `pruning.reconstruction.LEVELS`.
        share_sets: one index set for queries, keys and values, or one for queries and keys and one for values.
    """

    search: str
    ranking: str
    direction: str
    reconstruction: str
    share_sets: bool

    @property
    def is_calibrated(self) -> bool:
        """Whether activations of calibration images are looked at."""
        looked_at = self.search == "global" or self.reconstruction != "none"
        return looked_at or self.ranking in ("elimination", "fisher", "first_order", "magnitude")


FAST = Method("global", "elimination", "backward", "full", share_sets=False)
VISIT = Method("bisect", "elimination", "backward", "full", share_sets=False)
PAPER = Method("grow", "exact", "forward", "none", share_sets=True)
METHODS = {"fast": FAST, "visit": VISIT, "paper": PAPER}
