#!/usr/bin/env bash
# ./report.sh [RUN …] [flags]: what was measured next to what was published, and report.html. All runs of exps/ without a
# RUN; see report.py --help. One process, no GPU.
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
(($#)) || set -- 'exps/*'
exec "$PYTHON" report.py "$@"
