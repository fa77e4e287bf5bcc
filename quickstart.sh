#!/usr/bin/env bash
# ./quickstart.sh [--compare | --long | --data DIR] [--from-scratch] [flags of run_experiment.sh]
#
# From nothing to generated images on any machine with Python 3.10 or later: makes .venv, installs, then runs the preset
# quickstart of run_experiment.sh, a line for each stage. No network but PyPI. The same command goes on where it stopped.
#
#   --compare       then the same without alignment, and both in one table: what Send-VAE changes
#   --long          more of everything: the preset quickstart_long
#   --data DIR      the same on your photographs (a folder of class folders) instead of the toy shapes
#   --from-scratch  train the tiny VAE too, instead of starting from the one in pretrained/tiny_vae
#   --dry-run       build every stage, train nothing
set -euo pipefail
export PIP_DISABLE_PIP_VERSION_CHECK=1
from=$PWD
cd "$(dirname "$0")"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
    echo "quickstart.sh: error: $1" >&2
    exit 2
}

preset=quickstart
scratch=false
compare=false
flags=()
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --long) preset=quickstart_long ;;
        --from-scratch) scratch=true ;;
        --compare) compare=true ;;
        --data)
            [[ -n "${2:-}" ]] || fail "--data needs a folder of photographs"
            [[ "$2" == /* ]] && folder=$2 || folder=$from/$2
            [[ -d "$folder" ]] || fail "--data $2: there is no such folder"
            preset=quickstart_photographs
            # named after the folder: another folder is another experiment
            flags+=(--images "$folder" --name "quickstart-$(basename "$(realpath "$folder")")")
            shift
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done

$scratch && [[ $preset != quickstart ]] && fail "--from-scratch goes with the toy shapes, without --long and --data"
$compare && { $scratch || [[ $preset != quickstart ]]; } && fail "--compare goes without --from-scratch, --long and --data"
$compare && [[ " ${flags[*]-} " == *" --name"[\ =]* ]] && fail "--compare goes without --name: it names both experiments"

versions=()
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    versions=(-c constraints.txt)
    if [[ ! -x .venv/bin/python ]]; then
        command -v python3 >/dev/null || fail "python3 is not installed; Python 3.10 or later is needed"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "Python 3.10 or later is needed, python3 is $(python3 --version)"
        echo "making .venv"
        python3 -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
if ! python -c 'import accelerate, diffusers, lpips, safetensors, timm, torch, torchvision, yaml' 2>/dev/null; then
    echo "installing the packages of requirements.txt (PyTorch is large; a few minutes)"
    installer=(python -m pip)
    python -c 'import pip' 2>/dev/null || installer=(uv pip) # an environment that uv made has no pip
    "${installer[@]}" install --quiet -r requirements.txt ${versions[@]+"${versions[@]}"}
fi

if $scratch; then
    ./run_experiment.sh tiny_vae --brief ${flags[@]+"${flags[@]}"}
    flags+=(--start '{exps}/tiny_vae/vae' --name quickstart-from-scratch)
fi
./run_experiment.sh "$preset" --brief ${flags[@]+"${flags[@]}"}
if $compare; then
    echo
    echo "The same without alignment:"
    ./run_experiment.sh quickstart_plain --brief ${flags[@]+"${flags[@]}"}
fi

cat <<'END'

Next, with ImageNet (README.md, "ImageNet 256: the paper's run"):
  ./run_experiment.sh sendvae_imagenet256 --dry-run     what would be run; every stage built at its real size
  ./run_experiment.sh sendvae_imagenet256 --images /data/imagenet/train --vae-ckpt pretrained/vavae
END
