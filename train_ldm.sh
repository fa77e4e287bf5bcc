#!/usr/bin/env bash
# Stage 3 with the paper's settings (ImageNet 256, SiT-XL/1 on f16d32 latents, REPA with DINOv2-B, 80 epochs, batch 256).
# Edit the flags here, set the variables, or append flags: ./train_ldm.sh --epochs 800 --exp-name mine
# REPA's own are the defaults, --proj-coeff 0.5 and --encoder-depth 8; another --align has flags of its own.
# Processes and nodes: see launch.sh. The same command resumes.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh train_ldm.py \
    --output-dir "${OUTPUT_DIR:-exps}" \
    --exp-name "${EXP_NAME:-ldm-sendvae-f16d32}" \
    --data-dir "${DATA_DIR:-data/imagenet256}" \
    --vae-latents-name "${LATENTS:-sendvae-f16d32-dinov2-vit-b}" \
    --model "${MODEL:-SiT-XL/1}" \
    --enc-type "${ENC_TYPE:-dinov2-vit-b}" \
    --path-type linear \
    --weighting uniform \
    --cfg-prob 0.1 \
    --batch-size 256 \
    --micro-batch-size auto \
    --epochs 80 \
    --learning-rate 1e-4 \
    --ema-decay 0.9999 \
    --num-workers "${NUM_WORKERS:-4}" \
    --report-to "${REPORT_TO:-none}" \
    "$@"
