# Sourced by the scripts beside it: sets PYTHON to one that has what the project needs.
#
# The active Python is used if it meets the requirements; else .venv, which is made, or completed, here. Packages come
# from wherever pip is set up to find them; PyTorch with CUDA is about 5 GB.
# REQUIREMENTS: the requirements files that must be met. NPROC: processes that train together, one a GPU; LAUNCH becomes
# what starts a program so.

REQUIREMENTS=${REQUIREMENTS:-requirements.txt}

# shellcheck disable=SC2086 -- the file names are meant to split
ready() { "$1" -m lib.environment $REQUIREMENTS >/dev/null 2>&1; }

choose_python() {
    for PYTHON in python3 python .venv/bin/python; do
        ready "$PYTHON" && return
    done
    PYTHON=.venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        for base in python3 python python3.14 python3.13 python3.12 python3.11; do
            "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
            base=
        done
        if [ -z "$base" ]; then
            echo "error: no Python 3.11 or newer found; install one and run this again" >&2
            exit 2
        fi
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv || exit 2
    fi
    echo "installing the packages of $REQUIREMENTS into .venv (a few minutes, about 5 GB)"
    files=
    for file in $REQUIREMENTS; do files="$files -r $file"; done
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --disable-pip-version-check $files || exit 2
    if ! ready "$PYTHON"; then
        "$PYTHON" -m lib.environment $REQUIREMENTS
        exit 2
    fi
}

choose_python

LAUNCH=$PYTHON
case ${NPROC:=1} in
    1) ;;
    *[!0-9]* | 0*)
        echo "error: NPROC=$NPROC: expected a number of processes" >&2
        exit 2
        ;;
    *)
        cores=$(getconf _NPROCESSORS_ONLN)
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
        LAUNCH="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $NPROC"
        ;;
esac
