"""Greedy pruning (GP): prune all modules to one mAP; --search visit and paper follow network order and falling targets.

python prune_greedy.py -m dn_dab_detr --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8 --use_dn
python prune_greedy.py --output_dir out --coco_path COCODIR --resume CKPT --keep 0.5 --cost macs
"""

from pruning.schedule import GP
from runs.search_command import run

if __name__ == "__main__":
    run(GP, __doc__)
