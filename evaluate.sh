#!/usr/bin/env bash
# Stage 5: generated images against ADM's reference of ImageNet 256: FID, sFID, IS, Precision, Recall, KID.
# Other commands of evaluate.py: ./launch.sh evaluate.py COMMAND. Edit the flags here, set the variables, or append flags.
# Processes and nodes: see launch.sh. The reference's features are kept beside it.
set -euo pipefail
cd "$(dirname "$0")"

exec ./launch.sh evaluate.py generation \
    --samples "${SAMPLES:-exps/ldm-sendvae-f16d32}" \
    --ref "${REF:-data/VIRTUAL_imagenet256_labeled.npz}" \
    --batch-size "${BATCH_SIZE:-64}" \
    "$@"
