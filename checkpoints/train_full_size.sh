# Train a full-size detector (6 + 6 layers, 256 / 2048 channels, 300 queries, ResNet-18 up to layer3, 320 pixels) for
# measuring searches: train the demo detector on larger images, enlarge it (bench/full_size.py) and fine-tune it. Run
# this script in the project's root. The weights are too large for the repository. full_size_log.txt is the log of the
# second training below, on part of one CPU core; the first training was stopped after one epoch.
set -e
OUT=output/full_size
export OMP_NUM_THREADS=1
COMMON="--image_size 320 --label_noise_scale 1 --cls_loss_coef 2 --augmentation flip --num_workers 0 --amp \
    --lr_schedule cosine"
LARGE="$COMMON --scalar 3 --batch_size 5 --lr 2e-4 --lr_backbone 3e-4 --warmup_iters 10 --ema_decay 0.97 --epochs 3"
# The small detector adapts to the larger images at a fraction of the cost.
python -m datasets.demo $OUT/data --images 1000 --val-images 60 --seed 42 --size 320
python main.py --output_dir $OUT/small --coco_path $OUT/data --resume checkpoints/demo.pth $COMMON --scalar 5 \
    --batch_size 6 --lr 3e-4 --lr_backbone 5e-4 --warmup_iters 20 --ema_decay 0.98 --epochs 2
python -m bench.full_size --checkpoint $OUT/small/checkpoint.pth --output $OUT/grown.pth
python -m datasets.demo $OUT/data_large --images 260 --val-images 40 --seed 42 --size 320
python main.py --output_dir $OUT/large --coco_path $OUT/data_large --resume $OUT/grown.pth $LARGE
python -m weights.strip_optimizer $OUT/large/checkpoint.pth $OUT/full.pth --half
