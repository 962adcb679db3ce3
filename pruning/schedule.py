"""When a module is visited, which mAP it must reach, when its width is accepted: the paper's two searches as values.

Huang et al., J. Donghua Univ. (Eng.) 42(1), 2025: greedy pruning (GP) and modular greedy pruning (MGP). Every AP here
is in [0, 1] unless its name says points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """One way to walk through a network.

    Attributes:
        name: Short name, as logs and files show it.
        groups: Roles of modules (`encoder.attention`, `decoder.ffn`, ...) visited group after group, inside a group in
            network order.
        points_per_module: AP points (hundredths) by which the target falls from one visited module to the next.
        fraction_per_module: Fraction of itself by which the target falls from one visited module to the next; None
            means as much as `skip`.
        full_reference: What a visit holds the mAP of the whole split against: the module's own `target`, or `base`.
        map_tol: Fraction by which the mAP of the whole split may stay below its reference.
        skip: Fraction by which the mAP of the subset may stay below the target (`--skip_eval_converge`).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    points_per_module: float
    fraction_per_module: float | None
    full_reference: Literal["target", "base"]
    map_tol: float
    skip: float

    def order(self, module_names: Iterable[str]) -> tuple[str, ...]:
        """Names such as `encoder.0.ffn`, given in network order, in the order of the visits."""
        names = tuple(module_names)
        ordered = tuple(name for group in self.groups for name in names if role_of(name) in group)
        if len(ordered) != len(names):
            raise ValueError(f"{self.name} visits {len(ordered)} of the modules {names}, expected each of them once")
        return ordered

    def target_ap(self, base_ap: float, visit: int) -> float:
        """The mAP that the `visit`-th module (counted from 0) is held to; 0 or below where the targets fall too far."""
        fraction = self.skip if self.fraction_per_module is None else self.fraction_per_module
        return (base_ap - self.points_per_module / 100 * visit) * (1 - fraction) ** visit

    def subset_threshold_ap(self, base_ap: float, visit: int) -> float:
        """The least mAP of the subset with which the whole split is looked at."""
        return (1 - self.skip) * self.target_ap(base_ap, visit)

    def full_threshold_ap(self, base_ap: float, visit: int) -> float:
        """The least mAP of the whole split with which the width of the `visit`-th module is accepted."""
        reference_ap = base_ap if self.full_reference == "base" else self.target_ap(base_ap, visit)
        return (1 - self.map_tol) * reference_ap

    def fast_threshold_ap(self, base_ap: float) -> float:
        """The least mAP of the whole split with which a search of all modules at once accepts a division.

        The falling targets belong to visits. A detector held to the last of them would lose 14.5 points on COCO.
        """
        return (1 - self.map_tol) * base_ap


def role_of(module_name: str) -> str:
    """`encoder.3.ffn` -> `encoder.ffn`."""
    stack, _, block = module_name.split(".")
    return f"{stack}.{block}"


GP = Schedule(
    name="gp",
    groups=(
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
