#!/usr/bin/env bash
# Both stages on one machine, then an image:  launchers/train_LDM.sh CONFIG ENV GPUS
#
#   launchers/train_LDM.sh
#   launchers/train_LDM.sh config/config_train_multigpu.json config/environment.json 4
#
# Paths are relative to the project's folder. The variable PYTHON names another Python than .venv's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=${1:-config/config_train_32g.json}
environment=${2:-config/environment.json}
gpus=${3:-1}
python=${PYTHON:-.venv/bin/python}

train=("$python")
if [ "$gpus" -gt 1 ]; then
    train+=(-m torch.distributed.run --standalone --nproc_per_node="$gpus")
fi
"${train[@]}" train_autoencoder.py -c "$config" -e "$environment" -g "$gpus"
"${train[@]}" train_diffusion.py -c "$config" -e "$environment" -g "$gpus"
"$python" inference.py -c "$config" -e "$environment"
