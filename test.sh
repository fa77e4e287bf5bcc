#!/usr/bin/env bash
# The test command: installs what is missing (into .venv where no environment is active), then ruff and pytest.
# Arguments go to pytest: ./test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "test.sh: Python 3.10 or later is needed, python3 is $(python3 --version)" >&2
            exit 2
        }
        python3 -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
ruff check .
ruff format --check .
exec python -m pytest "$@"
