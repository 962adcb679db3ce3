# Create checkpoints/demo.pth: draw the demo set, train on it from scratch, save the weights in half precision.
# `make checkpoint` runs this script in the project's root. demo_log.txt is the log of the run that created the file.
set -e
OUT=output/demo_training
export OMP_NUM_THREADS=1  # on two cores, two processes with one thread each train faster than one process with two
python -m datasets.demo $OUT/data --images 10000 --val-images 400 --seed 42
# --label_noise_scale 1 makes all labels of the denoising queries random. Otherwise queries copy their label and never
# learn to use the features, which do not separate the shapes early in training.
torchrun --nproc_per_node 2 main.py --output_dir $OUT/run --coco_path $OUT/data --image_size 128 \
    --backbone resnet18 --return_layer layer3 --batch_norm_type BatchNorm2d --no-pretrained_backbone \
    --enc_layers 3 --dec_layers 3 --hidden_dim 128 --dim_feedforward 512 --transformer_activation relu \
    --num_queries 40 --num_select 100 --scalar 5 --label_noise_scale 1 --cls_loss_coef 2 --augmentation flip \
    --batch_size 6 --num_workers 1 --amp --lr 4e-4 --lr_backbone 6e-4 --lr_schedule cosine --warmup_iters 300 \
    --ema_decay 0.999 --epochs 13
python -m weights.strip_optimizer $OUT/run/checkpoint.pth checkpoints/demo.pth --half
cp $OUT/run/log.txt checkpoints/demo_log.txt
