"""Write docs/config.md from config/schema.json, the single list of a config's keys.

python docs/make_config_md.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Configuration

A training config is a JSON file, given by `-c`. This page is generated from `config/schema.json` by
`python docs/make_config_md.py`.

- Unknown keys and wrong types are refused; the error names the nearest known key.
- `--set autoencoder_train.lr=8e-5` overrides the file, the file overrides the default.
- `"@name"` (or `"$@name"`) is replaced by the value of another key, `"@section::key"` by that of a nested
  one. Other expressions are refused.
- The resolved config, with all defaults, is written to `model_dir/config_autoencoder.json`,
  `config_diffusion.json` and `config_controlnet.json`, and into the checkpoints.

The environment file, given by `-e`, sets paths, relative to the working directory or absolute.

| key | meaning |
|---|---|
| `data_base_dir` | a folder, a JSON list, or several of these ([data.md](data.md#where-the-data-are)) |
| `json_data_list` | a JSON list of its files, or one for each folder ([data.md](data.md#json-list)) |
| `model_dir` | checkpoints and logs |
| `tfevent_path` | TensorBoard files |
| `output_dir` | samples |
| `cache_dir` | preprocessed volumes and latents; default `model_dir`/cache |
| `perceptual_weights` | weights of the perceptual network, a local file |
| `resume_ckpt` | true (default): resume from the newest checkpoint; false: start over, as by `--fresh` |
| `download_brats` | true: download MSD Task01 first |
"""


def rows(section: dict, schema: dict, prefix: str = "") -> list[str]:
    """Table rows of a section's own keys."""
    lines = []
    for key, about in section["properties"].items():
        if about.get("$ref", "").startswith("#/properties/"):
            continue  # listed where it is defined
        about = schema["$defs"][about["$ref"].rpartition("/")[2]] if "$ref" in about else about
        kinds = about.get("type") or [option["type"] for option in about.get("oneOf", [])]
        kinds = ", ".join([kinds] if isinstance(kinds, str) else kinds).replace("null", "`null`")
        default = f"`{json.dumps(about['default'])}`" if "default" in about else "none"
        lines.append(f"| `{prefix}{key}` | {kinds} | {default} | {about.get('description', '')} |")
        if about.get("type") == "object" and prefix.count(".") < 2 and not key.endswith("_def"):
            lines += rows({"properties": about.get("properties", {})}, schema, f"{prefix}{key}.")
    return lines


def page(schema: dict) -> str:
    """The whole page."""
    tables = {"General": {}}
    for key, about in schema["properties"].items():
        stage = key in ("autoencoder_train", "diffusion_train", "controlnet_train", "NoiseScheduler")
        tables.setdefault(f"`{key}`" if stage else "General", {})
        if not stage:
            tables["General"][key] = about
    text = HEAD
    for title, keys in tables.items():
        name = title.strip("`")
        section = {"properties": keys} if title == "General" else schema["properties"][name]
        about = "" if title == "General" else f"\n{section['description']}\n"
        text += f"\n## {title}\n{about}\n| key | type | default | meaning |\n|---|---|---|---|\n"
        text += "\n".join(rows(section, schema)) + "\n"
    return text


if __name__ == "__main__":
    schema = json.loads((ROOT / "config/schema.json").read_text(encoding="utf-8"))
    (ROOT / "docs/config.md").write_text(page(schema), encoding="utf-8")
