#!/bin/sh
# The published recipe for Flickr30K.
#
#     DATA_PATH=/data sh train_region_f30k.sh [flags of train.py]   # f30k_precomp/ lies in DATA_PATH (default: data)
#     NPROC=4 sh train_region_f30k.sh                                 # on four GPUs of this machine
#
# Published, test split (nobody has run this script on Flickr30K yet; then test.py):
#     image to text R@1 83.5, R@5 96.9, R@10 98.0; text to image 67.5, 89.1, 93.3; rSum 528.2
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
