"""Greedy pruning (GP): prune all modules to one mAP; --search visit and paper follow network order and falling targets.

python prune_greedy.py -m dn_dab_detr --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8 --use_dn
python prune_greedy.py --output_dir out --coco_path COCODIR --resume CKPT --keep 0.5 --cost macs
"""

from typing import Any

from pruning.schedule import GP
from runs.config import SearchOptions
from runs.search_command import run_script, search
from runs.search_results import Result
from util.cli import options_from_python


def run(**options: Any) -> Result:
    """Search from Python, with the options of the command line as keywords; return widths, AP and the file.

    Raises:
        UserError: there is no such option; and as `runs.search_command.search`, like RunFailedError.
    """
    return search(GP, *options_from_python(options, SearchOptions))


if __name__ == "__main__":
    run_script(GP, __doc__)
