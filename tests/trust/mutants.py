"""Mutation testing: inject bugs into a copy of the program; the tests named with each must fail.

    python -m tests.trust.mutants [NAME ...]

prints a table and ends with exit code 1 if a mutant survives, or if its source text does not occur exactly once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import runs.search_run  # noqa: F401 brings what the tests import besides this program, once for all of them
from util.logging import table

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "output", "checkpoints", "build", "results")
FAILED = 1  # pytest's exit code where tests have run and some have failed


@dataclass(frozen=True)
class Mutant:
    """A deliberate error in the program, which tests must notice.

    Attributes:
        name: what is wrong.
        path: the file.
        source: text that occurs in it exactly once.
        mutated: the text of the mutant in its place.
        tests: arguments of pytest, first what is likeliest to notice.
    """

    name: str
    path: str
    source: str
    mutated: str
    tests: tuple[str, ...]

    def applied(self, content: str) -> str:
        """The file with the mutant in it.

        Raises:
            ValueError: the source text does not occur exactly once.
        """
        found = content.count(self.source)
        if found != 1:
            raise ValueError(f"{self.name}: found {self.source!r} {found} times in {self.path}, expected it once")
        return content.replace(self.source, self.mutated)


SEARCH = ("tests/pruning/test_search.py",)
SCHEDULE = ("tests/pruning/test_schedule.py",)
BUDGET = ("tests/pruning/test_budget.py",)
ALLOCATION = ("tests/pruning/test_allocation.py",)
SELECTION = ("tests/pruning/test_selection.py",)
TRANSPLANT = ("tests/pruning/test_transplant.py",)
JOURNAL = ("tests/pruning/test_journal.py",)

MUTANTS = (
    Mutant(
        "subset's threshold: > for >=", "pruning/search.py",
        "subset_ap >= self._visits[visit]", "subset_ap > self._visits[visit]", SEARCH,
    ),
    Mutant(
        "growing, whole split's threshold: > for >=", "pruning/search.py",
        "passed = full_ap is not None and full_ap >= self", "passed = full_ap is not None and full_ap > self", SEARCH,
    ),
    Mutant(
        "halving, whole split's threshold: > for >=", "pruning/search.py",
        "decision.full_ap >= self._visits", "decision.full_ap > self._visits", SEARCH,
    ),
    Mutant(
        "halving stops one width early", "pruning/search.py",
        "while passes - fails > 1:", "while passes - fails > 2:", SEARCH,
    ),
    Mutant(
        "a subset of mAP 0 counts as one without boxes: <= for <", "pruning/search.py",
        "subset_ap < 0 or", "subset_ap <= 0 or", SEARCH,
    ),
    Mutant(
        "a journal's step is not checked against the search's", "pruning/search.py",
        "if (decision.visit, decision.step, decision.module) !=", "if (visit, step, decision.module) !=", SEARCH,
    ),
    Mutant(
        "targets decay one module early", "pruning/schedule.py",
        "* (1 - fraction) ** visit", "* (1 - fraction) ** (visit + 1)", SCHEDULE,
    ),
    Mutant("points of AP taken for tens of points", "pruning/schedule.py", "/ 100 * visit", "/ 10 * visit", SCHEDULE),
    Mutant(
        "the whole split held against the other reference", "pruning/schedule.py",
        'self.full_reference == "base"', 'self.full_reference != "base"', SCHEDULE,
    ),
    Mutant(
        "a budget's trial that just passes fails: > for >=", "pruning/budget.py",
        "if trial.full_ap >= threshold_ap:", "if trial.full_ap > threshold_ap:", BUDGET,
    ),
    Mutant(
        "the worst power instead of the best", "pruning/budget.py",
        "trial.full_ap > best.full_ap:", "trial.full_ap < best.full_ap:", BUDGET,
    ),
    Mutant(
        "what is left of a budget is not spent to the end: >= for >", "pruning/allocation.py",
        "if any(cost > rest for", "if any(cost >= rest for", ALLOCATION,
    ),
    Mutant(
        "a unit of an attention counted once, not for each head", "pruning/search.py",
        "return self.attention_unit * module.nheads", "return self.attention_unit",
        ("tests/pruning/test_selection.py", *SEARCH),
    ),
    Mutant(
        "the worst channel of each head is added", "pruning/selection.py",
        "scores[of_head].argsort(stable=True)", "scores[of_head].argsort(descending=True, stable=True)", SELECTION,
    ),
    Mutant(
        "values cut by the queries' index set", "pruning/transplant.py",
        '"value": "value", "hidden"', '"value": "query", "hidden"', TRANSPLANT,
    ),
    Mutant(
        "second channels of a Bottleneck cut by the first ones' index set", "pruning/transplant.py",
        '"inner2": "inner2"', '"inner2": "inner1"', TRANSPLANT,
    ),
    Mutant(
        "softmax scale not folded into the queries", "pruning/transplant.py",
        "math.sqrt(len(indices) / full) if fold else block", "1.0 if fold else block", TRANSPLANT,
    ),
    Mutant(
        "softmax scale not folded into the sine query", "models/dn_dab_detr/decoder.py",
        '"position_query", fold=True)', '"position_query")', TRANSPLANT,
    ),
    Mutant(
        "a packed attention's gates on the wrong sides", "models/attention.py",
        "(gated(query, query_gate), key, gated(value, value_gate))",
        "(gated(query, value_gate), key, gated(value, query_gate))", TRANSPLANT,
    ),
    Mutant(
        "the decoder's self-attention gates its keys' partner by the values' gate", "models/dn_dab_detr/decoder.py",
        "(gated(query, query_gate), key, value))", "(gated(query, value_gate), key, value))", TRANSPLANT,
    ),
    Mutant(
        "bias not refitted", "pruning/least_squares.py",
        "bias = (moments.y - fitted @ moments.x) / moments.weight", "bias = moments.y / moments.weight",
        ("tests/pruning/test_least_squares.py",),
    ),
    Mutant(
        "candidates join the parts that they should not", "pruning/gates.py",
        "if part in joined:", "if part not in joined:", ("tests/pruning/test_scores.py",),
    ),
    Mutant(
        "a channel's loss taken for its gain", "pruning/scores.py",
        "return -scores if leaving else scores", "return scores", ("tests/pruning/test_scores.py",),
    ),
    Mutant(
        "a process keeps the fits of the others", "pruning/divided_fits.py",
        "fit if self._owners[name] == distributed.rank() else None",
        "fit if self._owners[name] != distributed.rank() else None", ("tests/pruning/test_divided_fits.py",),
    ),
    Mutant(
        "a journal of another base mAP is taken", "pruning/journal.py",
        '<= BASE_AP_TOLERANCE', '>= BASE_AP_TOLERANCE', JOURNAL,
    ),
    Mutant(
        "a line that a crash cut short is kept", "pruning/journal.py",
        "if whole_bytes < self.path", "if whole_bytes > self.path", JOURNAL,
    ),
    Mutant(
        "the matcher takes the worst class", "models/matcher.py",
        "(positive - negative).gather", "(negative - positive).gather",
        ("tests/models/test_criterion.py", "tests/models/test_golden.py"),
    ),
)  # fmt: skip


def copy_tree(target: Path) -> Path:
    """A copy of the program and its tests."""
    return Path(shutil.copytree(ROOT, target, ignore=NOT_COPIED))


def run_tests(tree: Path, tests: Iterable[str]) -> int:
    """Pytest's exit code for these tests in a copy of the tree, in a fork that need not import torch again."""
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(tree, tuple(tests)))
    worker.start()
    worker.join()
    assert worker.exitcode is not None
    return worker.exitcode


def _work(tree: Path, tests: Sequence[str]) -> None:
    """Run the tests with the modules of `tree` in place of this tree's."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and not Path(file).is_relative_to(ROOT / ".venv"):
            del sys.modules[name]
    for name in {path.stem for path in ROOT.iterdir()} & sys.modules.keys():
        del sys.modules[name]  # packages without a file of their own
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    # None of these tests uses a shared fixture, and what conftest.py imports would be most of the time.
    options = [
        "-x",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tree}",
        "-c",
        f"{tree}/pyproject.toml",
    ]
    os._exit(int(pytest.main([*options, *tests])))


def verdict(tree: Path, mutant: Mutant) -> str:
    """`killed`, `survived`, or what is wrong with the mutant; the tree is as before afterwards."""
    path = tree / mutant.path
    content = path.read_text()
    try:
        path.write_text(mutant.applied(content))
        code = run_tests(tree, mutant.tests)
    except ValueError as error:
        return str(error)
    finally:
        path.write_text(content)
    return {FAILED: "killed", 0: "SURVIVED"}.get(code, f"ERROR: pytest ended with {code}")


def main(names: Sequence[str]) -> int:
    """Try the mutants of these names, all without any; returns the exit code."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if not chosen:
        print(f"found no mutant of the name {', '.join(names)}, expected one of MUTANTS", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        if code := run_tests(tree, sorted({test for mutant in chosen for test in mutant.tests})):
            print(f"the tests fail without any mutant: pytest ended with {code}", file=sys.stderr)
            return 1
        verdicts = [verdict(tree, mutant) for mutant in tqdm(chosen, unit="mutant")]
    rows = [(mutant.path, mutant.name, found) for mutant, found in zip(chosen, verdicts, strict=True)]
    print(table(["file", "mutant", ""], rows))
    print(f"{verdicts.count('killed')} of {len(verdicts)} killed")
    return 0 if set(verdicts) == {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
