#!/usr/bin/env bash
# Stage 5: generated images against ADM's reference of ImageNet 256 (FID, sFID, IS, Precision, Recall, KID), with
# ./evaluate.sh fdr against the released statistics of six networks (FDr6), or with ./evaluate.sh reconstruction a VAE's
# reconstructions (rFID, PSNR, SSIM, LPIPS). Edit the flags here, set the variables, or append flags. Processes and
# nodes: see launch.sh. The reference's features are kept next to it.
set -euo pipefail
cd "$(dirname "$0")"

what=generation
if (($#)) && [[ $1 != -* ]]; then
    what=$1
    shift
fi
if [[ $what == reconstruction ]]; then
    flags=(--vae "${VAE:-${EXP_PATH:-exps/sendvae-f16d32-dinov2-vit-b}/vae}" --data "${DATA_DIR:-data/imagenet256-val}")
elif [[ $what == fdr ]]; then
    flags=(--samples "${SAMPLES:-exps/ldm-sendvae-f16d32}" --ref "${REF:-data/fid_stats}")
else
    flags=(--samples "${SAMPLES:-exps/ldm-sendvae-f16d32}" --ref "${REF:-data/VIRTUAL_imagenet256_labeled.npz}")
fi

exec ./launch.sh evaluate.py "$what" "${flags[@]}" \
    --batch-size "${BATCH_SIZE:-64}" \
    "$@"
