#!/usr/bin/env bash
# Every figure that needs a GPU, meant to end in under ten minutes, which has not been tried: the tests marked gpu,
# speed and memory beside the reference recipe with the 32 GB config's networks, predicted and measured memory, a
# decoding to 512^3 within 12 GB, and brains at 2 mm (OpenNeuro ds002748, skull-stripped, in the folder given).
#
#   benchmarks/gpu.sh DATA_DIR OUT_DIR
#
# Quality over time takes as long again, and is a call of its own:
#
#   python -m benchmarks.benchmark --quality 4 --data DATA_DIR --out OUT_DIR/quality.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:?name the folder of the T1 brains} out=${2:?name a new folder for results}
mkdir -p "$out"

python -m pytest -q -m gpu
python -m benchmarks.benchmark --rounds 3 --device cuda --out "$out/benchmark.json" | tee "$out/benchmark.md"
python -m benchmarks.memory | tee "$out/memory.md"  # predicted beside torch.cuda.max_memory_allocated
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
