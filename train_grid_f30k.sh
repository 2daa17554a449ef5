#!/bin/sh
# Flickr30K from pixels, by the published grid recipe: a ResNet is trained along, frozen for two epochs, then thawed from
# the top, a stage every five epochs.
#
#     DATA_PATH=/data sh train_grid_f30k.sh [flags of train.py]
#     NPROC=4 sh train_grid_f30k.sh                                   # on four GPUs of this machine
#
# DATA_PATH (default: data) holds f30k_precomp/ with captions and ids (features are not read), flickr30k-images/ and
# id_mapping.json. ResNet's ImageNet weights are fetched once. Memory: --micro_batch 32 and --gradient_checkpointing.
# Not run on Flickr30K yet.
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh

# shellcheck disable=SC2086 -- a command and its arguments
exec $LAUNCH train.py \
    --data_path "${DATA_PATH:-data}" --data_name f30k_precomp \
    --image_encoder torchvision:resnet50 --image_size 256 --encoder_lr 0.01 --freeze_epochs 2 --thaw_epochs 5 \
    --bert bert-base-uncased --embed_size 1024 \
    --batch_size 128 --num_epochs 25 --learning_rate 0.0005 --lr_update 15 \
    --margin 0.2 --grad_clip 2.0 --vse_mean_warmup_epochs 1 \
    --workers 10 --log_step 200 \
    --model_name runs/f30k_grid "$@"
