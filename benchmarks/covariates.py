"""Do samples have the age that they are asked for? Simulated brains, whose ventricles widen with age.

    python -m benchmarks.covariates --out DIR [--spacing 4] [--minutes 2 6] [--num 24] [--guidance 1 2 4]

Simulates 96 healthy brains with `age` and `sex` in participants.tsv. Trains both stages of the demo's config
on T1w, with both as covariates. Samples ages drawn from 20 to 80 with each guidance, and compares the size of
the ventricles (dark and deep) with the age that was asked for: correlation and slope, beside those of the
scans. Also draws a grid of four seeds at five ages. `--into` chooses how covariates enter the network.
"""

import json

import evaluate
import inference
from benchmarks import simulated
from ldm.models.embedding import encoded_size

COVARIATES = {"age": "number", "sex": ["f", "m"]}
VENTRICLES = "ventricles=0:0.35:24"


def main() -> None:
    parser = simulated.parser(__doc__, 24, "each guidance")
    parser.add_argument("--into", nargs="+", default=["embedding", "mean_latent"])
    args = parser.parse_args()

    # Step 1: data, config, training
    config = simulated.demo_config(args.spacing) | {"channel": 1}
    follows = "mean_latent" in args.into
    config["conditions"] = {"covariates": COVARIATES, "into": args.into, "mean_latent": follows}
    size = encoded_size(COVARIATES, True)
    added = config["latent_channels"] * follows + size * ("channels" in args.into)
    config["diffusion_def"]["in_channels"] = config["latent_channels"] + added
    if "cross_attention" in args.into:
        config["diffusion_def"] |= {"with_conditioning": True, "cross_attention_dim": size}
    simulated.train(args, config, ["--tumour-fraction", "0"])

    # Step 2: samples of each guidance, measured
    rows = []
    for guidance in args.guidance:
        files = simulated.samples_in(args.out, f"samples_{guidance:g}")
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

    # Step 3: four seeds, five ages
    files = simulated.samples_in(args.out, "grid")
    inference.main(
        [*files, "--num", "4", "--grid", "age=20,35,50,65,80", "--condition", "sex=f", "--batch-size", "5"]
    )


if __name__ == "__main__":
    main()
