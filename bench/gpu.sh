#!/bin/sh
# Test and measure everything that needs a GPU: sh bench/gpu.sh OUT [STEP ...]
#
# Runs all steps, or the named ones, in the order of STEPS below, without a network. A whole run was not timed yet: on an
# H200, searching on 1,000 images and not 400, the steps before r50_search took 6.6 minutes without graphs. Each step
# writes its log and figures to OUT when it ends, and a failed or late step does not stop the next. Ends with a table of
# the steps; the exit code is 1 if one failed. Variables:
#
# PYTHON   interpreter that has the packages of requirements.txt and tests/requirements.txt; default python3
# DEVICE   cuda (default) or cpu, to rehearse
# QUICK    1 for small sizes, to rehearse
# LIMIT    seconds for each step; default 240
# COCO     COCO-format data for the ResNet-50 detector; default: a small set drawn to OUT
set -u
STEPS="environment operator tests ops latency graphs search training r50_search r50_training compiled"
OUT=${1:?usage: sh bench/gpu.sh OUT [STEP ...]}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} LIMIT=${LIMIT:-240}
OPS=models/dn_dab_deformable_detr/ops
SAMPLING_LIBRARY=$PWD/$OPS/build/gpu/lib
WORK=$(mktemp -d) || exit 2 # data and checkpoints, which are not figures
export SAMPLING_LIBRARY PYTHONPATH="$SAMPLING_LIBRARY${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
for name in "$@"; do
    case " $STEPS " in *" $name "*) ;; *) echo "$name: no such step, expected some of: $STEPS" >&2; exit 2 ;; esac
done

if [ -n "$QUICK" ]; then
    images=16 val_images=8 size=64 rounds=1 subjects=demo batches=1 epochs=1 r50="--image_size 64"
else
    images=400 val_images=400 size=128 rounds=10 subjects="gp mgp whole demo" batches="1 8" epochs=3 r50=
fi

keep() { # FOLDER: the figures of a run
    for file in log.txt eval.json summary.json; do
        [ ! -e "$WORK/$1/$file" ] || cp "$WORK/$1/$file" "$OUT/$1_$file"
    done
}
run() { timeout -s INT -k 10 "$LIMIT" "$PYTHON" "$@"; }

environment() {
    if [ "$DEVICE" = cuda ]; then nvidia-smi && nvcc --version; fi
    run -c "import sys, torch, torchvision; print(sys.version, torch.__version__, torchvision.__version__)"
}
operator() { (cd $OPS && FORCE_CUDA=$([ "$DEVICE" = cuda ] && echo 1 || echo 0) run setup.py build \
    --build-base build/gpu --build-lib build/gpu/lib && run test.py); }
tests() { run -m pytest -m gpu -n 6 --dist load -rs --durations 10 -p no:cacheprovider; }
ops() { run -m bench.ops --device "$DEVICE" --rounds $((2 * rounds)) --output "$OUT/ops_$DEVICE.json"; }
latency() {
    # shellcheck disable=SC2086
    run -m bench.latency --device "$DEVICE" --subjects $subjects --batches $batches --repeats $rounds --output "$OUT" \
        --modes ${1:-eager bf16}
}
graphs() { latency "graph graph-bf16"; }
compiled() { latency "compiled compiled-bf16"; }
demo() { # SCRIPT FOLDER CHECKPOINT OPTIONS...
    script=$1 folder=$2 checkpoint=$3
    shift 3
    run "$script" --device "$DEVICE" --coco_path "$WORK/demo" --output_dir "$WORK/$folder" --resume "$checkpoint" \
        --batch_size 16 --num_workers 4 "$@" && keep "$folder"
}
search() {
    demo main.py dense checkpoints/demo.pth --eval &&
        demo prune_greedy_ad.py search checkpoints/demo.pth --search_split train2017 --search_images "$images" \
            --scope detector --keep 0.5 &&
        demo main.py pruned "$WORK/search/pruned.pth" --eval
}
training() {
    pruned=$WORK/search/pruned.pth
    [ -e "$pruned" ] || pruned=checkpoints/demo.pth
    demo main.py training "$pruned" --epochs $epochs --amp --lr 1e-4 --lr_backbone 1e-5 --lr_schedule cosine \
        --ema_decay 0.99 --augmentation flip --cls_loss_coef 2 --distill checkpoints/demo.pth
}
coco() { # SCRIPT FOLDER OPTIONS...
    script=$1 folder=$2
    shift 2
    [ -n "${COCO:-}" ] || COCO=$WORK/demo
    # shellcheck disable=SC2086
    run "$script" --device "$DEVICE" --coco_path "$COCO" --output_dir "$WORK/$folder" --resume "$WORK/r50.pth" \
        --num_workers 4 $r50 "$@" && keep "$folder"
}
r50_search() {
    coco prune_greedy_ad.py r50_search --search_split train2017 --batch_size 4 --scope detector --keep 0.5
}
r50_training() { coco main.py r50_training --epochs 1 --batch_size 4 --amp; }

if ! { run -m datasets.demo "$WORK/demo" --images $images --val-images $val_images --size $size &&
    run -c "
import sys, torch
from models import build
from models.config import DetectorConfig
torch.manual_seed(0)
model, *_ = build(DetectorConfig.from_values({'pretrained_backbone': False, 'num_classes': 91}))
torch.save({'model': model.state_dict()}, sys.argv[1])
" "$WORK/r50.pth"; } >"$OUT/data.log" 2>&1; then
    cat "$OUT/data.log"
    exit 1
fi

worst=0
for name in $STEPS; do
    case " ${*:-$STEPS} " in *" $name "*) ;; *) continue ;; esac
    start=$(date +%s)
    "$name" >"$OUT/$name.log" 2>&1
    code=$?
    [ $code = 0 ] || { worst=1 && tail -n 15 "$OUT/$name.log"; }
    printf '%-14s exit code %3d, %4d s\n' "$name" $code $(($(date +%s) - start)) | tee -a "$OUT/steps.txt"
done
rm -rf "$WORK"
exit $worst
