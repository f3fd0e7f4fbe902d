#!/bin/sh
# Sets up what the tests need in .venv, and runs them on all cores. Arguments go to pytest:
#
#   sh tests/run.sh                       everything
#   sh tests/run.sh -m "not kill and not model"   the fast part
#   sh tests/run.sh -n 0 -k fencing -x    in one process, the tests named so, to the first failure
#
# PERDURE_ENV=/path/to/venv runs them against what is installed there, such as a built wheel.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=constraints/environment.sh
. "$root/constraints/environment.sh"
environment test

cd "$root"
# -P keeps the current directory off sys.path: what is tested is what is installed.
exec "$bin/python" -P -m pytest -n auto --dist loadgroup "$@"
