#!/usr/bin/env bash
# Sets up and runs the tests, with ruff and pyright first. Arguments go to pytest: bash launch/test.sh -k evaluate, or -m slow for the long ones
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
source launch/setup.sh
setup dev
export PATH="$project/.venv/bin:$PATH"
ruff check .
ruff format --check .
pyright
exec pytest "$@"
