"""Methods: search, ranking, direction and reconstruction, which with a `Schedule` define a pruning run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way to prune a module to a width.

    Attributes:
        search: `global` predicts every module's damage, chooses all widths at once and narrows the range of budgets;
            `bisect` visits one module after the other, ranks its channels once and halves the range of its widths;
            `grow` also visits, and adds the best of a few random channels to an empty module step by step, scoring
            again each time (Huang et al. 2025).
        ranking: one of `pruning.scores.RANKINGS`.
        direction: one of `pruning.selection.DIRECTIONS`, how scores become an order; `grow` ignores it.
        reconstruction: one of `pruning.reconstruction.LEVELS`.
        share_sets: whether values share the index set of queries and keys.
    """

    search: str
    ranking: str
    direction: str
    reconstruction: str
    share_sets: bool

    @property
    def uses_sensitivities(self) -> bool:
        """Whether the method fits weights or predicts damages, so that it needs gradients at the modules' outputs."""
        return self.search == "global" or self.reconstruction != "none" or self.ranking == "elimination"

    @property
    def is_calibrated(self) -> bool:
        """Whether the method needs activations or gradients of calibration images."""
        return self.uses_sensitivities or self.ranking in ("fisher", "first_order")


FAST = Method("global", "elimination", "backward", "full", share_sets=False)
VISIT = Method("bisect", "elimination", "backward", "full", share_sets=False)
PAPER = Method("grow", "exact", "forward", "none", share_sets=True)
METHODS = {"fast": FAST, "visit": VISIT, "paper": PAPER}
