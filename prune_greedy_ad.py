"""Modular greedy pruning (MGP): GP with another tolerance; --search visit and paper prune attentions first, then FFNs.

python prune_greedy_ad.py -m dn_dab_detr --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8 --use_dn
torchrun --nproc_per_node 8 prune_greedy_ad.py --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8
"""

from typing import Any

from pruning.schedule import MGP
from runs.config import SearchOptions
from runs.search_command import run_script, search
from runs.search_results import Result
from util.cli import options_from_python


def run(**options: Any) -> Result:
    """Search from Python, with the options of the command line as keywords; return widths, AP and the file.

    Raises:
        UserError: there is no such option; and as `runs.search_command.search`, like RunFailedError.
    """
    return search(MGP, *options_from_python(options, SearchOptions))


if __name__ == "__main__":
    run_script(MGP, __doc__)
