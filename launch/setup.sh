#!/usr/bin/env bash
# Sourced by demo.sh and test.sh:  setup EXTRAS
# Makes .venv beside the project once and installs the project into it with the extras and the DALI build that fits torch.
# A second call finds the stamp of the same pyproject.toml and C sources and returns at once. PYTHON names another interpreter.

what_is_installed() {
    # shellcheck disable=SC2154  # the script that sources this file sets it
    cat "$project/pyproject.toml" "$project"/imagenet_swa/data/native/*.c
    command -v cc gcc clang || true # one that is installed later is used then
}

setup() {
    local extras=$1 python=${PYTHON:-python3} stamp
    # shellcheck disable=SC2154  # the script that sources this file sets it
    stamp="$project/.venv/.installed-$extras"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setup: wanted Python 3.11 or newer, got '$("$python" --version 2>&1)'; set PYTHON to a newer interpreter" >&2
        return 2
    fi
    if [ -f "$stamp" ] && what_is_installed | cmp -s - "$stamp"; then
        return 0
    fi
    echo "setup: installing into $project/.venv (torch's CUDA build is several GB; a few minutes)" >&2
    if [ ! -x "$project/.venv/bin/python" ]; then
        "$python" -m venv "$project/.venv" || return
    fi
    python="$project/.venv/bin/python"
    "$python" -m pip install --quiet --disable-pip-version-check --editable "${project}[$extras]" || return
    # DALI has one wheel per CUDA major version.
    local cuda
    cuda=$("$python" -c 'import torch; print((torch.version.cuda or "13").split(".")[0])') || return
    if ! "$python" -m pip install --quiet --disable-pip-version-check --editable "${project}[dali-cuda$cuda]"; then
        echo "setup: no DALI for this platform; going on with the torchvision loader" >&2
    fi
    if ! "$python" -c 'from imagenet_swa.data.native import library; exit(library() is None)'; then
        echo "setup: the C part could not be built (is there a compiler?), so DALI resizes and restart markers are not used: slower" >&2
    fi
    what_is_installed >"$stamp"
}
