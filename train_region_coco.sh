#!/bin/sh
# The published recipe for MS-COCO.
#
#     DATA_PATH=/data sh train_region_coco.sh [flags of train.py]   # coco_precomp/ lies in DATA_PATH (default: data)
#     NPROC=4 sh train_region_coco.sh                                 # on four GPUs of this machine
#
# Published, mean of five 1K folds (nobody has run this script on MS-COCO yet; then testall.py):
#     image to text R@1 82.6, R@5 97.1, R@10 99.0; text to image 67.4, 92.5, 96.8; rSum 535.4
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh

# shellcheck disable=SC2086 -- a command and its arguments
exec $LAUNCH train.py \
    --data_path "${DATA_PATH:-data}" --data_name coco_precomp \
    --bert bert-base-uncased --img_dim 2048 --embed_size 1024 \
    --batch_size 128 --num_epochs 20 --learning_rate 0.0005 --lr_update 10 \
    --margin 0.2 --grad_clip 2.0 --vse_mean_warmup_epochs 1 \
    --workers 10 --log_step 200 \
    --model_name runs/coco_region "$@"
