# Sourced by the scripts beside it. `set_up EXTRA` makes .venv in the repository root, once, and installs the project
# there with that extra, from the exact versions in constraints.txt. Then "$python" is .venv's Python.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
venv=$root/.venv
python=$venv/bin/python
log=$venv/setup.log

# Some of the pinned packages (transformers 5.23 among them) need 3.11, though qfuse itself runs on 3.10.
minimum=3.11

# fail SENTENCE: say what the user should do, and give up.
fail() {
    echo "qfuse: $1" >&2
    exit 1
}

# is_new_enough PYTHON: does it run at all, and is it new enough?
is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info < (${minimum/./, }))" >/dev/null 2>&1
}

# system_python: print the name of a Python that is new enough, the user's default first.
system_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if is_new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    fail "there is no Python $minimum or newer here: install one, put it on PATH as python3, and run this again."
}

# need_compiler: Inductor compiles C++ with $CXX, or else g++, and does not quote the path of torch in .venv.
need_compiler() {
    case $root in
    *[[:space:]]*) fail "torch.compile does not work from a path with spaces: move $root to one without." ;;
    esac
    if [ -n "${CXX:-}" ]; then
        command -v "${CXX%% *}" >/dev/null || fail "CXX is set to '$CXX', which is not there: install it or unset CXX."
    elif ! command -v g++ >/dev/null; then
        command -v clang++ >/dev/null ||
            fail "there is no C++ compiler, which torch.compile needs: install g++ (or clang++) and run this again."
        export CXX=clang++
    fi
}

# need_headers: the C++ that Inductor writes includes Python.h.
need_headers() {
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "the C headers of Python are missing, which torch.compile needs: install them (python3-dev or python3-devel) and run this again."
}

# fingerprint: print a hash of everything that decides what is installed in .venv.
fingerprint() {
    "$python" -c 'import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(repr([*parts, sys.version, str(root)]).encode()).hexdigest())' "$root"
}

# pip_install WHAT ARGUMENTS...: install, with pip's many lines in the log.
pip_install() {
    local what=$1
    shift
    echo "installing $what (the first time this takes minutes)"
    "$python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" "$@" >>"$log" 2>&1 ||
        fail "pip could not install $what: check the network connection and pip's settings, see $log for the cause, and run this again."
}

# set_up EXTRA: see above. What is needed beyond pip's packages depends on what the scripts do with them.
set_up() {
    local extra=$1
    local stamp=$venv/setup-$extra.stamp
    if [ "$extra" != dev ]; then
        need_compiler
    fi
    if is_new_enough "$python" && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
        return
    fi

    if ! { is_new_enough "$python" && "$python" -m pip --version >/dev/null 2>&1; }; then
        local base
        base=$(system_python) || exit 1
        echo "making .venv with $("$base" --version)"
        "$base" -m venv --clear "$venv" >/dev/null 2>&1 ||
            fail "'$base -m venv .venv' failed: install Python's venv module (the package python3-venv on Debian and Ubuntu), see that $root is writable, and run this again."
    fi
    if [ "$extra" != dev ]; then
        need_headers
    fi
    rm -f "$stamp"
    : >"$log"
    # torch first, and by its exact version: pip would otherwise weigh, and download, other builds of it.
    # Then the project, built with the setuptools of .venv, so that its version is pinned too.
    local torch
    torch=$(grep '^torch==' "$root/constraints.txt")
    pip_install "$torch" "$torch" setuptools
    pip_install "qfuse[$extra]" --no-build-isolation -e "${root}[$extra]"
    fingerprint >"$stamp"
    echo "set-up done"
}
