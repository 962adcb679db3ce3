"""A journal can only be resumed by the search that wrote it."""

import copy
import json

import pytest
import torch

from pruning.journal import Decision, Journal, Trial, read_events
from util.errors import UserError

FACTS = {
    "schedule": {"name": "mgp", "skip": 0.02},
    "base_ap": 0.5,
    "weights": "ab12",
    "annotations": "cd34",
    "args": {"batch_size": 2, "keep": None},
    "full_widths": [[[32, 64]], [[32, 32, 64]]],
}
DECISION = Decision(
    visit=0,
    module="encoder.0.attention",
    full_width=8,
    step=0,
    width=2,
    kept={"query": torch.tensor([0, 5]), "value": torch.tensor([1, 4])},
    target_ap=0.5,
    subset_ap=0.4,
    full_ap=None,
    accepted=False,
    transformer_params=1000,
    image_passes=7,
    whole_passes=1.25,
    seconds=3.0,
)


@pytest.fixture
def path(tmp_path):
    """The journal of a search that was stopped after one decision and one trial."""
    journal = Journal(tmp_path / "search.jsonl")
    journal.start(FACTS)
    journal.decision(DECISION)
    journal.trial(Trial(0.5, 1.0, {"encoder.0.ffn": 8}, 0.25, 0.5))
    return journal.path


def test_a_decision_comes_back_as_it_was(path):
    _, lines = Journal(path).resume(FACTS)
    found = read_events(lines, "decision", Decision, path)
    assert [d.to_dict() for d in found] == [DECISION.to_dict()]
    assert all(indices.dtype == torch.int64 for indices in found[0].kept.values())


def test_new_lines_are_appended(path):
    journal = Journal(path)
    assert [line["event"] for line in journal.resume(FACTS)[1]] == ["decision", "trial"]
    journal.decision(DECISION)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
        "start",
        "decision",
        "trial",
        "decision",
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["args", "batch_size"], 4, r"args\.batch_size 2, expected 4"),
        (["args", "keep"], 0.5, r"args\.keep None, expected 0\.5"),
        (["args", "new_option"], 1, r"args\.new_option None, expected 1"),
        (["weights"], "ef56", "weights 'ab12', expected 'ef56'"),
        (["annotations"], "ef56", "annotations 'cd34', expected 'ef56'"),
        (["schedule", "skip"], 0.1, r"schedule\.skip 0\.02, expected 0\.1"),
        (["base_ap"], 0.6, r"base_ap 0\.5, expected 0\.6"),
        (["full_widths"], [], "full_widths"),
    ],
)
def test_a_journal_of_other_options_data_or_weights_is_refused(path, keys, value, message):
    facts = copy.deepcopy(FACTS)
    inner = facts
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"search\.jsonl: found a search with {message}"):
        Journal(path).resume(facts)
    assert path.read_bytes() == before


def test_a_base_map_that_another_device_rounds_otherwise_is_that_of_the_journal(path):
    near = {**FACTS, "base_ap": FACTS["base_ap"] + 0.0009}
    assert Journal(path).resume(near)[0] == FACTS["base_ap"]
    with pytest.raises(UserError, match="base_ap"):
        Journal(path).resume({**FACTS, "base_ap": FACTS["base_ap"] - 0.0011})


def test_an_option_that_is_gone_is_a_difference(path):
    facts = {**FACTS, "args": {"batch_size": 2}}
    journal = json.loads(path.read_text().splitlines()[0])
    journal["args"]["old_option"] = 3
    path.write_text(json.dumps(journal) + "\n")
    with pytest.raises(UserError, match=r"args\.old_option 3, expected None"):
        Journal(path).resume(facts)


def test_an_incomplete_last_line_is_dropped(path):
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [len(b"".join(lines[:n])) for n in range(len(lines) + 1)]
    for length in sorted({*ends, *(end - 1 for end in ends[1:]), *range(0, len(whole), 97)}):
        path.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends[1:])
        _, found = Journal(path).resume(FACTS)
        assert [line["event"] for line in found] == ["decision", "trial"][: max(0, complete - 1)]
        # A file without a complete line has nothing to resume: it is left unchanged.
        assert path.read_bytes() == (b"".join(lines[:complete]) if complete else whole[:length])


def test_without_a_journal_a_search_begins(tmp_path):
    journal = Journal(tmp_path / "search.jsonl")
    assert journal.resume(FACTS) == (FACTS["base_ap"], [])
    assert not journal.begun and not list(tmp_path.iterdir())


def test_a_journal_that_holds_no_decision_yet_is_not_begun_twice(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    journal = Journal(path)
    assert journal.resume(FACTS) == (FACTS["base_ap"], [])
    assert journal.begun
    journal.decision(DECISION)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["start", "decision"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 2 is not an event"),
        ("[1, 2]", "line 2 is not an event"),
        ('{"event": "lunch"}', "line 2 is not an event"),
        ("{}", "line 2 is not an event"),
    ],
)
def test_a_line_that_is_no_event_is_a_user_error(path, line, message):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=message):
        Journal(path).resume(FACTS)


def test_a_file_that_does_not_begin_with_a_search_is_a_user_error(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="line 1 is a decision, expected the start"):
        Journal(path).resume(FACTS)


def test_undecodable_bytes_are_a_user_error(path):
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read as a journal"):
        Journal(path).resume(FACTS)


@pytest.mark.parametrize(
    "change",
    [
        {"kept": None},
        {"kept": {"query": ["a"]}},
        {"kept": {"query": 3}},
        {"unheard_of": 1},
        "no module",
    ],
)
def test_a_damaged_decision_is_a_user_error(change):
    line = {"event": "decision", **DECISION.to_dict()}
    if change == "no module":
        del line["module"]
    else:
        line.update(change)
    with pytest.raises(UserError, match=r"a\.jsonl: found a damaged decision"):
        read_events([line], "decision", Decision, "a.jsonl")


def test_a_search_that_has_ended_is_refused(path):
    journal = Journal(path)
    journal.resume(FACTS)
    journal.end({"ap": 0.4})
    with pytest.raises(UserError, match="found a search that has ended"):
        Journal(path).resume(FACTS)


def test_a_new_search_moves_the_older_journal_aside(path):
    journal = Journal(path)
    journal.start({**FACTS, "base_ap": 0.7})
    assert json.loads(path.read_text())["base_ap"] == 0.7
    assert len(path.with_name("search.1.jsonl").read_text().splitlines()) == 3
