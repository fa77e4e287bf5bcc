#!/usr/bin/env bash
# ./run_experiment.sh PRESET [--dry-run] [flags]: all stages of an experiment, in order; see --help and
# configs/experiments. The same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m runtime.experiment "$@"
