#!/usr/bin/env bash
# Every figure that needs a GPU, in under ten minutes: the tests marked gpu, memory and speed of the 16 GB config's
# networks, and brains at 2 mm (OpenNeuro ds002748, skull-stripped, in the folder given).
#
#   benchmarks/gpu.sh DATA_DIR OUT_DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:?name the folder of the T1 brains} out=${2:?name a new folder for results}
mkdir -p "$out"

python -m pytest -q -m gpu
python benchmarks/memory.py | tee "$out/memory.md"  # predicted beside torch.cuda.max_memory_allocated
python - "$data" "$out" <<'PYTHON'
import json, sys
data, out = sys.argv[1:]
places = {"data_base_dir": data, "model_dir": f"{out}/models", "tfevent_path": f"{out}/tensorboard", "output_dir": out}
open(f"{out}/environment.json", "w").write(json.dumps(places))
PYTHON
common=(-c config/config_t1_2mm.json -e "$out/environment.json" --device cuda --set data.num_workers=4)
python train_autoencoder.py "${common[@]}" --set autoencoder_train.max_minutes=3
python train_diffusion.py "${common[@]}" --set diffusion_train.max_minutes=4 --set diffusion_train.batch_size=8
python inference.py "${common[@]}" --num 8 --batch-size 8
