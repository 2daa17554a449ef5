#!/bin/sh
# Flickr30K with SigLIP on both sides: X-Dim as a fine-grained head on a modern pair of towers.
#
#     DATA_PATH=/data sh train_siglip_f30k.sh [flags of train.py]   # flickr30k-images/, dataset_flickr30k.json lie there
#     NPROC=4 sh train_siglip_f30k.sh                                 # on four GPUs of this machine
#     THAW=1 sh train_siglip_f30k.sh                                  # and train the vision tower along afterwards
#
# The vision tower's patches are written once, in float16 (31,014 pictures, 64 regions of 768 numbers: 3 GB), so that an
# epoch takes minutes. dataset_flickr30k.json: Karpathy's captions and splits. Not run on Flickr30K yet.
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh
data=${DATA_PATH:-data}
towers=${TOWERS:-google/siglip-base-patch16-256}

# shellcheck disable=SC2086 -- a command and its arguments
[ -d "$data/f30k_siglip" ] || $LAUNCH -m lib.prepare images "$data/flickr30k-images" "$data/dataset_flickr30k.json" \
    --data_path "$data" --data_name f30k_siglip --encoder "hf:$towers" --regions 64

# shellcheck disable=SC2086
$LAUNCH train.py \
    --data_path "$data" --data_name f30k_siglip --text_encoder "$towers" --embed_size 1024 \
    --batch_size 128 --num_epochs 15 --learning_rate 0.0005 --lr_update 10 \
    --margin 0.2 --grad_clip 2.0 --loss ramped --gate open --mask_padding \
    --workers 10 --log_step 200 \
    --model_name runs/f30k_siglip "$@"

# shellcheck disable=SC2086
[ -z "${THAW:-}" ] || $LAUNCH train.py \
    --data_path "$data" --data_name f30k_siglip --init_from runs/f30k_siglip \
    --image_encoder "hf:$towers" --freeze_epochs 0 --thaw_epochs 2 --encoder_lr 0.01 \
    --batch_size 128 --num_epochs 8 --learning_rate 0.0001 --lr_update 6 \
    --margin 0.2 --grad_clip 2.0 --loss ramped --mask_padding --micro_batch 32 \
    --workers 10 --log_step 200 \
    --model_name runs/f30k_siglip_thawed "$@"
