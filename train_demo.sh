#!/bin/sh
# Everything from nothing: environment, data set, training, evaluation. A few minutes on two CPU cores, no download of
# data or weights. RUN=folder names the run folder. The table to expect is in README.md.
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh

RUN=${RUN:-runs/demo-$(date +%Y%m%d-%H%M%S)}

"$PYTHON" -m lib.prepare scenes

# shellcheck disable=SC2086 -- a command and its arguments
$LAUNCH train.py \
    --data_name scenes_precomp --img_dim 414 --bert vocab/scenes --bert_from_scratch \
    --embed_size 128 --batch_size 32 \
    --num_epochs 5 --learning_rate 0.002 --lr_update 4 --vse_mean_warmup_epochs 5 \
    --model_name "$RUN" "$@"

"$PYTHON" test.py --checkpoint "$RUN"
