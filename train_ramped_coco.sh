#!/bin/sh
# MS-COCO by the published recipe, but for the loss: its hardness follows the recall of the batches (docs/training.md).
# DATA_PATH, NPROC and further flags as in train_region_coco.sh.
set -eu
cd "$(dirname "$0")"

exec sh train_region_coco.sh --hardness recall --model_name runs/coco_ramped "$@"
