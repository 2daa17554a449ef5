#!/bin/sh
# Everything that wants a GPU, the most important first, in at most eight minutes on an H100: tests, then benchmarks.
#
#     sh benchmarks/gpu.sh OUT           # results in the folder OUT; --toy: tiny sizes, on a CPU too, measures nothing
#
# Each part is a process with a limit of its own (seconds, below) that prints into OUT/NAME.txt and writes OUT/NAME.json
# as it goes. After each, OUT/gpu.md (tables for docs/performance.md) and OUT/gpu.json are written anew, with what failed,
# was cut off or left out; the exit code is 1 where a part failed. Nothing is downloaded. PYTHON=path names the Python,
# COMMIT=name the code where git is not.
set -u
cd "$(dirname "$0")/.." || exit 2

OUT=${1:?"usage: sh benchmarks/gpu.sh OUT [--toy]"} TOY=${2:-}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in .venv/bin/python python3 python; do
        "$PYTHON" -c "import torch" 2>/dev/null && break
    done
fi
export PYTHON PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TRITON_INTERPRET="${TRITON_INTERPRET:-0}"
rm -f "$OUT/parts.tsv"
failed=0

# part NAME LIMIT ARGUMENTS: what Python is called with, to which --toy and --json are added
part() {
    name=$1 limit=$2
    shift 2
    echo "$name (at most $limit s)"
    rm -f "$OUT/$name.json"
    started=$(date +%s) code=0
    # shellcheck disable=SC2086 -- nothing, or one flag
    timeout -k 5 "$limit" "$PYTHON" "$@" $TOY --json "$OUT/$name.json" >"$OUT/$name.txt" 2>&1 || code=$?
    said=$(tr '\r' '\n' <"$OUT/$name.txt" | grep . | tail -n 1 | tr '\t' ' ')
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$(($(date +%s) - started))" "$said" >>"$OUT/parts.tsv"
    [ "$code" -eq 0 ] || { failed=1 && echo "$name: exit code $code: $said"; }
    "$PYTHON" benchmarks/gpu.py summary "$OUT"
}

# without NAME REASON: a part that is left out
without() {
    printf '%s\tskipped\t0\t%s\n' "$1" "$2" >>"$OUT/parts.tsv"
    "$PYTHON" benchmarks/gpu.py summary "$OUT"
}

part tests 110 benchmarks/gpu.py tests
part similarity 35 benchmarks/similarity.py
part train_step 35 benchmarks/train_step.py
part training 70 benchmarks/training.py
part real_training 85 benchmarks/real_training.py --step "$OUT/training.json"
part scoring 40 benchmarks/scoring.py
part images 35 benchmarks/images.py --encoder torchvision:resnet50
if [ "$TOY" ]; then
    without demo "toy mode: it takes minutes on a CPU"
else
    part demo 70 benchmarks/gpu.py demo
fi

echo
cat "$OUT/gpu.md"
exit "$failed"
