#!/bin/sh
# Linter, type checker and tests, on all cores, in the environment of setup_env.sh; further arguments go to pytest.
# The tests of the page want a browser: Debian's chromium, or .venv/bin/playwright install chromium. Without one they are skipped.
set -eu
cd "$(dirname "$0")"
REQUIREMENTS="requirements.txt requirements-dev.txt"
. ./setup_env.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
