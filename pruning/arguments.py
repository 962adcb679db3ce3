"""The options of a search, and what they say as values."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection

from pruning.method import FAST, METHODS, Method
from pruning.reconstruction import LEVELS
from pruning.schedule import Schedule
from pruning.scores import RANKINGS
from pruning.search import Units
from pruning.selection import DIRECTIONS
from util.cli import real, script_parser, whole
from util.errors import UserError
from weights.options import (
    NETWORK_TITLE,
    add_board_option,
    add_data_set_options,
    add_denoising_option,
    add_device_options,
    add_evaluation_precision_option,
    add_folder_options,
    add_loader_options,
    add_loss_options,
    add_network_options,
    add_output_options,
    add_padding_option,
    add_position_options,
    add_safetensors_option,
    add_seed_option,
    option_names,
)

# What each search reads besides the options that all of them read.
CALIBRATION_IMAGES = 128  # tried on the demo: 320 keep no more mAP, 64 about half a point less
READ_BY_VISITS = ("subset_batches_attention", "subset_batches_ffn", "decay_points", "decay_fraction")
READ_BY = {
    "fast": ("keep", "cost", "selection"),
    "visit": (*READ_BY_VISITS, "selection"),
    "paper": (*READ_BY_VISITS, "num_candidates_attention", "num_candidates_ffn"),
}
CACHE_DTYPES = ("same", "bfloat16")
TARGETS = ("map_tol", "skip_eval_converge")
TRAIN_IMAGES = 2000  # of train2017 that a search looks at where --search_images names no other number


def get_pruning_parser(schedule: Schedule, doc: str) -> argparse.ArgumentParser:
    """Those options of `main.py` that a search reads and its own, with the schedule's own values as defaults.

    `doc` is the script's docstring, see `script_parser`.
    """
    parser = script_parser(doc)
    _add_shared_options(parser)
    _add_schedule_options(parser.add_argument_group("targets"), schedule)
    _add_method_options(parser.add_argument_group("choice and reconstruction of channels"))
    _add_search_options(parser.add_argument_group("search"))
    return parser


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    add_folder_options(run)
    add_safetensors_option(run)
    add_device_options(run, "mixed precision of the gradients that damage is predicted from; --amp alone is bf16")
    add_evaluation_precision_option(
        run,
        "mixed precision of mAP and of the features and states that a search keeps; off is float32, in which "
        "main.py --eval measures, too, whatever --amp says",
    )
    add_seed_option(run)
    data = parser.add_argument_group("data")
    add_data_set_options(data)
    add_loader_options(data)
    add_board_option(parser.add_argument_group("log"))
    network = parser.add_argument_group(NETWORK_TITLE)
    add_network_options(network)
    add_position_options(network)
    add_padding_option(network)
    add_output_options(network)
    losses = parser.add_argument_group("losses that channels are ranked by")
    add_loss_options(losses)
    add_denoising_option(losses, "for the fine-tuning command that the search prints; a search has no such queries")


def _add_schedule_options(group: argparse._ArgumentGroup, schedule: Schedule) -> None:
    add = group.add_argument
    add("--map_tol", type=real(0, 1), default=schedule.map_tol,
        help="fraction by which the full mAP may fall below the mAP before the search; in visits by GP, below the "
        "module's target")  # fmt: skip
    add("--skip_eval_converge", type=real(0, 1), default=schedule.skip,
        help="fraction by which the subset's mAP may miss the target of a visit; --search fast accepts this option of "
        "the paper's commands but does not use it")  # fmt: skip
    add("--decay_points", type=real(0), default=schedule.points_per_module,
        help="AP points by which the target falls from visit to visit (--search visit and paper)")  # fmt: skip
    add("--decay_fraction", type=real(0, 1), default=schedule.fraction_per_module,
        help="fraction by which the target falls from visit to visit (--search visit and paper)"
        + ("" if schedule.fraction_per_module is not None else ", by default --skip_eval_converge"))  # fmt: skip
    add("--keep", type=real(0.001, at_most=1), default=None,
        help="fraction of the transformer's cost to keep, such as 0.5, whatever mAP that leaves; by default as little "
        "as --map_tol allows")  # fmt: skip
    add("--cost", choices=("params", "macs"), default="params",
        help="what the fast search saves: parameters, or multiply-accumulates for an image like the first")  # fmt: skip


def _add_method_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--search", choices=tuple(METHODS), default="fast",
        help="fast: predict every width's damage, price all modules at once, measure mAP at most four times; "
        "visit: module after module, each to the least width that meets its target; paper: the same, but each module "
        "grows from nothing by the exact loss of one batch, with one index set and no reconstruction")  # fmt: skip
    add("--ranking", choices=RANKINGS, default=None,
        help="what channels are chosen by, of FFNs alone where --reconstruct full fills those of attentions anew; "
        f"by default that of --search ({FAST.ranking}, paper: exact)")  # fmt: skip
    add("--selection", choices=DIRECTIONS, default=None,
        help=f"how scores become an order of channels, by default that of --search ({FAST.direction}); the paper's "
        "search grows in any case")  # fmt: skip
    add("--reconstruct", choices=LEVELS, default=None,
        help="fit what is left in closed form: the layer behind the cut (output), queries, keys and values as well "
        f"(full), or not at all; by default that of --search ({FAST.reconstruction}, paper: none)")  # fmt: skip
    add("--index_sets", choices=("own", "shared"), default=None,
        help="channels chosen apart for queries with keys and for values, or together, by default that of --search "
        "(own, paper: shared)")  # fmt: skip
    add("--calibration_images", type=whole(1), default=CALIBRATION_IMAGES,
        help="images of the search, the first, that moments and gradients are taken of")  # fmt: skip


def _add_search_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--attention_unit", type=whole(1), default=1,
        help="channels of each head by which an attention's width steps: head widths are multiples of it, or whole. "
        "4 spares CUDA's kernels in float32, 8 in 16 bits, the padding of others")  # fmt: skip
    add("--ffn_unit", type=whole(1), default=None,
        help="channels by which an FFN's width steps: a multiple of it, or whole; by default 4 * nheads")  # fmt: skip
    add("--num_candidates_attention", type=whole(1), default=100, help="most attention channels scored in a step")
    add("--num_candidates_ffn", type=whole(1), default=200, help="most FFN channels scored in a step")
    add("--subset_batches_attention", type=whole(1), default=40, help="batches of the subset for an attention")
    add("--subset_batches_ffn", type=whole(1), default=20, help="batches of the subset for an FFN")
    add("--search_split", choices=("val2017", "train2017"), default=None,
        help="images the search looks at, by default train2017, and val2017 for --search visit and paper as in the "
        "paper; a fair figure searches on train2017 and reports val2017")  # fmt: skip
    add("--search_images", type=_images, default=None, metavar="N|all",
        help=f"first images of the split to look at; by default {TRAIN_IMAGES:,} of train2017 and all "
        "of val2017")  # fmt: skip
    add("--images_at_once", type=whole(1), default=32, help="most images in a forward that scores several candidates")
    add("--cache_device", choices=("cpu", "same"), default="same",
        help="where features are kept: RAM, or --device; RAM if they do not fit a GPU's free memory")  # fmt: skip
    add("--cache_gb", type=real(0), default=None,
        help="most gigabytes that features and states may take in each process; what does not fit is computed again "
        "each time. By default what is free, less a margin")  # fmt: skip
    add("--cache_dtype", choices=CACHE_DTYPES, default=None,
        help="precision in which features are kept: that in which they are computed, or bfloat16, half of it; by "
        "default bfloat16 only where more does not fit")  # fmt: skip
    add("--resume_search", action="store_true",
        help="go on with the search whose journal is in --output_dir, as if nothing had stopped it")  # fmt: skip


def _images(text: str) -> int | str:
    """Type of an option: a number of images, or "all"."""
    if text == "all":
        return text
    try:
        return whole(1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text:.40}: expected a whole number from 1 up, or all") from None


def settle_images(args: argparse.Namespace) -> None:
    """Set which images the search looks at, `search_split` and `search_images`, where they were not typed."""
    if args.search_split is None:
        args.search_split = "train2017" if args.search == "fast" else "val2017"
    if args.search_images is None:
        args.search_images = TRAIN_IMAGES if args.search_split == "train2017" else "all"


def check_search_options(args: argparse.Namespace, typed: Collection[str]) -> None:
    """Raise a `UserError` for a typed option that the search asked for would not read."""
    for name in sorted({name for names in READ_BY.values() for name in names} - set(READ_BY[args.search])):
        if name in typed:
            readers = " or ".join(search for search, names in READ_BY.items() if name in names)
            raise UserError(f"--{name}: --search {args.search} does not read it, expected --search {readers}")
    if args.keep is not None:
        for name in TARGETS:
            if name in typed:
                raise UserError(f"--{name}: found --keep as well, which keeps that much whatever mAP it leaves")
    if args.search == "paper" and args.reconstruct not in (None, "none"):
        raise UserError(f"--reconstruct {args.reconstruct}: --search paper scores channels as they are, expected none")
    if args.search == "paper" and args.index_sets == "own":
        raise UserError("--index_sets own: --search paper adds a channel to all of an attention, expected shared")
    method = method_of(args)
    if "index_sets" in typed and method.reconstruction == "full":
        raise UserError("--index_sets: --reconstruct full fills an attention's channels anew, expected output or none")
    if "images_at_once" in typed and method.ranking != "exact":
        raise UserError(f"--images_at_once: --ranking {method.ranking} does not read it, expected exact")
    if "calibration_images" in typed and not method.is_calibrated:
        raise UserError("--calibration_images: found neither ranking nor reconstruction that looks at them")
    if "amp" in typed and not method.is_calibrated:
        raise UserError("--amp: found neither ranking nor reconstruction that takes gradients, expected --eval_amp")
    losses = [name for name in option_names(add_loss_options) if name in typed]
    if losses and not method.is_calibrated and method.ranking != "exact":
        raise UserError(f"--{losses[0]}: found neither ranking nor reconstruction that looks at the loss")


def schedule_of(schedule: Schedule, args: argparse.Namespace) -> Schedule:
    """`schedule` with the values of the options."""
    return dataclasses.replace(
        schedule,
        map_tol=args.map_tol,
        skip=args.skip_eval_converge,
        points_per_module=args.decay_points,
        fraction_per_module=args.decay_fraction,
    )


def method_of(args: argparse.Namespace) -> Method:
    """The method of `--search`, with what the options change in it."""
    method = METHODS[args.search]
    changes = {
        "ranking": args.ranking,
        "direction": args.selection,
        "reconstruction": args.reconstruct,
        "share_sets": None if args.index_sets is None else args.index_sets == "shared",
    }
    return dataclasses.replace(method, **{name: value for name, value in changes.items() if value is not None})


def units_of(args: argparse.Namespace) -> Units:
    """The sizes of the steps, from the options."""
    ffn_unit = 4 * args.nheads if args.ffn_unit is None else args.ffn_unit
    return Units(args.attention_unit, ffn_unit, args.num_candidates_attention, args.num_candidates_ffn, args.seed)
