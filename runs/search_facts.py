"""The facts that the result of a search depends on, which its journal records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets.coco import split_of
from models.widths import Widths
from pruning.journal import VERSION
from pruning.schedule import Schedule
from pruning.search import Units
from runs.config import SearchOptions, TrainingOptions
from util.cli import options_of
from util.files import file_digest
from weights.checkpoint_file import plain_arguments
from weights.huggingface import weights_digest

OPTIONS = options_of(SearchOptions)
# Options that may change when a search is resumed: paths, and options that affect only speed.
NOT_DECIDING = {name for name, field in OPTIONS.items() if field.metadata["stored"] == "run"} - {"cfgs"}
# Options in the journals of older versions that a search does not read.
UNREAD = {*options_of(TrainingOptions)} - {*OPTIONS}
# Facts that journals of older versions lack.
ADDED: dict[str, dict[str, Any]] = {
    "args": {
        "scope": "transformer",
        "block_unit": 8,
        "min_units": 1,
        "target_ms": None,
        "keep_params": None,
        "min_dec_layers": None,
    },
    "units": {"block_unit": 8, "min_units": 1},
}


def search_facts(
    options: SearchOptions,
    schedule: Schedule,
    units: Units,
    full_widths: Widths,
    base_ap: float,
    is_cache_halved: bool,
    kept_queries: list[int] | None = None,
    latency: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what the result depends on; only a search with the same facts can be resumed.

    Args:
        base_ap: mAP in [0, 1] before the search.
        is_cache_halved: whether cached features are in bfloat16.
        kept_queries: indices of the checkpoint's queries that are kept, None for all.
        latency: what measured latencies depend on, empty for other costs.
    """
    args = plain_arguments(options.values())
    for name in ("keep", "target_ms"):  # older journals have a single number
        if isinstance(args[name], list) and len(args[name]) == 1:
            (args[name],) = args[name]
    return {
        "version": VERSION,
        "args": {
            **{name: value for name, value in args.items() if name not in NOT_DECIDING | UNREAD},
            "cost": options.search.cost_unit,
            "cache_dtype": "bfloat16" if is_cache_halved else "same",
        },
        "weights": weights_digest(Path(options.run.resume or "")),
        "annotations": file_digest(split_of(options.data, options.search.split).annotation_file),
        "schedule": dataclasses.asdict(schedule),
        "method": dataclasses.asdict(options.search.method),
        "units": dataclasses.asdict(units),
        "base_ap": base_ap,
        "full_widths": full_widths.to_list(),
        **({} if kept_queries is None else {"queries": kept_queries}),
        **({"latency": latency} if latency else {}),
    }
