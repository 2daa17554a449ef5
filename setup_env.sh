# Sourced by the scripts beside it: sets PYTHON to one that has what the project needs, and LAUNCH to what starts a program.
#
# PYTHON=path is taken as it is. Else the active Python is used if it has the packages; else .venv, which is made, or
# completed, here. Packages come from wherever pip is set up to find them; PyTorch with CUDA is about 5 GB.
# REQUIREMENTS: the requirements files. NPROC: processes that train together, one for each GPU.

REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
FILES=
for file in $REQUIREMENTS; do FILES="$FILES -r $file"; done

NEW_ENOUGH='import sys; sys.exit(sys.version_info < (3, 11))'

# Whether a Python has all packages: pip would install nothing, and has nowhere to take it from.
# shellcheck disable=SC2086 -- the file names are meant to split
ready() {
    "$1" -c "$NEW_ENOUGH" 2>/dev/null &&
        PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' "$1" -m pip install --dry-run --no-index --quiet $FILES >/dev/null 2>&1
}

choose_python() {
    for PYTHON in python3 python .venv/bin/python; do
        ready "$PYTHON" && return
    done
    PYTHON=.venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        for base in python3 python python3.14 python3.13 python3.12 python3.11; do
            "$base" -c "$NEW_ENOUGH" 2>/dev/null && break
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
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --disable-pip-version-check $FILES || exit 2
}

[ -n "${PYTHON:-}" ] || choose_python

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
        LAUNCH="$PYTHON -m lib.distributed --standalone --nproc_per_node $NPROC"
        ;;
esac
