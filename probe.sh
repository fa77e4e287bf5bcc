#!/usr/bin/env bash
# What a VAE's latents know: ./probe.sh attributes --data data/celeba; then uniformity, classes… (probe.py --help).
# Edit the flags here, set the variables, or append flags. One process: a probe is fitted on one device.
set -euo pipefail
cd "$(dirname "$0")"

what=()
while (($#)) && [[ $1 != -* ]]; do
    what+=("$1")
    shift
done

vae=(--vae "${VAE:-${EXP_PATH:-exps/sendvae-f16d32-dinov2-vit-b}/vae}")
for word in "$@"; do # --vae may be repeated, so that one of yours takes the place of this
    [[ $word == --vae || $word == --vae=* || $word == --vae-arch* ]] && vae=()
done

NUM_PROCESSES=1 exec ./launch.sh probe.py "${what[@]:-all}" \
    "${vae[@]}" \
    --data "${DATA_DIR:-data/imagenet256}" \
    --batch-size "${BATCH_SIZE:-64}" \
    --num-workers "${NUM_WORKERS:-4}" \
    "$@"
