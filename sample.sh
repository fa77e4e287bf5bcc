#!/usr/bin/env bash
# Stage 4: 50,000 images with the published settings (SDE, 250 steps, guidance 2.5 on [0, 0.75]), one .npz at the end.
# Without guidance: ./sample.sh --cfg-scale 1. Balanced labels: ./sample.sh --label-sampling equal. As REPA-E rounds:
# --rounding truncate. A flow map: --mode map --num-steps 4 --cfg-scale 1. Edit the flags here, set the variables, or append flags.
# Processes and nodes: see launch.sh. The same command continues at the missing shards.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh generate.py \
    --exp-path "${EXP_PATH:-exps/ldm-sendvae-f16d32}" \
    --num-fid-samples "${NUM_FID_SAMPLES:-50000}" \
    --pproc-batch-size "${PPROC_BATCH_SIZE:-64}" \
    --mode sde \
    --num-steps 250 \
    --cfg-scale "${CFG_SCALE:-2.5}" \
    --guidance-low 0 \
    --guidance-high 0.75 \
    --label-sampling "${LABEL_SAMPLING:-random}" \
    --seed "${SEED:-0}" \
    --mixed-precision no \
    --allow-tf32 \
    "$@"
