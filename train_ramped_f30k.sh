#!/bin/sh
# Flickr30K by the published recipe, but for the loss: its hardness follows the recall of the batches (docs/training.md).
# DATA_PATH, NPROC and further flags as in train_region_f30k.sh.
set -eu
cd "$(dirname "$0")"

exec sh train_region_f30k.sh --hardness recall --model_name runs/f30k_ramped "$@"
