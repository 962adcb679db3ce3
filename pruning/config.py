"""Options of a search, and the schedule, method and units they define."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import engine
from models.config import LossConfig
from models.prunable import SCOPES
from pruning.method import FAST, METHODS, Method
from pruning.reconstruction import LEVELS
from pruning.schedule import MGP, Schedule
from pruning.scores import RANKINGS
from pruning.search import Units
from pruning.selection import DIRECTIONS
from util.cli import Config, option, options_of, real, refuse, whole
from util.errors import UserError, shorten

PRECISIONS: dict[str, Any] = {"nargs": "?", "choices": tuple(engine.AMP_DTYPES), "const": "bf16"}
CALIBRATION_IMAGES = 128  # on the demo, 320 keep no more mAP, and 64 about half a point less
DETECTOR_CALIBRATION_IMAGES = 512  # fits of convolutions have more unknowns; 128 lose 0.3 AP on the demo
TRAIN_IMAGES = 2000  # of train2017, without --search_images
CACHE_DTYPES = ("same", "bfloat16")
COSTS = ("params", "macs", "latency")
TARGETS = ("map_tol", "skip_eval_converge")
FRACTION, MILLISECONDS = real(0.001, at_most=1), real(0.001)
# Options that only some searches use.
READ_BY_VISITS = ("subset_batches_attention", "subset_batches_ffn", "decay_points", "decay_fraction")
READ_BY = {
    "fast": ("keep", "target_ms", "keep_params", "min_dec_layers", "cost", "latency_table", "selection"),
    "visit": (*READ_BY_VISITS, "selection"),
    "paper": (*READ_BY_VISITS, "num_candidates_attention", "num_candidates_ffn"),
}


def _numbers(name: str, kind: Callable[[str], float]) -> Callable[[Any], list[float]]:
    """Return a function that reads the values of an option: one number, as older versions stored it, or several."""

    def read(values: Any) -> list[float]:
        found = list(values) if isinstance(values, list | tuple) else [values]
        for value in found:
            try:
                is_valid = type(value) in (int, float) and kind(str(value)) == value
            except (argparse.ArgumentTypeError, ValueError):
                is_valid = False
            if not is_valid:
                raise UserError(f"found {shorten(value)} under `args.{name}`, expected a number of --{name}")
        return found

    return read


def _keep_name(keep: float) -> str:
    return f"{keep:.2f}" if round(keep, 2) == keep else f"{keep:g}"


def _ms_name(target_ms: float) -> str:
    return f"{target_ms:g}ms"


def _images(text: str) -> int | str:
    """Option type: a number of images, or "all"."""
    if text == "all":
        return text
    try:
        return whole(1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text:.40}: expected a whole number from 1 up, or all") from None


@dataclass(frozen=True)
class PrecisionConfig(Config):
    """Precision of a search."""

    amp: str = option("off", **PRECISIONS, help="mixed precision of the gradients that predict damage, and of the "
        "passes that --cost latency times; --amp alone is bf16")  # fmt: skip
    eval_amp: str = option("off", **PRECISIONS, help="mixed precision of mAP and of cached features and "
        "states; off is float32, as in main.py --eval, whatever --amp says")  # fmt: skip


@dataclass(frozen=True)
class TargetConfig(Config):
    """Targets of a search; each script has the defaults of its schedule."""

    map_tol: float = option(MGP.map_tol, type=real(0, 1), help="fraction by which the full mAP may fall below that "
        "before the search; in a GP search by visits, below the module's target")  # fmt: skip
    skip_eval_converge: float = option(MGP.skip, type=real(0, 1), help="fraction by which the subset's mAP may miss "
        "the target of a visit; --search fast accepts this option of the paper's commands but does not use "
        "it")  # fmt: skip
    decay_points: float = option(MGP.points_per_module, type=real(0), help="AP points by which the target falls from "
        "visit to visit (--search visit and paper)")  # fmt: skip
    decay_fraction: float | None = option(MGP.fraction_per_module, type=real(0, 1), help="fraction by which the target "
        "falls from visit to visit (--search visit and paper); prune_greedy_ad.py takes --skip_eval_converge by "
        "default")  # fmt: skip
    scope: str = option("transformer", choices=SCOPES, help="what is pruned: attentions and FFNs (transformer, the "
        "paper's scope), or also the backbone's residual blocks (detector)")  # fmt: skip
    keep: list[float] | None = option(None, type=FRACTION, nargs="+", read=_numbers("keep", FRACTION),
        help="fraction of the scope's cost to keep, such as 0.5, whatever the mAP; several give a detector for each; "
        "by default as little as --map_tol allows")  # fmt: skip
    target_ms: list[float] | None = option(None, type=MILLISECONDS, nargs="+", read=_numbers("target_ms", MILLISECONDS),
        help="milliseconds that the whole detector may take for a batch of --batch_size images, whatever the mAP; "
        "several give a detector for each (--cost latency)")  # fmt: skip
    keep_params: float | None = option(None, type=FRACTION, help="fraction of the scope's parameters to keep at most, "
        "besides --keep or --target_ms")  # fmt: skip
    cost: str | None = option(None, choices=COSTS, help="cost that the fast search reduces: parameters, "
        "multiply-accumulates at the size of the first image, or the time measured on --device for a batch of "
        "--batch_size such images; by default params for --scope transformer, macs for --scope detector, latency with "
        "--target_ms")  # fmt: skip
    min_dec_layers: int | None = option(None, type=whole(1), help="also try to drop the last decoder layers, and "
        "leave at least so many; by default none is dropped")  # fmt: skip
    latency_table: str | None = option(None, type=os.path.expanduser, metavar="FILE", stored="run", help="use the "
        "latency.json of an earlier search and measure nothing (--cost latency)")  # fmt: skip


@dataclass(frozen=True)
class MethodConfig(Config):
    """Choice and reconstruction of channels; None stands for the value in `METHODS[search]`."""

    search: str = option("fast", choices=tuple(METHODS), help="fast: predict the damage of every width, choose all "
        "widths at once, measure mAP at most four times; visit: module after module, each to the least width on "
        "target; paper: as visit, but each module grows from nothing by the exact loss of one batch, with one index "
        "set and no reconstruction")  # fmt: skip
    ranking: str | None = option(None, choices=RANKINGS, help="score that channels are chosen by; only for FFNs if "
        f"--reconstruct full computes attention channels; by default that of --search ({FAST.ranking}, paper: "
        "exact)")  # fmt: skip
    selection: str | None = option(None, choices=DIRECTIONS, help="how to order channels by score, by default "
        f"that of --search ({FAST.direction}); the paper's search always grows")  # fmt: skip
    reconstruct: str | None = option(None, choices=LEVELS, help="refit kept channels in closed form: the layer after "
        "the cut (output), also queries, keys and values (full), or none; by default that of --search "
        f"({FAST.reconstruction}, paper: none)")  # fmt: skip
    index_sets: str | None = option(None, choices=("own", "shared"), help="choose channels of queries and keys apart "
        "from those of values (own), or together (shared); by default own, for --search paper shared")  # fmt: skip
    calibration_images: int | None = option(None, type=whole(1), help="number of first images used "
        f"for moments and gradients; by default {CALIBRATION_IMAGES}, {DETECTOR_CALIBRATION_IMAGES} for --scope "
        "detector")  # fmt: skip


@dataclass(frozen=True)
class StepConfig(Config):
    """Steps of widths, images of a search and their cache."""

    attention_unit: int = option(1, type=whole(1), help="step of attention widths in channels per head: "
        "head widths are multiples of it, or unpruned. With 4 in float32 and 8 in 16 bits, CUDA kernels need no "
        "padding")  # fmt: skip
    ffn_unit: int | None = option(None, type=whole(1), help="step of FFN widths in channels: a multiple of it, "
        "or unpruned; by default 4 * nheads")  # fmt: skip
    block_unit: int = option(8, type=whole(1), help="step of the inner width of residual blocks in channels: a "
        "multiple of it, or unpruned (--scope detector)")  # fmt: skip
    min_units: int = option(1, type=whole(0, at_most=1), help="least steps of width that a module keeps; 0 lets the "
        "search remove whole attentions, FFNs and residual blocks, which then add only a constant")  # fmt: skip
    num_candidates_attention: int = option(100, "most attention channels scored in a step", type=whole(1))
    num_candidates_ffn: int = option(200, "most FFN channels scored in a step", type=whole(1))
    subset_batches_attention: int = option(40, "batches of the subset for an attention", type=whole(1))
    subset_batches_ffn: int = option(20, "batches of the subset for an FFN", type=whole(1))
    search_split: str | None = option(None, choices=("val2017", "train2017"), help="images to search on, by "
        "default train2017, and val2017 for --search visit and paper, as in the paper; for a fair AP, search on "
        "train2017 and report val2017")  # fmt: skip
    search_images: int | str | None = option(None, type=_images, metavar="N|all", help="use the first N images of the "
        f"split; by default {TRAIN_IMAGES:,} of train2017 and all of val2017")  # fmt: skip
    images_at_once: int = option(32, type=whole(1), stored="run", help="most images in a forward pass over several "
        "candidates")  # fmt: skip
    cache_device: str = option("same", choices=("cpu", "same"), stored="run", help="where to cache features: RAM, or "
        "--device; RAM if they do not fit a GPU's free memory")  # fmt: skip
    cache_gb: float | None = option(None, type=real(0), stored="run", help="gigabytes of cached features and states, "
        "at most, in each process; the rest is recomputed each time. By default the free memory minus a "
        "margin")  # fmt: skip
    cache_dtype: str | None = option(None, choices=CACHE_DTYPES, help="precision of cached features: that in "
        "which they are computed, or bfloat16, half the size; by default bfloat16 only if more does not "
        "fit")  # fmt: skip
    resume_search: bool = option(False, stored="run", help="continue the search whose journal is in --output_dir, as "
        "if nothing had stopped it")  # fmt: skip
    use_dn: bool = option(True, stored="run", help="for the fine-tuning command that the search prints; a search has "
        "no denoising queries")  # fmt: skip


@dataclass(frozen=True)
class SearchConfig(PrecisionConfig, TargetConfig, MethodConfig, StepConfig):
    """How to search."""

    @property
    def cost_unit(self) -> str:
        """Cost that the fast search reduces, one of `COSTS`."""
        if self.cost is None and self.target_ms is not None:
            return "latency"
        return self.cost or ("macs" if self.scope == "detector" else "params")

    @property
    def has_budget(self) -> bool:
        """Whether a cost is asked for, whatever the mAP."""
        return bool(self.budgets)

    @property
    def budgets(self) -> dict[str, float]:
        """The values of --keep or --target_ms by the names in the output files, the least first."""
        if self.target_ms is not None:
            return {_ms_name(value): value for value in sorted(self.target_ms)}
        return {_keep_name(value): value for value in sorted(self.keep or [])}

    @property
    def split(self) -> str:
        """Split that is searched on."""
        return self.search_split or ("train2017" if self.search == "fast" else "val2017")

    def with_images(self) -> SearchConfig:
        """Return a copy with `search_split`, `search_images` and `calibration_images` set."""
        images = self.search_images or (TRAIN_IMAGES if self.split == "train2017" else "all")
        of_scope = DETECTOR_CALIBRATION_IMAGES if self.scope == "detector" else CALIBRATION_IMAGES
        return dataclasses.replace(
            self,
            search_split=self.split,
            search_images=images,
            calibration_images=self.calibration_images or of_scope,
        )

    def schedule(self, schedule: Schedule) -> Schedule:
        """Return `schedule` with the values of the options."""
        return dataclasses.replace(
            schedule,
            map_tol=self.map_tol,
            skip=self.skip_eval_converge,
            points_per_module=self.decay_points,
            fraction_per_module=self.decay_fraction,
        )

    @property
    def method(self) -> Method:
        """Method of `--search`, as changed by the options."""
        changes: dict[str, Any] = {
            "ranking": self.ranking,
            "direction": self.selection,
            "reconstruction": self.reconstruct,
            "share_sets": None if self.index_sets is None else self.index_sets == "shared",
        }
        return dataclasses.replace(METHODS[self.search], **{k: v for k, v in changes.items() if v is not None})

    def units(self, nheads: int, seed: int) -> Units:
        """Return the step sizes for a detector with `nheads` heads."""
        ffn_unit = 4 * nheads if self.ffn_unit is None else self.ffn_unit
        candidates = self.num_candidates_attention, self.num_candidates_ffn
        return Units(self.attention_unit, ffn_unit, self.block_unit, *candidates, seed, self.min_units)


def refuse_unused_by_search(config: SearchConfig, typed: Collection[str]) -> None:
    """Raise a `UserError` for a typed option that the search does not use."""
    for name in sorted({name for names in READ_BY.values() for name in names} - set(READ_BY[config.search])):
        readers = " or ".join(search for search, names in READ_BY.items() if name in names)
        refuse([name], typed, f"--search {config.search} does not use it, expected --search {readers}")
    budgets = [f"--{name}" for name in ("keep", "target_ms") if getattr(config, name) is not None]
    if not budgets:
        refuse(["keep_params"], typed, "found neither --keep nor --target_ms, expected one of them as well")
    if budgets:
        refuse(TARGETS, typed, f"found {budgets[0]} as well, which ignores mAP")
    for name, name_of in (("keep", _keep_name), ("target_ms", _ms_name)):
        by_name: dict[str, float] = {}
        for value in getattr(config, name) or []:
            if (budget := name_of(value)) in by_name:
                raise UserError(f"--{name}: found {by_name[budget]} and {value}, expected values that differ more")
            by_name[budget] = value
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)}: found both, expected one of them")
    if config.cost_unit != "latency":
        refuse(["target_ms", "latency_table"], typed, f"found --cost {config.cost_unit}, expected --cost latency")
    if config.cost_unit == "params":
        refuse(["keep_params"], typed, "found --cost params, which --keep limits already, expected another --cost")
    if config.scope == "transformer":
        refuse(["block_unit"], typed, "--scope transformer does not use it, expected --scope detector")
    if config.search == "paper" and config.reconstruct not in (None, "none"):
        raise UserError(
            f"--reconstruct {config.reconstruct}: --search paper scores channels as they are, expected none"
        )
    if config.search == "paper" and config.index_sets == "own":
        raise UserError("--index_sets own: --search paper adds a channel to all of an attention, expected shared")
    method = config.method
    if method.reconstruction == "full":
        refuse(["index_sets"], typed, "--reconstruct full computes an attention's channels, expected output or none")
    if method.ranking != "exact":
        refuse(["images_at_once"], typed, f"--ranking {method.ranking} does not use it, expected exact")
    if not method.is_calibrated:
        refuse(["calibration_images"], typed, "found no ranking or reconstruction that uses them")
        refuse(["amp"], typed, "found no ranking or reconstruction that uses gradients, expected --eval_amp")
        if method.ranking != "exact":
            refuse(options_of(LossConfig), typed, "found no ranking or reconstruction that uses the loss")
