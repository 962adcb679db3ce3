"""The fine-tuning benchmark: what it trains and keeps, and that nothing is measured twice."""

import json

import pytest

from bench import finetune
from bench.finetune import RATES, RECIPE, Bench, Configuration, Stopped, configurations, get_parser, result_table
from util.cli import parse
from util.errors import UserError

AP = {"slim47": 0.6, "dense": 0.635}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Makes a benchmark whose scripts write what the real ones write; `bench.started` lists their options."""
    (tmp_path / "dense.pth").write_text("weights")

    def make(*words):
        args, _ = parse(get_parser(), ["demo", "--checkpoint", str(tmp_path / "dense.pth"), "--work",
                                       str(tmp_path / "work"), "--output", str(tmp_path), "--coco_path",
                                       str(tmp_path), *words])  # fmt: skip
        made = Bench(args)
        made.started = []

        def main_script(name, script, start, *options):
            made.started.append((script, str(start), options))
            folder = args.work / name.replace(":", "").replace(",", "").replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            if "--eval" in options:
                found = dict.fromkeys(finetune.KEPT, 1) | {"AP": AP[name.removesuffix("_as_cut")]}
                (folder / "eval.json").write_text(json.dumps(found))
            elif script == "main.py":
                lines = [{"epoch": 0, "test_AP": 0.61}, {"epoch": 1, "test_AP": 0.62, "unread": 3}]
                if "fails" in name:
                    raise UserError("it failed")
                (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
                if "stops" in name:
                    raise Stopped
            return folder

        monkeypatch.setattr(made, "_main", main_script)
        return made

    return make


def test_configurations_have_names_of_their_own_and_rates_for_both():
    names = [one.name for one in configurations()]
    assert len(names) == len(set(names))
    for subject in ("slim47", "dense"):
        rates = {one.options["lr"] for one in configurations() if one.name.startswith(f"{subject}: lr") and
                 one.seed == 42 and set(one.options) == {"lr", "lr_backbone"}}  # fmt: skip
        assert rates == set(RATES) and len(RATES) >= 4
    for one in configurations():
        if "lr" in one.options and "backbone" not in one.name and "rates of the dense" not in one.name:
            assert float(one.options["lr_backbone"]) == pytest.approx(float(one.options["lr"]) / 10)


def test_rows_keep_the_curve_and_a_second_call_runs_only_what_is_missing(bench, tmp_path):
    chosen = [
        Configuration("slim47: lr 1e-5", "slim47", {"lr": "1e-5"}),
        Configuration("dense: distilled", "dense", {"distill_queries": "matching anchors"}, seed=43),
        Configuration("slim47: stops", "slim47", {}),
    ]
    first = bench()
    assert first.run(chosen) == []
    result = json.loads((tmp_path / "finetune_demo.json").read_text())
    assert {name: cut["AP"] for name, cut in result["cut"].items()} == AP
    rows = {row["name"]: row for row in result["rows"]}
    assert [rows[one.name]["finished"] for one in chosen] == [True, True, False]
    assert rows["slim47: lr 1e-5"]["ap"] == 0.62 and rows["dense: distilled"]["seed"] == 43
    assert rows["slim47: lr 1e-5"]["curve"] == [{"epoch": 0, "test_AP": 0.61}, {"epoch": 1, "test_AP": 0.62}]
    assert rows["slim47: lr 1e-5"]["options"] == {**RECIPE, "lr": "1e-5"}
    of = {" ".join(options): start for script, start, options in first.started if "--epochs" in options}
    assert sum("--distill none" in words and "pruned.pth" in start for words, start in of.items()) == 2
    assert (
        sum("--distill_queries matching anchors" in words and "dense.pth" in start for words, start in of.items()) == 1
    )
    assert all(("--start_fresh" in words) == ("dense.pth" in start) for words, start in of.items())
    printed = result_table(result)
    assert "62.00" in printed and "61.00 62.00" in printed and "unfinished" in printed

    again = bench()
    again.run(chosen)
    trained = [options for script, _, options in again.started if "--epochs" in options]
    assert len(trained) == 1 and not any("--eval" in options for _, _, options in again.started)


def test_a_failed_training_is_reported_and_the_others_run(bench):
    found = bench()
    chosen = [Configuration("slim47: fails", "slim47", {}), Configuration("dense: lr", "dense", {})]
    assert found.run(chosen) == ["it failed"]
    assert [row["name"] for row in found.result["rows"]] == ["dense: lr"]


def test_results_of_other_settings_are_not_mixed(bench):
    bench().run([Configuration("dense: lr", "dense", {})])
    with pytest.raises(UserError, match=r"finetune_demo\.json: made with other settings, expected"):
        bench("--epochs", "3")


def test_a_script_that_fails_is_named_with_its_last_line(bench, tmp_path):
    with pytest.raises(UserError, match=r"log: -c ended with exit code 3: out of luck"):
        bench().run_script(["-c", "import sys; print('out of luck'); sys.exit(3)"], tmp_path / "log")
    with pytest.raises(Stopped):
        late = bench()
        late.deadline = 0
        late.run_script(["-c", ""], tmp_path / "log")


def test_an_unknown_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["finetune", "demo", "--checkpoint", "x", "--work", str(tmp_path), "--only", "none"]
    )
    with pytest.raises(UserError, match="--only: found no configuration named none"):
        finetune.main()
