#!/usr/bin/env bash
# Stage 2: encode the dataset once, in float16. About 42 GB for ImageNet 256 with f16d32.
# Edit the flags here, set the variables, or append flags: ./cache_latent.sh --hflip --mixed-precision bf16
# Processes and nodes: see launch.sh. The same command continues at the missing shards.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh cache_latents.py \
    --data-dir "${DATA_DIR:-data/imagenet256}" \
    --vae "${VAE:-${EXP_PATH:-exps/sendvae-f16d32-dinov2-vit-b}/vae}" \
    --vae-latents-name "${LATENTS:-sendvae-f16d32-dinov2-vit-b}" \
    --dtype "${DTYPE:-float16}" \
    --pproc-batch-size "${PPROC_BATCH_SIZE:-64}" \
    --num-workers "${NUM_WORKERS:-4}" \
    "$@"
