"""Compare ways of pruning a detector's backbone at equal multiply-accumulates, without fine-tuning.

    python -m bench.backbone_baselines demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

The transformer stays unpruned; the backbone is cut until the whole detector has the share --keep of its MACs. Every
row is measured as cut and with re-estimated batch norms. Calibration uses train2017; AP is that of val2017. The rows of
this project prune the whole detector, once with widths from its search and once with the same share of every module.
Writes backbone_baselines_NAME.json to --output after every row (a second call continues after the existing rows).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbone_torch_pruning import TOLERANCE, Setting, prune_backbone
from bench.batch_norms import with_norms_reestimated
from bench.subject import Pruner, Subject, cut_in_order, get_subject_parser
from bench.torch_pruning_baseline import loss_gradients
from models.detector import Detector
from models.prunable import PrunableModule
from pruning.cost import GIGA, block_macs, cost_of
from pruning.kept_channels import Kept
from pruning.method import FAST
from pruning.scores import RandomOrder
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from reports.plots import new_figure, save_figure
from util.cli import real
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import file_digest, write_json
from util.logging import table

BUDGETS = (0.92, 0.65, 0.5, 0.35)
MOST_OF_TRANSFORMER = 0.55  # of its MACs that it alone is pruned by
REESTIMATED = ", norms re-estimated"
SEARCH_IMAGES = 200
OWN_IMAGES = 600  # on which this project's rows are calibrated, as fits of thousands of unknowns need more
BATCH_SIZE = 20
RANDOM_SEEDS = 3
SHARES = 4000  # steps in which a common share of all blocks is tried
TORCH_PRUNING_GROUPS = {"inner": "inner channels", "all": "all channels"}

Score = Callable[[PrunableModule, str], Tensor]


class Results:
    """The rows of one data set, measured by one evaluator and written to a file after each.

    Attributes:
        figures: contents of the file: settings, environment and `rows`.
    """

    def __init__(self, subject: Subject, path: Path, settings: Mapping[str, Any]) -> None:
        """Continue the file at `path` if it has the same settings; measure the dense detector otherwise."""
        self._subject = subject
        self._path = path
        self._dense_gmacs = cost_of(subject.dense, subject.image_size_hw).detector_gmacs
        self.figures: dict[str, Any] = {**settings, "environment": environment(), "rows": []}
        if path.is_file():
            older = json.loads(path.read_text())
            if all(older.get(key) == value for key, value in settings.items()):
                self.figures = {**older, "environment": environment()}
        if not self.has("dense", 1.0):
            self.add("dense", 1.0, subject.dense)

    def has(self, name: str, keep: float) -> bool:
        """Return whether this row is measured."""
        return any(row["name"] == name and row["keep"] == keep for row in self.figures["rows"])

    def add(self, name: str, keep: float, *detectors: Detector, seconds: float = 0.0) -> dict[str, Any]:
        """Measure a row on val2017 and write the file.

        Args:
            name: name in the table; the row with re-estimated batch norms has the same name + `REESTIMATED`.
            keep: share of the dense detector's MACs that the detectors may have.
            detectors: one, or one for each seed.
            seconds: time to make one of them.

        Returns:
            The row: `ap` and `ap50` (means over the detectors), `ap_seeds`, `share` (of the dense detector's MACs),
            `detector_gmacs`, `params`, `seconds`, `widths` (see `Widths.to_list`; a stream's channels are not in it).

        Raises:
            UserError: a detector has more MACs than `keep` allows.
        """
        subject = self._subject
        costs = [cost_of(detector, subject.image_size_hw) for detector in detectors]
        shares = [cost.detector_gmacs / self._dense_gmacs for cost in costs]
        if max(shares) > keep * (1 + TOLERANCE):
            raise UserError(f"{name}: found {max(shares):.3f} of the dense detector's MACs, expected {keep} at most")
        stats = [subject.evaluate(detector) for detector in detectors]
        row = {
            "name": name,
            "keep": keep,
            "ap": statistics.fmean(one["AP"] for one in stats),
            "ap50": statistics.fmean(one["AP50"] for one in stats),
            "ap_seeds": [one["AP"] for one in stats],
            "share": statistics.fmean(shares),
            "detector_gmacs": statistics.fmean(cost.detector_gmacs for cost in costs),
            "params": round(statistics.fmean(cost.params for cost in costs)),
            "seconds": seconds,
            "widths": detectors[0].widths_in("detector").to_list(),
        }
        self.figures["rows"].append(row)
        self.write()
        print(json.dumps({key: value for key, value in row.items() if key != "widths"}), flush=True)
        return row

    def write(self) -> None:
        """Write the file."""
        write_json(self._path, self.figures)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to prune the backbone.

    Attributes:
        name: in the table.
        build: maps the share of MACs to keep and a seed to the smaller detector.
        seeds: number of seeds; 1 if deterministic.
        repairs: whether there is a row with re-estimated batch norms, too.
    """

    name: str
    build: Callable[[float, int], Detector]
    seeds: int = 1
    repairs: bool = True


def rows_of(subject: Subject, own_subject: Callable[[], Subject], budget: float) -> list[Row]:
    """Return the rows of a budget; `own_subject` returns the subject of this project's rows, with more images."""
    dense, size = subject.dense, subject.image_size_hw
    gradients = functools.cache(lambda: loss_gradients(dense, subject.seen, subject.criterion, "backbone"))

    def uniform(score_of_seed: Callable[[int], Score]) -> Callable[[float, int], Detector]:
        return lambda keep, seed: cut_blocks(dense, best_channels(dense, uniform_blocks(dense, size, keep),
                                                                  score_of_seed(seed)))  # fmt: skip

    def torch_pruning(setting: Setting) -> Callable[[float, int], Detector]:
        return lambda keep, _: prune_backbone(
            dense, setting, keep, size, gradients() if setting.importance == "taylor" else {}
        )

    rows = [
        Row(
            "ours, whole detector", lambda keep, _: detector_pruner(own_subject()).searched(1 - keep)[0], repairs=False
        ),
        Row("ours, uniform widths", lambda keep, _: uniform_detector(own_subject(), keep), repairs=False),
        *(
            [Row("ours, transformer alone", lambda keep, _: transformer_alone(own_subject(), keep), repairs=False)]
            if transformer_share(subject, budget) <= MOST_OF_TRANSFORMER
            else []
        ),
        Row("uniform, magnitude", uniform(lambda _: functools.partial(magnitude, dense.state_dict()))),
        Row("uniform, random", uniform(random_scores), RANDOM_SEEDS),
    ]
    for importance in ("magnitude", "taylor"):
        for groups, words in TORCH_PRUNING_GROUPS.items():
            for ranking in ("uniform", "global"):
                name = f"Torch-Pruning, {importance}, {words}, {ranking}"
                rows.append(Row(name, torch_pruning(Setting(importance, groups, ranking))))
    return rows


def detector_pruner(subject: Subject) -> Pruner:
    """Return a pruner of the whole detector that calibrates on all images of the search."""
    return Pruner(subject, FAST, calibration_images=len(subject.seen.dataset), scope="detector")


def transformer_alone(subject: Subject, keep: float) -> Detector:
    """Cut only the transformer, to leave the share `keep` of the whole detector's MACs."""
    pruner = Pruner(subject, FAST, calibration_images=len(subject.seen.dataset), cost="macs")
    return pruner.searched(transformer_share(subject, keep))[0]


def transformer_share(subject: Subject, keep: float) -> float:
    """Return the share of the transformer's MACs to remove to leave the share `keep` of the whole detector's."""
    found = cost_of(subject.dense, subject.image_size_hw)
    return (1 - keep) * found.detector_gmacs / found.gmacs


def uniform_detector(subject: Subject, keep: float) -> Detector:
    """Cut all modules to the same share of their channels, `keep` of the detector's MACs, with the same refit."""
    pruner = detector_pruner(subject)
    costs, total = pruner.budget.prices.costs, pruner.budget.prices.total
    rest = total - sum(max(table.values()) for table in costs.values())

    def at(share: float) -> tuple[float, dict[str, int]]:
        widths = {
            name: min(table, key=functools.partial(_distance, share * max(table))) for name, table in costs.items()
        }
        return (rest + sum(costs[name][width] for name, width in widths.items())) / total, widths

    fitting = [at(step / SHARES) for step in range(1, SHARES + 1)]
    _, widths = max((pair for pair in fitting if pair[0] <= keep * (1 + TOLERANCE)), key=lambda pair: pair[0])
    return pruner.cut(cut_in_order(pruner.bench, widths))[0]


def _distance(wanted: float, width: int) -> float:
    return abs(width - wanted)


def uniform_blocks(model: Detector, image_size_hw: tuple[int, int], keep: float) -> dict[str, int]:
    """Return widths with the same share of every residual block that keep the share `keep` of the detector's MACs.

    Raises:
        UserError: blocks cannot be cut to within `TOLERANCE` of these MACs.
    """
    tables = block_macs(model, image_size_hw)
    total = round(cost_of(model, image_size_hw).detector_gmacs * GIGA)
    rest = total - sum(costs[-1] for costs in tables.values())

    def at(share: float) -> tuple[float, dict[str, int]]:
        widths = {name: max(1, round(share * (len(costs) - 1))) for name, costs in tables.items()}
        macs = rest + sum(tables[name][width] for name, width in widths.items())
        return macs / total, widths

    found, widths = min((at(step / SHARES) for step in range(1, SHARES + 1)), key=lambda pair: abs(pair[0] - keep))
    if abs(found / keep - 1) > TOLERANCE:
        raise UserError(
            f"--keep {keep}: cutting every residual block alike reaches {found:.3f} of the detector's MACs at the "
            "nearest, expected a share that the backbone's blocks can give"
        )
    return widths


def best_channels(model: Detector, widths: Mapping[str, int], score: Score) -> dict[str, Kept]:
    """Return the kept sets with the `widths` channels of each module and part that have the greatest scores."""
    modules = model.prunable_modules("detector")
    return {
        name: {
            part: score(modules[name], part).argsort(descending=True, stable=True)[:width].sort().values
            for part in modules[name].parts
        }
        for name, width in widths.items()
    }


def magnitude(state_dict: Mapping[str, Tensor], module: PrunableModule, part: str) -> Tensor:
    """Score the channels of a residual block's part: sum of squares of the weights in times that of the weights out."""
    score = torch.ones(module.width, dtype=torch.float64)
    for piece in module.parameter_slices():
        weight = state_dict[piece.key]
        if piece.parts == (part,) and weight.dim() == 4:
            score *= weight.double().square().sum([axis for axis in range(4) if axis != piece.axis])
    return score


def random_scores(seed: int) -> Score:
    """Return random scores that depend on seed, module and part."""
    order = RandomOrder(seed)
    return lambda module, part: order(module, [part], {}, torch.arange(module.width))


def cut_blocks(model: Detector, kept: Mapping[str, Kept]) -> Detector:
    """Return a copy of a detector cut to the kept sets."""
    slices = model.prunable_modules("detector")
    widths = widths_after(model.widths_in("detector"), kept)
    return slim_copy(model, cut_state_dict(model.state_dict(), kept, slices), widths)


def measure(results: Results, subject: Subject, row: Row, keep: float) -> None:
    """Measure a row as cut and with re-estimated batch norms, unless the results have both."""
    if results.has(row.name, keep) and (not row.repairs or results.has(row.name + REESTIMATED, keep)):
        return
    start = time.perf_counter()
    detectors = [row.build(keep, seed) for seed in range(row.seeds)]
    cut = time.perf_counter() - start
    if not row.repairs:
        results.add(row.name, keep, *detectors, seconds=cut / row.seeds)
        return
    repaired = [with_norms_reestimated(detector, subject.seen) for detector in detectors]
    both = time.perf_counter() - start
    if not results.has(row.name, keep):
        results.add(row.name, keep, *detectors, seconds=cut / row.seeds)
    if not results.has(row.name + REESTIMATED, keep):
        results.add(row.name + REESTIMATED, keep, *repaired, seconds=both / row.seeds)


def print_table(figures: Mapping[str, Any]) -> None:
    """Print all rows, budget by budget."""
    rows = sorted(figures["rows"], key=lambda row: -row["keep"])
    titles = ("", "kept", "AP", "AP50", "share of MACs", "parameters", "seconds")
    cells = [
        (
            row["name"], f"{100 * row['keep']:.0f} %", f"{100 * row['ap']:.1f}", f"{100 * row['ap50']:.1f}",
            f"{100 * row['share']:.1f} %", f"{row['params']:,}", f"{row['seconds']:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    print(f"{figures['name']}, AP in points on val2017\n{table(titles, cells)}")


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw AP against the share of MACs, one line for each way of pruning, to a PNG file."""
    figure = new_figure(8, 8)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["name"] for row in figures["rows"]):
        rows = sorted((row for row in figures["rows"] if row["name"] in (name, "dense")), key=lambda row: row["share"])
        own = name.startswith(("ours", "dense"))
        axes.plot(
            [100 * row["share"] for row in rows], [100 * row["ap"] for row in rows], marker="o",
            linewidth=2.5 if own else 1, alpha=1 if own else 0.6, label=name,
        )  # fmt: skip
    axes.set(xlabel="multiply-accumulates kept, % of the detector's", ylabel="AP as cut")
    figure.legend(fontsize=6, ncols=2, loc="outside lower center")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = get_subject_parser("bench.backbone_baselines", __doc__, search_images=SEARCH_IMAGES)
    add = parser.add_argument
    add("--keep", type=real(0.01, at_most=1.0), nargs="+", default=BUDGETS, help="shares of the detector's MACs")
    return parser


def open_results(subject: Subject, args: argparse.Namespace) -> Results:
    """Return the results of the benchmark called with `args`."""
    settings = {"name": args.name, "search_images": args.search_images, "checkpoint": file_digest(args.checkpoint)}
    return Results(subject, args.output / f"backbone_baselines_{args.name}.json", settings)


def main() -> None:
    """Measure missing rows and print all of them."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args()
    subject = Subject(args.coco_path, args.checkpoint, 1, args.search_images, BATCH_SIZE)
    results = open_results(subject, args)
    own = functools.cache(lambda: Subject(args.coco_path, args.checkpoint, 1, OWN_IMAGES, BATCH_SIZE))
    for keep in args.keep:
        for row in rows_of(subject, own, keep):
            measure(results, subject, row, keep)
    results.figures["own_images"] = len(own().seen.dataset)
    results.write()
    draw(results.figures, args.output / f"backbone_baselines_{args.name}.png")
    print_table(results.figures)


if __name__ == "__main__":
    run_cli(main)
