#!/usr/bin/env bash
# ./launch.sh SCRIPT.py [flags]: start a script on what there is.
#
#   one process                       exec python
#   several GPUs, one or more nodes   accelerate launch --multi_gpu
#   several processes on a CPU        torchrun (accelerate launch --cpu would start one)
#
# From the environment: NUM_PROCESSES (over all nodes; default: all visible GPUs, or 1), NUM_MACHINES (1),
# MACHINE_RANK (0), MAIN_PROCESS_IP (of the node with rank 0), MAIN_PROCESS_PORT (29500), PYTHON.
set -euo pipefail
script=$1
shift

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
# SIGUSR1 reaches the workers through the launcher too; they save and stop
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
# and has this many seconds for them, where 30 are its default: a checkpoint of 11 GB takes longer. A torch that does not
# know the variable waits 30 s all the same; there, signal the workers themselves, as slurm.sbatch does.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

machines=${NUM_MACHINES:-1}
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-/,$d' | grep -c '[^ ]' || true)
    gpus=$((visible < gpus ? visible : gpus))
fi
processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus * machines : machines))}

if ((processes == 1)); then
    exec "$PYTHON" "$script" "$@"
elif ((gpus > 0)); then
    port=(--main_process_port "${MAIN_PROCESS_PORT:-$((machines > 1 ? 29500 : 0))}")
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines "$machines" \
        --machine_rank "${MACHINE_RANK:-0}" --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}" "${port[@]}" \
        --mixed_precision no --dynamo_backend no "$script" "$@" # the script chooses its own precision
elif ((machines > 1)); then
    exec "$PYTHON" -m torch.distributed.run --nnodes "$machines" --node_rank "${MACHINE_RANK:-0}" \
        --nproc_per_node "$((processes / machines))" --master_addr "${MAIN_PROCESS_IP:?}" \
        --master_port "${MAIN_PROCESS_PORT:-29500}" "$script" "$@"
else
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$script" "$@"
fi
