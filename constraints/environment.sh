# POSIX sh, read with `.` by examples/quickstart.sh and tests/run.sh, which set `root` first.
#
# `environment run` and `environment test` make sure that there is a virtual environment with perdure
# (editable) and what running or testing it needs, at the versions of constraints/pinned.txt, and set
# `bin` to where its programs are. A second call with nothing changed takes no time.
#
# PYTHON        the interpreter to make it with; otherwise the first one found that is new enough
# PERDURE_VENV  where it is; .venv in the repository if not set
# PERDURE_ENV   an environment in which perdure is installed already: it is used as it is

die() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "$PYTHON is no Python of version 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python of version 3.11 or newer on PATH (python3 is $(python3 -V 2>&1 | head -n 1)); \
install one, or name it: PYTHON=/path/to/python3.12 sh $0"
}

environment() {
    if [ -n "${PERDURE_ENV:-}" ]; then
        bin=$PERDURE_ENV/bin
        [ -x "$bin/python" ] || die "PERDURE_ENV is no virtual environment: there is no $bin/python"
        return
    fi
    venv=${PERDURE_VENV:-$root/.venv}
    bin=$venv/bin
    if [ ! -e "$venv" ]; then
        python=$(find_python) || exit 1
        printf 'Making a virtual environment in %s ...\n' "$venv" >&2
        if ! problem=$("$python" -m venv "$venv" 2>&1); then
            rm -rf "$venv"
            printf '%s\n' "$problem" >&2
            die "\`$python -m venv\` failed; on Debian and Ubuntu \`apt install python3-venv\` helps"
        fi
    fi
    new_enough "$bin/python" ||
        die "$venv has no Python of version 3.11 or newer; remove it and run this again"
    "$bin/python" -m pip --version >/dev/null 2>&1 ||
        die "$venv has no working pip; remove it and run this again"
    state=$(cd "$root" && { pwd; cat pyproject.toml constraints/pinned.txt; } | cksum)
    case $1 in
    run) # what the tests need is enough for running, too
        enough="run test"
        set -- run --editable "$root"
        ;;
    test)
        enough=test
        set -- test --editable "$root[all]" --group "$root/pyproject.toml:test"
        ;;
    esac
    for purpose in $enough; do
        if [ "$(cat "$venv/.perdure-$purpose" 2>/dev/null)" = "$state" ]; then
            return
        fi
    done
    stamp=$venv/.perdure-$1
    shift
    printf 'Installing into it, once; this takes about a minute ...\n' >&2
    # The pip that comes with a Python can be too old for dependency groups.
    run_pip pip
    run_pip --build-constraint "$root/constraints/pinned.txt" "$@"
    printf '%s\n' "$state" >"$stamp"
}

run_pip() {
    "$bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint "$root/constraints/pinned.txt" "$@" ||
        die "pip could not install; its own message is above"
}
