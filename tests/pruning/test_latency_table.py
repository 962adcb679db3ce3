"""Latency tables: what shares an entry, what a turn times, and which tables are refused."""

import dataclasses
import gc
import itertools
import json
import re
import weakref

import pytest
import torch
from torch import nn

from pruning import latency
from pruning.config import SearchConfig
from pruning.cost_tables import latency_prices, widths_of
from pruning.journal import Turn
from pruning.latency import Measurement, cut_copy, random_images, unpruned_copy
from pruning.latency_table import Entry, LatencyTable, Setting, check_table, read_table
from pruning.search import Units
from pruning.step_timing import FRONT, HEADS, WHOLE, kinds_of, steps_of, time_steps, whole_of
from tests.pruning.tiny import VARIANTS, tiny_detector
from util.errors import UserError

CPU = torch.device("cpu")
SETTING = Setting("a processor", 1, (64, 64), 2, "off", "2.11.0")
UNITS = Units(attention_unit=2, ffn_unit=8, block_unit=4, attention_candidates=8, ffn_candidates=8, seed=0, min_units=0)
SCOPES = ("transformer", "detector")


def measurement_of(scope="detector", network="--enc_layers 2", turns=()):
    return measurement_for(tiny_detector(network)[0].eval(), scope, turns)


def measurement_for(model, scope, turns=()):
    return Measurement(model, scope, SETTING, widths_of(model, scope, UNITS), CPU, turns)


def kinds_at(model, image_hw=(64, 64), scope="detector"):
    images = random_images(dataclasses.replace(SETTING, image_size_hw=image_hw), CPU)
    return kinds_of(steps_of(model, images, scope), CPU, "off")


@pytest.fixture(scope="module")
def model():
    return tiny_detector("--enc_layers 2")[0].eval()


def fake_times(steps, device, amp, *, repeats, warm_up=1, graphs=False):
    return {name: [float(len(name))] * repeats for name, _ in steps}


def test_modules_share_a_kind_where_they_compute_the_same(model):
    kinds = kinds_at(model)
    layers = len(model.widths.decoder)
    positions = [f"decoder.{layer}.positions" for layer in range(layers)]
    assert {*kinds} == {FRONT, HEADS, *positions, *model.steps_in("detector")}
    assert len({kinds[f"encoder.{i}.ffn"] for i in range(len(model.widths.encoder))}) == 1
    # The first layer's queries are not scaled, and the last one refines no anchors.
    assert kinds["decoder.0.positions"] != kinds["decoder.1.positions"]
    assert kinds["decoder.0.cross_attention"] != kinds["decoder.1.cross_attention"]
    assert kinds[f"decoder.{layers - 1}.ffn"] != kinds["decoder.0.ffn"]
    assert kinds["encoder.0.ffn"] != kinds["decoder.0.ffn"]


def test_a_kind_depends_on_image_size_and_width(model):
    kinds, larger = kinds_at(unpruned_copy(model, "detector")), kinds_at(model, (64, 96))
    assert kinds["encoder.0.attention"] != larger["encoder.0.attention"]
    assert kinds["decoder.0.self_attention"] == larger["decoder.0.self_attention"]  # queries alone
    narrow = cut_copy(model, "detector", {"encoder.0.ffn": 8})
    assert {name for name, kind in kinds_at(narrow).items() if kind != kinds[name]} == {"encoder.0.ffn"}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steps_together_are_the_detector(variant, scope):
    model = tiny_detector(VARIANTS[variant])[0].eval()
    images, state = random_images(SETTING, CPU), None
    with torch.no_grad():
        for _, run in steps_of(model, images, scope):
            state = run(state)
        ((_, whole),) = whole_of(model, images)
        torch.testing.assert_close(state["pred_logits"], whole(None)["pred_logits"])


def test_each_step_is_timed_in_each_pass_after_warming_up(model):
    passes = []
    steps = [(name, lambda state, name=name: passes.append(name)) for name in "ab"]
    times = time_steps(steps, CPU, "off", repeats=3, warm_up=2)
    assert passes == [*"ab"] * 5
    assert {name: len(of_step) for name, of_step in times.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for of_step in times.values() for value in of_step)


def test_a_cut_copy_has_the_widths_and_leaves_the_model_as_it_is(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    widths = {name: min(of_module) for name, of_module in widths_of(model, "detector", UNITS).items()}
    slim = cut_copy(model, "detector", widths)
    assert {name: slim.widths_in("detector").of(name) for name in widths} == widths and 0 in widths.values()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_timed_has_no_batch_norms(model):
    copies = unpruned_copy(model, "transformer"), cut_copy(model, "detector", {"backbone.layer1.0": 0})
    for copy in copies:
        assert not [module for module in copy.modules() if "BatchNorm" in type(module).__name__]


def test_a_copy_has_no_gates(model):
    module = model.prunable_modules()["encoder.0.ffn"]
    module.set_gate(torch.zeros(module.width))
    try:
        assert unpruned_copy(model, "transformer").prunable_modules()["encoder.0.ffn"].layer.gates["ffn"] == (
            None,
            None,
        )
    finally:
        module.set_gate(None)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_round_gives_every_module_each_of_its_widths(scope):
    measurement = measurement_of(scope)
    turns = [measurement.turn_widths(turn) for turn in range(measurement.turns_in_round)]
    for name, widths in measurement.widths.items():
        assert {turn[name] for turn in turns} == {*widths}


@pytest.mark.parametrize("scope", SCOPES)
def test_neighbours_have_each_others_widths_in_different_turns_of_each_round(scope):
    measurement = measurement_of(scope)
    in_round, names = measurement.turns_in_round, [*measurement.widths]
    for one, other in itertools.pairwise(names):
        count = len(measurement.widths[one])
        if count < 4 or count != len(measurement.widths[other]):
            continue
        for number in range(latency.ROUNDS[0]):
            turns = [measurement.turn_widths(number * in_round + turn) for turn in range(count)]
            assert all(turn[one] != turn[other] for turn in turns)


@pytest.mark.parametrize(("first_seconds", "rounds"), [(1e-3, 12), (3.9, 5), (1e6, 3), (1.7, 11), (0.0, 12)])
def test_slow_detectors_are_measured_in_fewer_rounds(first_seconds, rounds):
    measurement = measurement_of("transformer")
    in_round = measurement.turns_in_round
    assert measurement.num_turns == latency.ROUNDS[0] * in_round
    for turn in range(in_round):
        measurement.add(Turn(False, measurement.turn_widths(turn), {"front": [1e-3]}, first_seconds / in_round))
    assert measurement.num_turns == rounds * in_round


def test_a_turn_counts_the_time_of_all_it_does(monkeypatch):
    measurement = measurement_of()
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(latency, "time_steps", fake_times)
    monkeypatch.setattr(latency.time, "monotonic", lambda: next(clock))
    assert measurement.measure().seconds == 2.5


def test_a_table_has_the_median_of_all_modules_of_a_kind(monkeypatch):
    measurement = measurement_of()
    monkeypatch.setattr(latency, "time_steps", fake_times)
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    while len(measurement.turns) < measurement.num_turns:
        measurement.add(measurement.measure())
    table = measurement.table()
    for name, widths in measurement.widths.items():
        assert [*table.entries[table.kinds[name]]] == widths
    shared = [name for name in table.kinds if table.kinds[name] == table.kinds["encoder.0.ffn"]]
    turns, in_round = len(measurement.turns), len(measurement.widths["encoder.0.ffn"])
    samples = [entry.samples for entry in table.entries[table.kinds["encoder.0.ffn"]].values()]
    assert len(shared) > 1 and sum(samples) == turns * len(shared) * latency.PASSES and len(samples) == in_round
    whole = {name: max(widths) for name, widths in measurement.widths.items()}
    positions = [name for name in table.kinds if name.endswith(".positions")]
    expected = len(FRONT) + len(HEADS) + sum(map(len, [*whole, *positions]))
    assert table.milliseconds(whole) == pytest.approx(expected)


def test_turns_of_another_search_are_refused(monkeypatch):
    measurement = measurement_of()
    monkeypatch.setattr(latency, "time_steps", fake_times)
    turn = measurement.measure()
    for wrong in (
        {"widths": {**turn.widths, "encoder.0.ffn": 1}}, {"graphs": True}, {"milliseconds": {"front": [1.0]}},
    ):  # fmt: skip
        measurement.turns = [dataclasses.replace(turn, **wrong)]
        with pytest.raises(UserError, match="journal: found turn 0 of the latencies with other modules or widths"):
            measurement.table()


def test_the_spread_is_the_interquartile_range():
    assert Entry.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Entry(3.0, pytest.approx(50.5), 5)
    assert Entry.of([2.0]) == Entry(2.0, 0.0, 1)


def table_of(milliseconds, scope="detector", rest=(3.0, 1.0)):
    """A table in which each module is of its own kind."""
    entries = {name: {w: Entry(ms, 0.0, 1) for w, ms in table.items()} for name, table in milliseconds.items()}
    kinds = {name: name for name in (FRONT, HEADS, *milliseconds)}
    return LatencyTable(SETTING, scope, False, kinds, entries,
                        {name: Entry(ms, 0.0, 1) for name, ms in zip((FRONT, HEADS), rest, strict=True)})  # fmt: skip


def test_a_width_that_is_slower_than_a_larger_one_is_not_chosen():
    table = table_of({"encoder.0.ffn": {8: 2.0, 16: 4.0, 24: 3.0, 32: 3.5, 40: 3.5, 48: 6.0}})
    assert table.costs({"encoder.0.ffn": [8, 16, 24, 32, 40, 48]}) == {
        "encoder.0.ffn": {8: 2.0, 24: 3.0, 40: 3.5, 48: 6.0}
    }
    faster = table_of({"encoder.0.ffn": {8: 2.0, 16: 1.0}})  # noise
    assert faster.costs({"encoder.0.ffn": [8, 16]}) == {"encoder.0.ffn": {16: 1.0}}


@pytest.mark.parametrize(("scope", "total"), [("transformer", 7.0), ("detector", 11.0)])
def test_a_budget_counts_the_rest_of_the_detector_in_its_scope_alone(scope, total):
    milliseconds = {"encoder.0.ffn": {8: 1.0, 16: 2.0}, "encoder.1.ffn": {8: 3.0, 16: 5.0}}
    prices = latency_prices(table_of(milliseconds, scope), {name: [8, 16] for name in milliseconds})
    assert prices.total == total and prices.outside == 11.0 - total
    assert prices.fractions(SearchConfig(keep=[0.9, 0.8])) == {"0.80": 0.8, "0.90": 0.9}
    assert prices.fractions(SearchConfig()) == {}
    assert prices.fractions(SearchConfig(target_ms=[9.5]))["9.5ms"] == pytest.approx((9.5 - prices.outside) / total)
    assert prices.fraction_in(9.0) == pytest.approx((9.0 - prices.outside) / total)
    for target_ms in (11.0, 20.0):
        with pytest.raises(UserError, match=rf"--target_ms {target_ms:g}: found no less .*, expected less than 11 ms$"):
            prices.fraction_in(target_ms)
    assert prices.fraction_in(8.0) * total == pytest.approx(prices.least) == pytest.approx(total - 3.0)
    for less in ("7.99", "3.5", "0.001"):  # the last ones are below what no width changes
        with pytest.raises(UserError, match=rf"--target_ms {less}: found less than the smallest .* at least 8$"):
            prices.fraction_in(float(less))
    with pytest.raises(UserError, match=r"--keep 0\.5: found less than the smallest widths cost, expected at least"):
        prices.fractions(SearchConfig(keep=[0.9, 0.5]))


def kind_with(**values):
    """A kind as in a file, of the module m at width 8, with other `values`."""
    entry = {"milliseconds": 1.0, "spread": 0.0, "samples": 1, **values}
    return {"kind": "a", "modules": ["m"], "widths": {"8": entry}}


def positions_with(milliseconds):
    """Positions of a layer's queries as in a file, used by its self-attention."""
    entry = {"milliseconds": milliseconds, "spread": 0.0, "samples": 1}
    return {"kind": "p", "steps": ["decoder.0.positions"], "used_by": {"self_attention": entry}}


def written(table, path):
    path.write_text(json.dumps(table.to_dict()))
    return path


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = table_of({"encoder.0.ffn": {8: 1.0, 16: 2.0}})
    assert read_table(written(table, tmp_path / "latency.json"), SETTING, "detector") == table


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "another"}, "found device 'another', expected 'a processor', as in this run"),
        ({"threads": 4}, "found threads 4, expected 1"),
        ({"image_size_hw": [64, 80]}, r"found image_size_hw \[64, 80\], expected \[64, 64\]"),
        ({"batch_size": 1}, "found batch_size 1, expected 2"),
        ({"amp": "bf16"}, "found amp 'bf16', expected 'off'"),
        ({"scope": "transformer"}, "found scope 'transformer', expected 'detector'"),
        ({"torch_version": "2.9.1"}, r"found torch_version '2\.9\.1', expected '2\.11\.0'"),
        ({"rest": {}}, r"cannot be read \(found no front or heads\), expected the latency\.json of a search"),
        ({"kinds": 3}, "cannot be read"),
        ({"positions": 3}, "cannot be read"),
        ({"positions": [positions_with(float("nan"))]}, r"cannot be read \(found milliseconds nan\)"),
        ({"positions": [positions_with(1.0)] * 2}, r"cannot be read \(found the kind 'p' twice\)"),
        ({"graphs": "false"}, r"cannot be read \(found graphs 'false', expected true or false\)"),
        ({"kinds": [kind_with(milliseconds=-1)]}, r"cannot be read \(found milliseconds -1\)"),
        ({"kinds": [kind_with(milliseconds=0)]}, r"cannot be read \(found milliseconds 0\)"),
        ({"kinds": [kind_with(milliseconds=float("inf"))]}, r"cannot be read \(found milliseconds inf\)"),
        ({"kinds": [kind_with(milliseconds="1")]}, r"cannot be read \(found milliseconds '1'\)"),
        ({"kinds": [kind_with(milliseconds=float("nan"))]}, r"cannot be read \(found milliseconds nan\)"),
        ({"kinds": [kind_with(spread=-0.5)]}, r"cannot be read \(found spread -0\.5\)"),
        ({"kinds": [kind_with(spread=True)]}, r"cannot be read \(found spread True\)"),
        ({"kinds": [kind_with(samples=0)]}, r"cannot be read \(found samples 0\)"),
        ({"kinds": [kind_with(samples=1.5)]}, r"cannot be read \(found samples 1\.5\)"),
        ({"kinds": [kind_with(), kind_with()]}, r"cannot be read \(found the kind 'a' twice\)"),
        ({"kinds": [kind_with(), {**kind_with(), "kind": "b"}]}, r"cannot be read \(found 'm' twice\)"),
        ({"kinds": [{**kind_with(), "modules": ["heads"]}]}, r"cannot be read \(found 'heads' twice\)"),
    ],
)
def test_a_table_of_another_setting_is_refused(tmp_path, changed, message):
    path = written(table_of({"encoder.0.ffn": {8: 1.0, 16: 2.0}}), tmp_path / "latency.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError, match=rf"^--latency_table {re.escape(str(path))}: {message}"):
        read_table(path, SETTING, "detector")


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "latency.json"
    path.write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path, SETTING, "detector")
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "none.json", SETTING, "detector")


def test_a_table_of_another_detector_or_of_other_widths_is_refused():
    table, widths = table_of({"encoder.0.ffn": {8: 1.0, 16: 2.0}}), {"encoder.0.ffn": [8, 16]}
    kinds = dict(table.kinds)
    check_table(table, kinds, widths, "a file")
    with pytest.raises(UserError, match=r"found no width 4 of encoder\.0\.ffn, expected a table measured with the"):
        check_table(table, kinds, {"encoder.0.ffn": [4, 8, 16]}, "a file")
    fewer = {FRONT: FRONT, HEADS: HEADS}
    for name, changed, of_modules in (
        ("encoder.0.ffn", {**kinds, "encoder.0.ffn": "other"}, widths),
        ("front", {**kinds, FRONT: "other"}, widths),
        ("heads", {**kinds, HEADS: "other"}, widths),
        ("encoder.0.ffn", fewer, {}),
        ("encoder.0.ffn", kinds, {}),  # removed here
        ("encoder.1.ffn", {**kinds, "encoder.1.ffn": "more"}, {**widths, "encoder.1.ffn": [8]}),
    ):
        with pytest.raises(UserError, match=rf"a file: found another {re.escape(name)} than that of this detector"):
            check_table(table, changed, of_modules, "a file")


@pytest.mark.parametrize("scope", SCOPES)
def test_a_table_does_not_fit_a_detector_with_other_heads_or_another_backbone(model, scope):
    kinds = kinds_at(model, scope=scope)
    table = LatencyTable(SETTING, scope, False, kinds, {}, dict.fromkeys(kinds, Entry(1.0, 0.0, 1)))
    thin = tiny_detector("--enc_layers 2", cfgs=model.widths_in("detector").replace("backbone.layer2.0", 8))[0].eval()
    classes = tiny_detector("--enc_layers 2")[0].eval()
    classes.class_embed = nn.Linear(32, 50)
    for other, step in ((thin, FRONT if scope == "transformer" else r"backbone\.layer2\.0"), (classes, HEADS)):
        with pytest.raises(UserError, match=f"found another {step} than that of this detector"):
            check_table(table, kinds_at(other, scope=scope), {}, "a file")


def test_a_kind_is_the_same_on_each_device():
    kinds = [kinds_of([("a", lambda _, to=to: torch.zeros(2, device=to))], CPU, "off") for to in ("cpu", "meta")]
    assert kinds[0] == kinds[1]


def test_the_dense_and_the_slim_detector_take_turns(model, monkeypatch):
    asked = []

    def times(steps, device, amp, *, repeats, warm_up=1, graphs=False):
        asked.append(steps[0][1](None)["pred_logits"].shape)
        return {WHOLE: [float(len(asked))] * repeats}

    monkeypatch.setattr(latency, "time_steps", times)
    slim = cut_copy(model, "detector", {"encoder.0.ffn": 8})
    found = latency.measure_whole({"before": lambda: model, "after": lambda: slim}, SETTING, CPU, graphs=False)
    assert len(asked) == 2 * latency.END_TURNS
    assert found["after"].milliseconds - found["before"].milliseconds == 1.0


def test_one_detector_at_a_time_takes_memory(model, monkeypatch):
    alive = weakref.WeakSet()

    def build():
        gc.collect()
        assert not alive
        copy = unpruned_copy(model, "detector")
        alive.add(copy)
        return copy

    monkeypatch.setattr(latency, "time_steps", lambda *args, repeats, **options: {WHOLE: [1.0] * repeats})
    monkeypatch.setattr(latency, "END_TURNS", 1)
    latency.measure_whole(dict.fromkeys("abc", build), SETTING, CPU, graphs=False)
