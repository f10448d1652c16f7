"""Do samples have the age that they are asked for? Simulated brains, whose ventricles widen with age.

    python -m benchmarks.covariates --out DIR [--spacing 4] [--minutes 2 6] [--num 24] [--guidance 1 2 4]

Simulates 96 healthy brains with `age` and `sex` in participants.tsv. Trains both stages of the demo's config
on T1w, with both as covariates. Samples ages drawn from 20 to 80 with each guidance, and compares the size of
the ventricles (dark and deep) with the age that was asked for: correlation and slope, beside those of the
scans. Also draws a grid of four seeds at five ages. `--into` chooses how covariates enter the network.
"""

import argparse
import json
from pathlib import Path

import evaluate
import inference
import simulate_brains
import train_autoencoder
import train_diffusion
from ldm.models.embedding import encoded_size

ROOT = Path(__file__).resolve().parents[1]
COVARIATES = {"age": "number", "sex": ["f", "m"]}
VENTRICLES = "ventricles=0:0.35:24"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=2, default=[2, 6], help="of both stages")
    parser.add_argument("--spacing", type=float, default=4, help="mm of the volumes")
    parser.add_argument("--num", type=int, default=24, help="samples of each guidance")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--into", nargs="+", default=["embedding"])
    args = parser.parse_args()

    # Step 1: data, config, training
    data = args.out / "data"
    if not data.exists():
        simulate_brains.main(["--out", str(data), "--spacing", str(args.spacing), "--tumour-fraction", "0"])
    config = json.loads((ROOT / "config/config_demo.json").read_text())
    config |= {"channel": 1, "longest_side": round(192 / args.spacing)}
    config["conditions"] = {"covariates": COVARIATES, "into": args.into}
    size = encoded_size(COVARIATES, True)
    if "channels" in args.into:
        config["diffusion_def"]["in_channels"] = config["latent_channels"] + size
    if "cross_attention" in args.into:
        config["diffusion_def"] |= {"with_conditioning": True, "cross_attention_dim": size}
    environment = {"data_base_dir": str(data), "model_dir": str(args.out / "models")}
    environment |= {"tfevent_path": str(args.out / "tensorboard"), "output_dir": str(args.out / "samples")}
    for name, content in (("config", config), ("environment", environment)):
        (args.out / f"{name}.json").write_text(json.dumps(content))
    files = ["-c", str(args.out / "config.json"), "-e", str(args.out / "environment.json")]
    scripts = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}
    for (stage, script), minutes in zip(scripts.items(), args.minutes, strict=True):
        script.main([*files, "--set", f"{stage}_train.max_minutes={minutes}"])

    # Step 2: samples of each guidance, measured
    rows = []
    for guidance in args.guidance:
        environment["output_dir"] = str(args.out / f"samples_{guidance:g}")
        (args.out / "environment.json").write_text(json.dumps(environment))
        asked = ["--condition", "age=20:80", "--guidance", str(guidance), "--batch-size", "4", "--amp"]
        inference.main([*files, "--num", str(args.num), *asked])
        evaluate.main([*files, "--structure", VENTRICLES])
        content = json.loads((args.out / f"samples_{guidance:g}/evaluation/metrics.json").read_text())
        found = {one["key"]: one for one in content["figures"]}
        rows.append(
            (guidance, *(found[key] for key in ("correlation_ventricles_age", "slope_ventricles_age")))
        )
    for guidance, *both in rows:
        texts = [f"{one['value']:.3f} {one['interval']}, scans {one['floor']:.3f}" for one in both]
        print(f"guidance {guidance:g}: correlation {texts[0]}; slope {texts[1]} ml a year")

    # Step 3: one seed, five ages
    environment["output_dir"] = str(args.out / "grid")
    (args.out / "environment.json").write_text(json.dumps(environment))
    inference.main(
        [*files, "--num", "4", "--grid", "age=20,35,50,65,80", "--condition", "sex=f", "--batch-size", "5"]
    )


if __name__ == "__main__":
    main()
