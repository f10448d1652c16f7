"""Write docs/config.md from config/schema.json, the single list of a config's keys.

python docs/make_config_md.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Configuration

A training config is a JSON file, given by `-c`. This page is generated from `config/schema.json` by
`python docs/make_config_md.py`; each key's type, default and meaning stand there and nowhere else.

- Unknown keys and wrong types are refused, with the nearest known key named.
- `--set autoencoder_train.lr=8e-5` wins over the file, the file over the default.
- `"@name"` (also written `"$@name"`) stands for the value of another key, `"@section::key"` for a nested one.
  No other expression is read: a config is data.
- What was used, with all defaults, is written to `model_dir/config_autoencoder.json` and
  `config_diffusion.json`, and into the checkpoints.

The environment file, given by `-e`, says where things are: `data_base_dir` (a folder, a JSON list, or several
of these),
`model_dir`, `tfevent_path`, `output_dir`; and may say `resume_ckpt` (false: each run starts over, as by
`--fresh`; true or absent: it goes on from the newest checkpoint),
`download_brats` (fetch MSD Task01 first), `perceptual_weights` (a local file) and `cache_dir` (default
`model_dir`/cache). Relative paths count from the working directory.
"""


def rows(section: dict, schema: dict, prefix: str = "") -> list[str]:
    """Table rows of a section's own keys."""
    lines = []
    for key, about in section["properties"].items():
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
        stage = key in ("autoencoder_train", "diffusion_train", "NoiseScheduler")
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
