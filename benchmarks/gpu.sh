#!/usr/bin/env bash
# Measures everything that needs a GPU: the tests marked gpu, speed and memory next to the reference recipe with
# the networks of the 32 GB config, predicted and measured memory, decoding to 512^3 within 12 GB, and a training
# with evaluation on brains at 2 mm (DATA_DIR: OpenNeuro ds002748, skull-stripped). Meant to take under ten minutes.
#
#   benchmarks/gpu.sh DATA_DIR OUT_DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:?give the folder of the T1 brains} out=${2:?give a new folder for results}
mkdir -p "$out"

python -m pytest -q -m gpu
python -m benchmarks.benchmark --rounds 3 --device cuda --out "$out/benchmark.json" | tee "$out/benchmark.md"
python -m benchmarks.memory | tee "$out/memory.md"  # predicted and torch.cuda.max_memory_allocated
python -m benchmarks.decoding --size 512 --max-memory 12 --amp | tee "$out/decoding.md"
python - "$data" "$out" <<'PYTHON'
import json, sys
data, out = sys.argv[1:]
places = {"data_base_dir": data, "model_dir": f"{out}/models", "tfevent_path": f"{out}/tensorboard", "output_dir": out}
open(f"{out}/environment.json", "w").write(json.dumps(places))
PYTHON
common=(-c config/config_t1_2mm.json -e "$out/environment.json" --device cuda --set data.num_workers=4)
python train_autoencoder.py "${common[@]}" --set autoencoder_train.max_minutes=1
python train_diffusion.py "${common[@]}" --set diffusion_train.max_minutes=2 --set diffusion_train.batch_size=8
python inference.py "${common[@]}" --num 8 --batch-size 8
time python evaluate.py "${common[@]}"
