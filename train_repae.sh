#!/usr/bin/env bash
# REPA-E with its published settings (ImageNet 256, SD-VAE, SiT-XL/2, DINOv2-B, 80 epochs, batch 256).
# Edit the flags here, set the variables, or append flags: ./train_repae.sh --vae f16d32 --model SiT-XL/1 --exp-name mine
# Processes and nodes: see launch.sh. The same command resumes.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh train_repae.py \
    --output-dir "${OUTPUT_DIR:-exps}" \
    --exp-name "${EXP_NAME:-repae-f8d4-dinov2-vit-b}" \
    --data-dir "${DATA_DIR:-data/imagenet256}" \
    --vae "${VAE:-f8d4}" \
    --vae-ckpt "${VAE_CKPT:-pretrained/sdvae}" \
    --model "${MODEL:-SiT-XL/2}" \
    --enc-type "${ENC_TYPE:-dinov2-vit-b}" \
    --encoder-depth 8 \
    --proj-coeff 0.5 \
    --vae-align-proj-coeff 1.5 \
    --bn-momentum 0.1 \
    --path-type linear \
    --weighting uniform \
    --cfg-prob 0.1 \
    --loss-cfg-path configs/l1_lpips_kl_gan.yaml \
    --batch-size 256 \
    --micro-batch-size auto \
    --epochs 80 \
    --learning-rate 1e-4 \
    --vae-learning-rate 1e-4 \
    --disc-learning-rate 1e-4 \
    --ema-decay 0.9999 \
    --num-workers "${NUM_WORKERS:-4}" \
    --report-to "${REPORT_TO:-none}" \
    "$@"
