"""A search without a network: modules that only know their widths, and mAP as a function of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from models.prunable import ParameterSlice, PrunableModule
from pruning.kept_channels import Kept, width_of
from pruning.method import PAPER, Method
from pruning.search import Prediction
from pruning.selection import Order
from pruning.state_cache import PassCounter


def fake_module(name: str, width: int, nheads: int, is_attention: bool, is_deformable: bool = False) -> PrunableModule:
    """Channels without weights."""
    parts = ("hidden",) if not is_attention else ("value",) if is_deformable else ("query", "value")
    slices = tuple(ParameterSlice(f"{name}.{part}", 0, (part,)) for part in parts)
    kind = "cross_attention" if is_attention else "ffn"
    return PrunableModule(name, kind, width, nheads, SimpleNamespace(gates={}), slices)


@dataclass
class FakeBench:
    """A `Workbench` whose mAP is `ap(widths of all modules, whole split?)` and that notes what it is asked.

    `damage` is that of a module at a width; channels are chosen in their own order in each head.
    """

    modules: Mapping[str, PrunableModule]
    ap: Callable[[dict[str, int], bool], float]
    scores: Callable[[str, Tensor], Tensor] = lambda name, candidates: candidates.double()
    damage: Callable[[str, int], float] = lambda name, width: 0.0
    method: Method = PAPER
    asked: list[tuple] = field(default_factory=list)
    counter: PassCounter = field(default_factory=lambda: PassCounter({}))
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.widths = {name: module.width for name, module in self.modules.items()}

    def ranking(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        self.asked.append(("score", module.name, width_of(kept), len(candidates)))
        return self.scores(module.name, candidates)

    def begin(self, name: str) -> None:
        self.begun = name
        self.asked.append(("begin", name))

    def reset(self) -> None:
        self.asked.append(("reset",))
        self.__post_init__()

    def rank(self, name: str) -> Order:
        return Order.natural(self.modules[name])

    def save(self) -> dict[str, int]:
        return dict(self.widths)

    def load(self, saved: dict[str, int]) -> None:
        self.asked.append(("load",))
        self.widths = dict(saved)

    def set_kept(self, name: str, kept: Kept) -> float:
        self.widths[name] = width_of(kept)
        return self.damage(name, self.widths[name])

    def damages(self, name: str, order: Order, widths: Sequence[int]) -> dict[int, float]:
        damages = {width: self.set_kept(name, order.kept(width)) for width in widths}
        self.set_kept(name, order.kept(self.modules[name].width))
        return damages

    def predict(self, name: str, widths: Sequence[int]) -> Callable[[], Prediction]:
        order = self.rank(name)
        damages = self.damages(name, order, widths)
        return lambda: (order, damages)

    def subset_ap(self, name: str) -> float:
        self.asked.append(("subset", name, self.widths[name]))
        return self.ap(self.widths, False)

    def full_ap(self) -> float:
        self.asked.append(("full", self.begun, self.widths[self.begun]))
        return self.ap(self.widths, True)

    def transformer_params(self, kept: Mapping[str, Kept]) -> int:
        return sum(map(width_of, kept.values()))


def fake_modules() -> dict[str, PrunableModule]:
    """An attention of 2 heads x 4 channels and an FFN of 6 channels."""
    return {
        "encoder.0.attention": fake_module("encoder.0.attention", 8, 2, True),
        "encoder.0.ffn": fake_module("encoder.0.ffn", 6, 1, False),
    }


def constant(ap: float) -> Callable[..., float]:
    """mAP that does not depend on anything."""
    return lambda widths, whole: ap


def equal_heads(kept: Kept, head_width: int) -> bool:
    """True where every head has as many channels as the others, in both parts."""
    counts = [torch.bincount(indices // head_width).tolist() for indices in kept.values()]
    return all(len(set(part)) == 1 for part in counts) and counts[0] == counts[-1]
