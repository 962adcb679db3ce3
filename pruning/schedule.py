"""Schedules: the order of the visits, and the mAP that a module must reach for its width to be accepted.

GP and MGP are greedy pruning and modular greedy pruning of Huang et al., J. Donghua Univ. (Eng.) 42(1), 2025. AP is in
[0, 1] unless its name contains points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from models.widths import BACKBONE


@dataclass(frozen=True)
class Schedule:
    """Order and mAP thresholds of a search by visits.

    Attributes:
        name: short name for logs and files.
        groups: roles of modules (`encoder.attention`, `decoder.ffn`, ...), visited group by group, in network order
            within a group.
        points_per_module: AP points (hundredths) by which the target falls from one visit to the next.
        fraction_per_module: fraction by which the target falls from one visit to the next; None for `skip`.
        full_reference: reference for the mAP of the whole split: the module's own `target`, or `base`.
        map_tol: fraction by which the mAP of the whole split may be below its reference.
        skip: fraction by which the mAP of the subset may be below the target (`--skip_eval_converge`).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    points_per_module: float
    fraction_per_module: float | None
    full_reference: Literal["target", "base"]
    map_tol: float
    skip: float

    def order(self, module_names: Iterable[str]) -> tuple[str, ...]:
        """Sort module names such as `encoder.0.ffn`, given in network order, into the order of the visits."""
        names = tuple(module_names)
        ordered = tuple(name for group in self.groups for name in names if role_of(name) in group)
        if len(ordered) != len(names):
            raise ValueError(f"{self.name} visits {len(ordered)} of the modules {names}, expected each of them once")
        return ordered

    def target_ap(self, base_ap: float, visit: int) -> float:
        """Return the target mAP of a visit (from 0); it may fall to 0 or below."""
        fraction = self.skip if self.fraction_per_module is None else self.fraction_per_module
        return (base_ap - self.points_per_module / 100 * visit) * (1 - fraction) ** visit

    def subset_threshold_ap(self, base_ap: float, visit: int) -> float:
        """Return the least mAP of the subset for which the whole split is evaluated."""
        return (1 - self.skip) * self.target_ap(base_ap, visit)

    def full_threshold_ap(self, base_ap: float, visit: int) -> float:
        """Return the least mAP of the whole split for which a visit accepts a width."""
        reference_ap = base_ap if self.full_reference == "base" else self.target_ap(base_ap, visit)
        return (1 - self.map_tol) * reference_ap

    def fast_threshold_ap(self, base_ap: float) -> float:
        """Return the least mAP of the whole split for which a global search accepts an allocation.

        It ignores the falling targets, which are for visits: the last of them is 14.5 points lower on COCO.
        """
        return (1 - self.map_tol) * base_ap


def role_of(module_name: str) -> str:
    """Return the role of a module: `encoder.ffn` for `encoder.3.ffn`, `backbone` for a residual block."""
    stack, _, block = module_name.split(".")
    return stack if stack == BACKBONE else f"{stack}.{block}"


GP = Schedule(
    name="gp",
    groups=(
        (BACKBONE,),
        ("encoder.attention", "encoder.ffn"),
        ("decoder.self_attention", "decoder.cross_attention", "decoder.ffn"),
    ),
    points_per_module=0.5,
    fraction_per_module=0.0,
    full_reference="target",
    map_tol=0.02,
    skip=0.0,
)

MGP = Schedule(
    name="mgp",
    groups=(
        (BACKBONE,),
        ("encoder.attention",),
        ("decoder.self_attention",),
        ("decoder.cross_attention",),
        ("encoder.ffn",),
        ("decoder.ffn",),
    ),
    points_per_module=0.0,
    fraction_per_module=None,
    full_reference="base",
    map_tol=0.10,
    skip=0.02,
)
