"""Modular greedy pruning (MGP): GP with another tolerance; --search visit and paper prune attentions first, then FFNs.

python prune_greedy_ad.py -m dn_dab_detr --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8 --use_dn
torchrun --nproc_per_node 8 prune_greedy_ad.py --output_dir out --coco_path COCODIR --resume CKPT --batch_size 8
"""

from pruning.schedule import MGP
from runs.search_command import run

if __name__ == "__main__":
    run(MGP, __doc__)
