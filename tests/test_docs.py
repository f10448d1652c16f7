"""What the documentation says exists: scripts, their options, config keys, files, links."""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import simulate_brains
from ldm.data import download

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))
SHELLS = {"bash", "sh", "shell", "console", "bat", "cmd", "batch", "powershell"}
PROGRAMS = {"demo.sh": "launchers/demo.py", "demo.bat": "launchers/demo.py"}  # which hand their arguments on
MADE_BY_USERS = {"config/environment.json"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# ---------------------------------------------------------------- commands


def commands(text: str, windows: bool = False) -> list[list[str]]:
    """The commands of a piece of shell, as lists of words; continued lines joined, comments dropped."""
    text = re.sub(r"\s*[\\^]\n\s*", " ", text)
    text = text.replace("\\", "/") if windows else text
    found = []
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ").removeprefix("> ").removeprefix("rem ")
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "||", ";", "|", "&")), len(words))
            found.append([word for word in words[:end] if not re.fullmatch(r"[A-Z_]+=.*", word)])
            words = words[end + 1 :]
    return [command for command in found if command]


def blocks(page: str) -> list[list[str]]:
    """The commands in the fenced shell blocks of a Markdown page, and those in code marks in its text."""
    fenced = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
    found = []
    for _, language, text in fenced.findall(read(page)):
        if language in SHELLS:
            found += commands(text, windows=language in ("bat", "cmd", "batch", "powershell"))
    in_text = r"`((?:python|torchrun|sbatch|\./|demo\.bat|test\.bat)[^`]*)`"
    for text in re.findall(in_text, fenced.sub("", read(page))):
        found += commands(" ".join(text.split()))
    return found


def manual(script: str) -> list[list[str]]:
    """The commands in a script's docstring: its indented lines that start with a program."""
    docstring = re.match(r'\s*"""(.*?)"""', read(script), re.S)[1].replace("\\\\\n", "\\\n")
    joined = re.sub(r"\s*\\\n\s*", " ", docstring)
    return commands("\n".join(re.findall(r"^    (?:python|torchrun|\./).*$", joined, re.M)))


@functools.cache
def manual_page(script: str, *words: str) -> str:
    """What a script, or a command of it, prints on `--help`."""
    path = ROOT / script
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            module.main([*words, "--help"])
    finally:
        sys.path.remove(str(path.parent))
    return out.getvalue()


def options(script: str, words: list[str]) -> frozenset[str]:
    """The options that `--help` lists, of a script or of the command of it that the words name."""
    listed = re.search(r"^  COMMAND\n((?:    .*\n)*)", page := manual_page(script), re.M)
    if listed and words and words[0] in re.findall(r"^    (\w+)", listed[1], re.M):
        page = manual_page(script, words[0])
    listed = re.findall(r"^  (-.*?)(?:  |$)", page.partition("\noptions:")[2], re.M)
    return frozenset(word for line in listed for word in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", line))


@functools.cache
def config_keys() -> frozenset[str]:
    """All keys of a config, dotted; an open section (a network's arguments) as `section.*`."""
    schema = json.loads(read("config/schema.json"))

    def below(section: dict, prefix: str):
        for key, about in section.get("properties", {}).items():
            while "$ref" in about:
                about = functools.reduce(
                    dict.__getitem__, about["$ref"].removeprefix("#/").split("/"), schema
                )
            yield prefix + key
            yield from below(about, f"{prefix}{key}.")
            if "_target_" in about.get("properties", {}):
                yield f"{prefix}{key}.*"

    return frozenset(below(schema, ""))


def complaints(command: list[str]) -> list[str]:
    """What is wrong with a command of the documentation; nothing of what is not the project's."""
    program, *words = command
    processes = None
    if re.fullmatch(r"(.*/)?(python(\d[\d.]*)?|py|torchrun)(\.exe)?", program):
        if words[:2] == ["-m", "torch.distributed.run"]:
            program, words = "torchrun", words[2:]
        elif "-m" in words[:1] or "-c" in words[:1]:
            return []
        start = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if start is None:
            return []
        before, script, words = words[:start], words[start], words[start + 1 :]
        if program.endswith("torchrun"):
            known = {
                option.replace("-", "_") for a in get_args_parser()._actions for option in a.option_strings
            }
            names = [word.partition("=")[0] for word in before if word.startswith("-")]
            wrong = [f"torchrun has no {name}" for name in names if name.replace("-", "_") not in known]
            if wrong:
                return wrong
            processes = next((w.partition("=")[2] for w in before if w.startswith("--nproc")), None)
    elif program in ("bash", "sh", "sbatch", "call") and words:
        script, words = words[0], words[1:]
    elif program.endswith((".sh", ".bat", ".sbatch")):
        script = program
    else:
        return []
    script = script.removeprefix("./")
    if script.startswith(("/", "$", "%")):
        return []
    if not (ROOT / script).is_file():
        return [f"there is no {script}"]
    script = PROGRAMS.get(script, script)
    return arguments_wrong(script, words, processes) if script.endswith(".py") else []


def arguments_wrong(script: str, words: list[str], processes: str | None) -> list[str]:
    wrong = []
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if not re.fullmatch(r"--?[a-zA-Z][\w-]*", name):
            continue
        value = value or (words[i + 1] if i + 1 < len(words) else "")
        if name not in options(script, words):
            wrong.append(f"{script} has no {name}")
        elif name in ("-c", "--config-file", "-e", "--environment-file"):
            if value.startswith("config/") and value not in MADE_BY_USERS and not (ROOT / value).is_file():
                wrong.append(f"there is no {value}")
        elif name == "--set":
            key = value.partition("=")[0]
            if key not in config_keys() and f"{key.partition('.')[0]}.*" not in config_keys():
                wrong.append(f"the config has no key {key}")
        elif name in ("-g", "--gpus") and value.isdigit() and value != (processes or "1"):
            wrong.append(f"-g {value}, but {processes or 1} process(es)")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page):
    wrong = [f"{shlex.join(command)}: {fault}" for command in blocks(page) for fault in complaints(command)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", [*SCRIPTS, "launchers/demo.py"])
def test_commands_of_a_manual_exist(script):
    found = manual(script)
    assert found, f"{script}: its docstring shows no command"
    wrong = [f"{shlex.join(command)}: {fault}" for command in found for fault in complaints(command)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("python train_autoencoder.py -c config/config_demo.json -e config/environment.json", None),
        ("python train_autoencoder.py --config config/config_demo.json", "has no --config"),
        ("python train_autoencoders.py", "there is no train_autoencoders.py"),
        (".venv/bin/python inference.py --num 8 --sampler ddim", None),
        ("python inference.py --number 8", "has no --number"),
        ("cd .. && python train_diffusion.py --nothing | tee log.txt", "has no --nothing"),
        ("OMP_NUM_THREADS=1 python train_diffusion.py --profil  # a comment", "has no --profil"),
        ("python train_diffusion.py -c config/config_64g.json", "there is no config/config_64g.json"),
        ("python train_diffusion.py --set diffusion_train.lr=1e-4", None),
        ("python train_diffusion.py --set diffusion_train.augment.flip_prob=1", None),
        ("python train_diffusion.py --set diffusion_def.channels=[8]", None),
        ("python train_diffusion.py --set diffusion_train.rate=1e-4", "no key diffusion_train.rate"),
        ("torchrun --standalone --nproc_per_node=8 train_diffusion.py -g 8", None),
        ("torchrun --standalone --nproc-per-node=4 train_diffusion.py -g 8", "-g 8, but 4"),
        ("torchrun --alone --nproc_per_node=8 train_diffusion.py", "torchrun has no --alone"),
        ("python -m torch.distributed.run --nproc_per_node=2 train_diffusion.py --x", "has no --x"),
        ("python train_diffusion.py -g 2", "-g 2, but 1"),
        ("./demo.sh --data DIR --set channel=1", None),
        ("./demo.sh --dataset DIR", "has no --dataset"),
        ("./demonstration.sh", "there is no demonstration.sh"),
        ("sbatch launchers/train_slurm.sbatch train_autoencoder.py", None),
        ("git clone somewhere", None),
        ("python visualize_image.py gif scan.nii.gz --plane axial", None),
        ("python visualize_image.py gif scan.nii.gz --mask labels.nii.gz", "has no --mask"),
    ],
)
def test_the_check_itself(line, fault):
    found = [one for command in commands(line) for one in complaints(command)]
    assert (fault is None and not found) or (fault and any(fault in one for one in found)), found


def test_fences_and_continued_lines_are_read(tmp_path, monkeypatch):
    page = "text\n```bash\npython a.py \\\n    --x 1  # comment\n```\n```\nnot a command\n```\n"
    page += "- item\n  ```bat\n  demo.bat ^\n    --data data\\brains\n  ```\nIn words, `python\nb.py -y`.\n"
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(page)
    expected = [
        ["python", "a.py", "--x", "1"],
        ["demo.bat", "--data", "data/brains"],
        ["python", "b.py", "-y"],
    ]
    assert blocks("page.md") == expected


# ---------------------------------------------------------------- files and links


def links(text: str) -> list[str]:
    """Targets of Markdown's and HTML's links and images, outside of code."""
    text = re.sub(r"^( *)```.*?^\1```|`[^`\n]*`", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.M)
    plain = [
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one)).lower() for one in headings
    ]
    return {one.replace(" ", "-") for one in plain}


def broken_links(page: str) -> list[str]:
    broken = []
    for link in links(read(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        inside = path.exists() and path.resolve().is_relative_to(ROOT)
        if not inside or (anchor and path.suffix == ".md" and anchor not in slugs(path.read_text("utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `b` heading\n")
    page = (
        "[a](other.md) [b](other.md#a-b-heading) [c](other.md#none) ![d](d.png) [e](https://x.y/z) `[f](g)`"
    )
    (tmp_path / "page.md").write_text(page + '\n<img src="h.png">\n')
    assert broken_links("page.md") == ["other.md#none", "d.png", "h.png"]


def named_files(text: str) -> set[str]:
    """Files of the project that a text names in code marks."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._")
    configs = {f"config/{name}" for name in re.findall(r"`(config_(?:train|demo|t1)\w*\.json)`", text)}
    return configs | set(re.findall(rf"`(?:\./)?((?:{folders})/[\w./-]+\.\w+)`", text)) - MADE_BY_USERS


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    missing = [name for name in named_files(read(page)) if not (ROOT / name).exists()]
    assert not [name for name in missing if not name.startswith(("outputs/", "data/"))]


def test_pages_that_the_code_names_exist():
    """Such as docs/TROUBLESHOOTING.md in an error message."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ldm/**/*.py"), *ROOT.glob("launchers/*")]
    named = {page for path in sources for page in re.findall(r"docs/\w+\.md", path.read_text("utf-8"))}
    assert "docs/config.md" in named
    named.discard("docs/README.md")  # of the exported bundle
    assert not [page for page in sorted(named) if not (ROOT / page).is_file()]


# ---------------------------------------------------------------- README's commands, run


SMALL = {  # what a test's CPU needs, beside the commands as they are printed
    "spacing": [8, 8, 8],
    "data.num_workers": 0,
    "data.val_fraction": 0.4,
    **{f"{stage}_train.patch_size": [16, 16, 16] for stage in ("autoencoder", "diffusion")},
    **{f"{stage}_train.max_epochs": 1 for stage in ("autoencoder", "diffusion")},
    # bf16 on a CPU fails on grids so small: docs/NaN_FIX_GUIDE.md
    **{f"{stage}_train.amp": False for stage in ("autoencoder", "diffusion")},
    **{f"{network}_def.channels": [4, 4, 8] for network in ("autoencoder", "diffusion")},
    **{f"{network}_def.num_res_blocks": 1 for network in ("autoencoder", "diffusion")},
    **{f"{network}_def.norm_num_groups": 2 for network in ("autoencoder", "diffusion")},
    "autoencoder_train.discriminator": {"channels": 4, "num_layers_d": 1},
    "diffusion_def.num_head_channels": [0, 4, 8],
}
SETS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
MORE = {  # which option of a command counts is the last one that is given
    "download_brats_data.py": [],
    "check_data.py": SETS,
    "train_autoencoder.py": ["--device", "cpu", *SETS],
    "train_diffusion.py": ["--device", "cpu", *SETS],
    "inference.py": ["--device", "cpu", "--num", "2", "--steps", "1", *SETS],
    "evaluate.py": ["--device", "cpu", *SETS],
}


def test_the_commands_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    """With nothing prepared but the download, which is simulated brains packed as MSD packs BraTS."""
    block = next(
        text for text in re.findall(r"```bash\n(.*?)```", read("README.md"), re.S) if "cp config" in text
    )
    printed = [command for command in commands(block) if command[0] != "source"]
    assert [Path(words[1]).name for words in printed] == ["environment.json.example", *MORE]
    task, monai_knows = "Task01_BrainTumour", download.DecathlonDataset
    simulate_brains.main(
        ["--out", str(tmp_path / "msd" / task), "--num", "5", "--spacing", "8", "--workers", "1"]
    )
    with tarfile.open(tmp_path / "msd.tar", "w") as tar:
        tar.add(tmp_path / "msd" / task, task)
    monkeypatch.setitem(monai_knows.resource, task, (tmp_path / "msd.tar").as_uri())
    monkeypatch.setitem(monai_knows.md5, task, download.file_md5(tmp_path / "msd.tar"))
    here = tmp_path / "here"
    shutil.copytree(ROOT / "config", here / "config", ignore=shutil.ignore_patterns("environment.json"))
    monkeypatch.chdir(here)
    for program, script, *words in printed:
        if program == "cp":
            shutil.copy(script, words[0])
        else:
            importlib.import_module(script.removesuffix(".py")).main([*words, *MORE[script]])
    assert len(list((here / "data" / task / "imagesTr").iterdir())) == 5
    assert (here / "outputs/brats/samples/sample_000001.nii.gz").is_file()
    assert (here / "outputs/brats/samples/evaluation/report.html").is_file()


# ---------------------------------------------------------------- messages that the pages quote


PUNCTUATION = re.compile(r"[.,:;?]+(?=[\s~]|$)")  # behind a word


@functools.cache
def literals() -> str:
    """The words of all strings of the code, a line a string, with ~ where a value stands."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ldm/**/*.py"), *ROOT.glob("launchers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "~" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(PUNCTUATION.sub("", " ".join(one.split())) for one in found)


def quoted(page: str) -> list[str]:
    """What a page shows in code marks, or after `error:` in a block, that is a sentence and no command."""
    text = read(page)
    fences = re.findall(r"^```\n(error: .*?)^```", text, re.M | re.S)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    spans = [a or b for a, b in re.findall(r"``(.+?)``|`([^`]+)`", text, re.S)]
    spans = [" ".join(one.split()) for one in [*fences, *spans]]
    return [
        one for one in spans if len(one.split()) >= 5 and not one.startswith(("python ", "torchrun ", "--"))
    ]


VALUES = (  # of a message: what has a digit, a slash or a quotation mark, file names, what is in parentheses
    r"\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|\S*[\d/\"=]\S*|\S+\.(?:gz|json|pt|ckpt|nii|img|mgz):?|\.\.\.|^\w+:|\bX\b"
    r"|\b[abc]\b|the image|squeeze|autoencoder_def|colours|unknown"
)


def not_said(message: str) -> list[str]:
    """Each three words in a row of a message that no string of the code has, with or without a value in
    place of one."""
    words = PUNCTUATION.sub("", re.sub(VALUES, " ~ ", message.removeprefix("error: ")))
    runs = [run.split() for run in words.split("~")]
    return [
        " ".join(run[i : i + 3]) for run in runs for i in range(len(run) - 2) if not _said(*run[i : i + 3])
    ]


def _said(a: str, b: str, c: str) -> bool:
    text = literals()
    if f"{a} {b} {c}" in text or f"{a} {b} {c.rstrip('.,')}" in text:  # a message may be put together there
        return True
    a, b, c, value = re.escape(a), re.escape(b), re.escape(c), r"\S*~\S*"
    ways = [f"{a} {b} {value}", f"{value} {b} {c}", f"{a} {value} {c}"]
    if re.search("|".join(ways), text):
        return True
    return bool(re.search(rf"{a} {value}", text) and re.search(rf"^{b} {c}", text, re.M))


@pytest.mark.parametrize("page", ["docs/data.md", "docs/TROUBLESHOOTING.md"])
def test_messages_that_a_page_quotes_are_those_of_the_code(page):
    wrong = {message: missing for message in quoted(page) if (missing := not_said(message))}
    assert not wrong, "\n".join(
        f"{message}\n    not in the code: {missing}" for message, missing in wrong.items()
    )
