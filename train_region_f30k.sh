#!/bin/sh
# The published recipe for Flickr30K. DATA_PATH=folder says where f30k_precomp/ is; further flags are passed on:
#     DATA_PATH=/data sh train_region_f30k.sh --batch_size 64
# NPROC=4 trains on four GPUs of this machine.
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh

# shellcheck disable=SC2086 -- a command and its arguments
exec $LAUNCH train.py \
    --data_path "${DATA_PATH:-data}" --data_name f30k_precomp \
    --bert bert-base-uncased --img_dim 2048 --embed_size 1024 \
    --batch_size 128 --num_epochs 25 --learning_rate 0.0005 --lr_update 15 \
    --margin 0.2 --grad_clip 2.0 --vse_mean_warmup_epochs 1 \
    --workers 10 --log_step 200 \
    --model_name runs/f30k_region "$@"
