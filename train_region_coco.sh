#!/bin/sh
# The published recipe for MS-COCO. DATA_PATH=folder says where coco_precomp/ is; further flags are passed on:
#     DATA_PATH=/data sh train_region_coco.sh --batch_size 64
# NPROC=4 trains on four GPUs of this machine.
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
