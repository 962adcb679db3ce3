"""Time the fits of a search against the forms that they replaced, in turns, on random moments of DN-DETR-R50's sizes.

    python -m bench.fits --output bench/results/fits.json

Fits use moments only, so no detector, images or weights are needed. Then one, two and four processes make the fits of a
whole search, divided as a search divides them; their CPU seconds need no machine with four idle cores.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.layers import GatedModule
from models.prunable import PrunableModule
from pruning.budget import ATTENTION_WIDTHS_MEASURED
from pruning.divided_fits import DividedFits
from pruning.finite_checks import decided_on_main
from pruning.least_squares import (
    ALTERNATIONS,
    Surgeon,
    error_covariance,
    errors_of_prefixes,
    low_rank_products,
    penalty,
    refit,
    value_directions,
)
from pruning.moments import DAMPING, Moments, damped, square_root
from pruning.nested_sets import chains, inputs_of_chain
from util import distributed
from util.cli import script_parser, user_path
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table

LAYERS = 6  # of the encoder and of the decoder
CUTS = 3  # of a search: each fits every module once more, at one width
STEPS = 32  # of a ranking by elimination
START = "spawn"  # of processes: fork would lose threads that have computed


@dataclass(frozen=True)
class Sizes:
    """Sizes of a detector.

    Attributes:
        ffn: hidden channels of an FFN.
        hidden: channels of a token.
        heads: of an attention.
        tokens: rows of the random activations.
    """

    ffn: int
    hidden: int
    heads: int
    tokens: int

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Case:
    """A fit and the form that it replaced.

    Attributes:
        count: how often a search of a detector with `LAYERS` + `LAYERS` layers makes it.
        is_divided: whether processes make it for different modules at the same time; if not, the main one makes it.
    """

    name: str
    count: int
    before: Callable[[], Any]
    after: Callable[[], Any]
    is_divided: bool = False


def cases(sizes: Sizes) -> list[Case]:
    """Return the fits of a search."""
    return [*_ffn_cases(sizes), *_attention_cases(sizes)]


def _ffn_cases(sizes: Sizes) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(sizes.ffn, sizes.ffn, generator=generator) / sizes.ffn**0.5
    x = torch.relu(torch.randn(sizes.tokens, sizes.ffn, generator=generator) @ mixed + 0.3)
    token_weights = torch.rand(sizes.tokens, generator=generator)
    weight = torch.randn(sizes.hidden, sizes.ffn, generator=generator, dtype=torch.float64)
    of_x = Moments.of(x, x[:, :0], token_weights)
    moments = of_x.of_linear(weight, torch.zeros(sizes.hidden))
    metric = torch.eye(sizes.hidden, dtype=torch.float64) / sizes.hidden
    sets = {width: torch.arange(width) for width in range(sizes.ffn // 64, sizes.ffn, sizes.ffn // 64)}

    def rank() -> None:
        surgeon = Surgeon(square_root(metric)[0] @ weight, moments.covariance_xx)
        for _ in range(STEPS - 1):
            surgeon.remove(surgeon.channels[surgeon.scores().argsort()[: sizes.ffn // STEPS]])

    def each_width() -> list[float]:
        found = []
        for kept in sets.values():
            some = moments.of_channels(kept)
            found.append(float((metric * error_covariance(refit(weight[:, kept], some, whole=moments)[0], some)).sum()))
        return found

    def all_widths() -> list[float]:
        (chain,) = chains(sets)
        inputs = inputs_of_chain(chain, sizes.ffn)
        judged = moments.covariance_xx[inputs[:, None], inputs]
        fitted = judged.clone()
        fitted.diagonal().add_(penalty(moments, DAMPING))
        return errors_of_prefixes(weight[:, inputs], metric, judged, fitted)[[*sets]].tolist()

    def cut() -> None:
        kept = torch.arange(sizes.ffn // 2)
        refit(weight[:, kept], moments.of_channels(kept), whole=moments)

    def sums(dtype: torch.dtype) -> Callable[[], Moments]:
        return lambda: Moments.of(x, x[:, :0], token_weights, dtype)

    ffns = 2 * LAYERS
    return [
        Case(f"moments of an FFN, {sizes.tokens:,} tokens", 0, sums(torch.float64), sums(torch.float32)),
        Case("ranking of an FFN", ffns, rank, rank, is_divided=True),
        Case(f"{len(sets)} widths of an FFN", ffns, each_width, all_widths, is_divided=True),
        Case("refit of an FFN at half its width", CUTS * ffns, cut, cut),
    ]


def _attention_cases(sizes: Sizes) -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    width, heads = sizes.head_width, sizes.heads

    def moments() -> Tensor:
        x = torch.randn(heads, 8 * width, width, generator=generator, dtype=torch.float64)
        return x.mT @ x

    queries, keys, values = [moments(), moments()], [moments(), moments()], moments()
    weight = torch.randn(heads, sizes.hidden, width, generator=generator, dtype=torch.float64)
    ranks = [1 + place * (width - 1) // ATTENTION_WIDTHS_MEASURED for place in range(ATTENTION_WIDTHS_MEASURED)]

    def of_head(moments: Sequence[Tensor], head: int) -> list[Tensor]:
        return [moment[head] for moment in moments]

    def fit(rank: int, products: int) -> None:
        low_rank_products(queries[:products], keys[:products], rank, common_keys=False)
        value_directions(weight, values, rank)

    def fit_heads(rank: int, products: int) -> None:
        for head in range(heads):
            of_queries, of_keys = of_head(queries[:products], head), of_head(keys[:products], head)
            low_rank_products(of_queries, of_keys, rank, common_keys=False)
            value_directions(weight[head], values[head], rank)

    def by_system(rank: int) -> None:
        for head in range(heads):
            common_keys_by_one_system(of_head(queries, head), of_head(keys, head), rank)

    def by_eigenvalues(rank: int) -> None:
        low_rank_products(queries, keys, rank, common_keys=True)

    def of_widths(fit: Callable[..., None], *more: int) -> Callable[[], None]:
        return lambda: [fit(rank, *more) for rank in ranks] and None

    middle = width // 2
    return [
        Case(f"{len(ranks)} widths of an attention", 2 * LAYERS, of_widths(fit_heads, 1), of_widths(fit, 1)),
        Case(f"{len(ranks)} widths of a cross-attention", LAYERS - 1, of_widths(fit_heads, 2), of_widths(fit, 2)),
        Case(f"{len(ranks)} widths of common keys", 1, of_widths(by_system), of_widths(by_eigenvalues)),
        Case("an attention at half its width", CUTS * 2 * LAYERS, lambda: fit_heads(middle, 1), lambda: fit(middle, 1)),
        Case("common keys at half their width", CUTS, lambda: by_system(middle), lambda: by_eigenvalues(middle)),
    ]


def common_keys_by_one_system(
    queries: Sequence[Tensor], keys: Sequence[Tensor], rank: int
) -> tuple[list[Tensor], Tensor]:
    """Fit one head's common keys as `low_rank_products` does, but by systems of rank * d unknowns.

    Returns:
        The M_i and N.
    """
    queries, keys = [damped(q) for q in queries], [damped(k) for k in keys]

    def fit_queries(on_keys: Tensor) -> list[Tensor]:
        return [torch.linalg.solve(on_keys @ key @ on_keys.T, on_keys @ key) for key in keys]

    energy = torch.stack([key @ query @ key for query, key in zip(queries, keys, strict=True)]).sum(0)
    on_keys = torch.linalg.eigh(energy).eigenvectors[:, -rank:].T
    for _ in range(ALTERNATIONS):
        pairs = [*zip(fit_queries(on_keys), queries, keys, strict=True)]
        system = torch.stack([torch.kron(fitted @ query @ fitted.T, key) for fitted, query, key in pairs]).sum(0)
        target = torch.stack([fitted @ query @ key for fitted, query, key in pairs]).sum(0)
        solved = torch.linalg.solve(damped(system, 1e-10), target.flatten()).view_as(target)
        on_keys = torch.linalg.qr(solved.T)[0].T
    return fit_queries(on_keys), on_keys


def measure(found: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
    """Time each case before and after in turns; return medians of the seconds."""
    rows = []
    for case in found:
        seconds: dict[str, list[float]] = {"before": [], "after": []}
        case.after()
        for _ in range(rounds):
            for name, run in (("before", case.before), ("after", case.after)):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        row = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append({"name": case.name, "count": case.count, **row, "ratio": row["before"] / row["after"]})
        print(rows[-1], flush=True)
    return rows


def measure_processes(sizes: Sizes, processes: int) -> dict[str, Any]:
    """Make the fits of a search in several processes.

    Returns:
        By process, the main one first: `cpu_seconds`, and `fits`, how many it made.
    """
    context = multiprocessing.get_context(START)
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, processes, str(Path(folder) / "store"), sizes, results) for rank in range(processes)]
        workers = [context.Process(target=_work, args=given) for given in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"{processes} processes ended with {[worker.exitcode for worker in workers]}")
    found = sorted(results.get() for _ in workers)
    return {
        "processes": processes,
        "cpu_seconds": [seconds for _, seconds, _ in found],
        "fits": [made for *_, made in found],
    }


def _work(rank: int, processes: int, store: str, sizes: Sizes, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    of_search = [case for case in cases(sizes) if case.count]
    distributed.barrier()
    start, made = time.process_time(), 0

    def make(fits: Sequence[Case]) -> None:
        nonlocal made
        for case in fits:
            case.after()
        made += len(fits)

    names = [f"{number}.ffn" for number in range(2 * LAYERS)]
    ffns = {name: PrunableModule(name, "ffn", sizes.ffn, 1, GatedModule(), ()) for name in names}
    of_ffns = DividedFits[None](ffns)
    for name in ffns:
        of_ffns.add(name, lambda: make([case for case in of_search if case.is_divided]), 0)
    of_ffns.results()
    for case in of_search:
        for _ in range(0 if case.is_divided else case.count):
            decided_on_main("the fit", functools.partial(make, [case]), lambda found: [])
    results.put((rank, time.process_time() - start, made))
    distributed.stop()


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.fits")
    parser.add_argument("--dim_feedforward", type=int, default=2048, help="hidden channels of an FFN")
    parser.add_argument("--hidden_dim", type=int, default=256, help="channels of a token")
    parser.add_argument("--nheads", type=int, default=8, help="heads of an attention")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the random activations")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each fit")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--output", type=user_path, help="JSON file for the figures")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the figures."""
    sizes = Sizes(args.dim_feedforward, args.hidden_dim, args.nheads, args.tokens)
    rows = measure(cases(sizes), args.rounds)
    totals = {name: sum(row["count"] * row[name] for row in rows) for name in ("before", "after")}
    processes = [measure_processes(sizes, count) for count in args.processes]
    return {"environment": environment(), "cuts": CUTS, "rounds": args.rounds, "rows": rows, "search": totals,
            "processes": processes}  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    args = get_parser().parse_args()
    if min(args.tokens, args.rounds, *args.processes) < 1 or args.dim_feedforward < 64 or args.hidden_dim % args.nheads:
        raise UserError("bench.fits: expected counts of at least 1, 64 hidden channels and equal heads")
    found = run(args)
    rows = [
        (row["name"], f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['ratio']:.1f}") for row in found["rows"]
    ]
    print(table(("", "before: s", "now: s", "times as fast"), rows))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    run_cli(main)
