#!/usr/bin/env bash
# Stage 1 with the paper's settings (ImageNet 256, VA-VAE, DINOv2-B, 80 epochs, batch 1024).
# Edit the flags here, set the variables, or append flags: ./train_sendvae.sh --batch-size 256 --exp-name mine
# The mapper is the default, --mapper-depth 1 with --noise-injection; another --align-loss has flags of its own.
# Processes and nodes: see launch.sh. The same command resumes.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh train_sendvae.py \
    --output-dir "${OUTPUT_DIR:-exps}" \
    --exp-name "${EXP_NAME:-sendvae-f16d32-dinov2-vit-b}" \
    --data-dir "${DATA_DIR:-data/imagenet256}" \
    --vae "${VAE:-f16d32}" \
    --vae-ckpt "${VAE_CKPT:-pretrained/vavae}" \
    --enc-type "${ENC_TYPE:-dinov2-vit-b}" \
    --align-coeff 1.0 \
    --path-type linear \
    --loss-cfg-path configs/l1_lpips_kl_gan.yaml \
    --batch-size 1024 \
    --micro-batch-size auto \
    --epochs 80 \
    --vae-learning-rate 3e-4 \
    --disc-learning-rate 1e-4 \
    --num-workers "${NUM_WORKERS:-4}" \
    --report-to "${REPORT_TO:-none}" \
    "$@"
