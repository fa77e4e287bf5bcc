#!/usr/bin/env bash
# The test command: installs what is missing (into .venv where no environment is active), then ruff and pytest.
# Arguments go to pytest: ./test.sh -k resume
# ./test.sh --gpu runs what needs a GPU, and nothing else; all other tests do not see one.
# The long part of the faults (kills, full disks, damage), half an hour, is: python -m tests.faults
# Files of tests are shared among processes, one a core and 8 at the most; TEST_PROCESSES says how many, 0 is this one.
set -euo pipefail
export PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$(dirname "$0")"

versions=()
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    versions=(-c constraints.txt) # an environment of the user's keeps its own
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
installer=(python -m pip)
python -c 'import pip' 2>/dev/null || installer=(uv pip) # an environment that uv made has no pip
"${installer[@]}" install --quiet -r requirements.txt ${versions[@]+"${versions[@]}"}
ruff check .
ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the networks of tests are small: threads would only wait for each other
if [[ "${1:-}" == --gpu ]]; then
    shift
    # the slow ones fill the whole memory, so nothing runs beside them
    status=0
    # most of the time goes into compiling, for many tests of one file
    python -m pytest --numprocesses "${TEST_PROCESSES:-auto}" --maxprocesses 8 --dist worksteal -m "not slow" \
        tests/gpu "$@" || (($? == 5)) || status=1 # 5: none was chosen
    python -m pytest --numprocesses 0 -m slow tests/gpu "$@" || (($? == 5)) || status=1
    exit "$status"
else
    export CUDA_VISIBLE_DEVICES="" # tests assert a CPU's numbers
fi
exec python -m pytest --numprocesses "${TEST_PROCESSES:-auto}" --maxprocesses 8 \
    --dist loadfile --no-loadscope-reorder "$@"
