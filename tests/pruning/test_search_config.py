"""The options of a search: what they mean, and which are refused together."""

import pytest

from pruning.config import SearchConfig, refuse_unused_by_search
from pruning.method import FAST, PAPER, VISIT
from pruning.schedule import GP, MGP
from runs.search_command import get_pruning_parser
from util.cli import parse
from util.errors import UserError


def read(words, schedule=MGP):
    args, typed = parse(get_pruning_parser(schedule, "a test"), words.split())
    return SearchConfig.from_values(vars(args)), typed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--search visit --cost macs", "--cost: --search visit does not use it, expected --search fast"),
        ("--search paper --cost macs", "--cost: --search paper does not use it"),
        ("--search paper --keep 0.5", "--keep: --search paper does not use it, expected --search fast"),
        ("--search visit --keep 0.5", "--keep: --search visit does not use it"),
        ("--keep 0.5 --map_tol 0.1", "--map_tol: found --keep as well"),
        ("--keep 0.5 --skip_eval_converge 0.1", "--skip_eval_converge: found --keep as well"),
        (
            "--keep 0.6 --keep_params 0.5",
            "^--keep_params: found --cost params, which --keep limits .*, expected another",
        ),
        ("--keep 0.6 --keep_params 0.5 --scope detector --cost params", "^--keep_params: found --cost params, which"),
        ("--decay_points 1", "--decay_points: --search fast does not use it, expected --search visit or paper"),
        ("--decay_fraction 0.1", "--decay_fraction: --search fast does not use it"),
        ("--subset_batches_attention 3", "--subset_batches_attention: .* expected --search visit or paper"),
        ("--keep 0.5 --subset_batches_ffn 3", "--subset_batches_ffn: --search fast does not use it"),
        ("--num_candidates_attention 3", "--num_candidates_attention: .* expected --search paper"),
        ("--search visit --num_candidates_ffn 3", "--num_candidates_ffn: --search visit does not use it"),
        ("--search paper --selection once", "--selection: .* expected --search fast or visit"),
        ("--search paper --index_sets own", "--index_sets own: .* expected shared"),
        ("--search paper --reconstruct output", "--reconstruct output: .* expected none"),
        ("--search paper --calibration_images 8", "--calibration_images"),
        ("--search paper --amp", "--amp: found no ranking or reconstruction that uses gradients"),
        ("--search visit --ranking random --reconstruct none --cls_loss_coef 1", "--cls_loss_coef: found no ranking"),
        ("--search visit --ranking random --reconstruct none --calibration_images 8", "--calibration_images"),
    ],
)
def test_options_without_effect_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        refuse_unused_by_search(*read(words))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--keep 0.5 --cost macs",
        "--keep 0.6 --keep_params 0.5 --cost macs",
        "--keep 0.6 --keep_params 0.5 --scope detector",
        "--target_ms 5 --keep_params 0.5",
        "--amp --eval_amp fp16 --cls_loss_coef 2",
        "--search paper --eval_amp --cls_loss_coef 2",
        "--search visit --ranking first_order --reconstruct none --amp --focal_alpha 0.5",
        "--map_tol 0.1 --skip_eval_converge 0.0 --cost macs",
        "--search visit --map_tol 0.1 --decay_points 1 --subset_batches_ffn 3 --selection forward",
        "--search paper --decay_fraction 0.1",
        "--search paper --num_candidates_attention 3 --num_candidates_ffn 4",
        "--search paper --ranking fisher --calibration_images 8",
        "--search paper --reconstruct none",
        "--search paper --index_sets shared",
        "--selection once --index_sets shared --ranking magnitude --reconstruct none",
    ],
)
def test_options_that_are_read_are_accepted(words):
    refuse_unused_by_search(*read(words))


@pytest.mark.parametrize("value", ["0", "1.01", "-0.5", "nan", "half", ""])
def test_a_fraction_to_keep_is_above_0_and_up_to_1(value, capsys):
    with pytest.raises((SystemExit, UserError)):
        parse(get_pruning_parser(MGP, "a test"), ["--keep", value])


@pytest.mark.parametrize("value", [0.25, 1.0])
def test_a_fraction_to_keep_is_a_number(value):
    assert read(f"--keep {value}")[0].keep == [value]


@pytest.mark.parametrize("option", ["--ranking", "--selection", "--reconstruct", "--index_sets", "--search", "--cost"])
def test_unheard_of_values_are_refused(option, capsys):
    with pytest.raises((SystemExit, UserError)):
        read(f"{option} unheard_of")


def test_the_method_is_that_of_the_search_with_what_the_options_change():
    assert read("")[0].method == FAST
    assert read("--search visit")[0].method == VISIT
    assert read("--search paper")[0].method == PAPER
    changed = read("--ranking fisher --selection once --reconstruct output --index_sets shared")[0].method
    assert (changed.search, changed.ranking, changed.direction) == ("global", "fisher", "once")
    assert (changed.reconstruction, changed.share_sets) == ("output", True)
    assert read("--search paper --reconstruct output")[0].method.reconstruction == "output"


@pytest.mark.parametrize("schedule", [GP, MGP], ids=["gp", "mgp"])
def test_a_schedules_values_are_the_defaults_of_its_options(schedule):
    assert read("", schedule)[0].schedule(schedule) == schedule
    changed = read("--map_tol 0.5 --skip_eval_converge 0.25 --decay_points 2", schedule)[0].schedule(schedule)
    assert (changed.map_tol, changed.skip, changed.points_per_module) == (0.5, 0.25, 2)
    assert changed.groups == schedule.groups


def test_units_follow_the_number_of_heads():
    assert read("")[0].units(nheads=4, seed=0).ffn_unit == 16
    assert read("--ffn_unit 3 --attention_unit 2")[0].units(nheads=4, seed=0).ffn_unit == 3


def test_a_search_looks_at_a_number_of_images_or_at_all():
    assert read("--search_images 5")[0].search_images == 5
    assert read("--search_images all")[0].search_images == "all"
    for words, found in [("--search_images 0", "0: expected"), ("--search_images al", "al: expected .*, or all")]:
        with pytest.raises(UserError, match=found):
            read(words)


@pytest.mark.parametrize(
    ("words", "split", "images"),
    [
        ("", "train2017", 2000),
        ("--keep 0.5", "train2017", 2000),
        ("--reconstruct none --ranking random", "train2017", 2000),
        ("--search visit", "val2017", "all"),
        ("--search paper", "val2017", "all"),
        ("--search visit --search_split train2017", "train2017", 2000),
        ("--search_split val2017", "val2017", "all"),
        ("--search_images 7", "train2017", 7),
        ("--search_images all", "train2017", "all"),
        ("--search paper --search_images all", "val2017", "all"),
        ("--search paper --search_images 7", "val2017", 7),
    ],
)
def test_a_fast_search_looks_at_the_first_2000_training_images_and_visits_at_val2017(words, split, images):
    config = read(words)[0].with_images()
    assert (config.split, config.search_split, config.search_images) == (split, split, images)
