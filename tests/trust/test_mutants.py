"""The list of mutants fits the source, and the quickest of them are killed; `make mutants` tries them all."""

import pytest

from tests.trust.mutants import MUTANTS, ROOT, SCHEDULE, copy_tree, run_tests, verdict


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_changes_one_place_of_the_source(mutant):
    content = (ROOT / mutant.path).read_text()
    assert mutant.applied(content) != content
    assert all((ROOT / test).is_file() for test in mutant.tests)


def test_mutants_of_the_schedule_are_killed_and_the_source_is_not(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    assert run_tests(tree, SCHEDULE) == 0
    chosen = [mutant for mutant in MUTANTS if mutant.tests == SCHEDULE]
    assert len(chosen) == 3
    assert [verdict(tree, mutant) for mutant in chosen] == ["killed"] * 3
