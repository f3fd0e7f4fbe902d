#!/bin/sh
# Sets perdure up in .venv and runs examples/tasks.jsonl on the built-in demonstration platform,
# which needs no key. Run it again and nothing is done twice; remove quickstart.db to begin anew.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=constraints/environment.sh
. "$root/constraints/environment.sh"
environment run

cd "$root"
trap : INT # Ctrl-C is for perdure, which ends in its own way
code=0
# The demonstration would be over before it is seen: a tenth of a second lies between its chunks.
"$bin/perdure" run examples/tasks.jsonl --platform demo --option delay=0.1 \
    --db quickstart.db --out results.jsonl || code=$?
case $code in
0 | 3) ;; # all done, or all but some tasks that failed
*) exit "$code" ;;
esac
echo
echo "\`. ${bin#"$root/"}/activate\` puts perdure on your PATH. Then try that query, the others in"
echo "examples/queries.sql, or \`perdure list --db quickstart.db\`."
exit "$code"
