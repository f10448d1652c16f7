"""The launchers: demo, test, the multi-GPU starters, and the .venv that they run in.

The shell scripts run in a copy of the project whose folder has a space in its name, with no Python on the
PATH but a stand-in: it runs launchers/*.py and `-c` for real, and only writes down what it is asked to do as
venv, as pip, or as one of the project's scripts. Nothing is installed and nothing is trained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHELL = [ROOT / "demo.sh", ROOT / "test.sh", ROOT / ".ci" / "run", *(ROOT / "launchers").glob("*.s*")]
BATCH = [*ROOT.glob("*.bat"), *(ROOT / "launchers").glob("*.bat")]
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(os.name == "nt" or BASH is None, reason="the .sh launchers need bash")

STAND_IN = r"""
import json, os, runpy, shutil, sys, types
from pathlib import Path

me, *args = sys.argv[1:]
if "STUB_VERSION" in os.environ:
    sys.version_info = (*map(int, os.environ["STUB_VERSION"].split(".")), 0, "final", 0)
sys.modules["pip"] = types.ModuleType("pip")
if "STUB_WITHOUT" in os.environ:
    sys.modules[os.environ["STUB_WITHOUT"]] = None

if args[0] == "-c":
    exec(args[1])
    sys.exit()
if Path(args[0]).parent.name == "launchers":
    sys.executable, sys.argv, sys.path[0] = me, args, str(Path(args[0]).parent)
    runpy.run_path(args[0], run_name="__main__")
    sys.exit()

with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps({"args": args, "folder": os.getcwd()}) + "\n")
if os.environ.get("STUB_FAIL", "\0") in " ".join(args):
    sys.exit(3)
if args[:2] == ["-m", "venv"]:
    scripts = Path(args[-1]) / "bin"
    scripts.mkdir(parents=True, exist_ok=True)
    if Path(me) != scripts / "python":
        shutil.copy(me, scripts / "python")
if args[0] == "simulate_brains.py":
    data = Path(args[args.index("--out") + 1])
    data.mkdir(parents=True)
    (data / "dataset.json").write_text("{}")
if "-e" in args:
    places = json.loads(Path(args[args.index("-e") + 1]).read_text())
    if args[0] == "train_diffusion.py" and "STUB_SAID" in os.environ:
        (Path(places["model_dir"]) / "log.txt").write_text(os.environ["STUB_SAID"])
    made = {"train_autoencoder.py": "model_dir", "inference.py": "output_dir"}.get(args[0])
    if made:
        Path(places[made]).mkdir(parents=True, exist_ok=True)
        (Path(places[made]) / f"{args[0]}.png").touch()
"""


class Project:
    """A copy of the launchers in `folder`, and runs of them that record what Python is asked to do."""

    def __init__(self, tmp_path):
        self.folder = tmp_path / "a project"
        self.bin = tmp_path / "bin"
        self.python = self.bin / "python3.12"
        self.log = tmp_path / "log"
        self.home = tmp_path
        for source in [*SHELL, *(ROOT / "launchers").glob("*.py"), *ROOT.glob("*.txt")]:
            target = self.folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        self.bin.mkdir()
        for tool in ("bash", "dirname", "env", "realpath"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        stand_in = tmp_path / "stand_in.py"
        stand_in.write_text(STAND_IN)
        self.command("python3.12", f'exec "{sys.executable}" -I -S "{stand_in}" "$(realpath "$0")" "$@"')

    def command(self, name, body):
        (self.bin / name).write_text(f"#!{BASH}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *command, folder=None, **variables):
        """The finished process and the list of what Python was asked to do during it."""
        self.log.write_text("")
        done = subprocess.run(
            [str(part) for part in command],
            cwd=folder or self.home,
            env={"PATH": str(self.bin), "STUB_LOG": str(self.log), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return done, [call["args"] for call in self.calls]

    def demo(self, *arguments, **variables):
        return self.run(self.folder / "demo.sh", *arguments, **variables)

    def environment(self, *requirements, **variables):
        return self.run(self.python, self.folder / "launchers" / "environment.py", *requirements, **variables)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def install(*names):
    files = [name if name.startswith("-") else f"--requirement={name}" for name in names]
    return ["-m", "pip", "--disable-pip-version-check", "install", *files, "--constraint=constraints.txt"]


def scripts_of(calls):
    return [args[0] for args in calls if args[0] != "-m"]


# --- the environment ------------------------------------------------------------------------------


@needs_bash
def test_environment_is_made_once(project):
    make = ["-m", "venv", "--clear", str(project.folder / ".venv")]
    assert project.environment()[1] == [make, install("requirements.txt")]
    both = ["requirements.txt", "requirements-test.txt"]
    assert project.environment(*both)[1] == [install("--quiet", *both)]


@needs_bash
def test_failed_pip_ends_with_one_line(project):
    done, calls = project.environment(STUB_FAIL="requirements.txt")
    assert done.returncode == 1 and len(calls) == 2
    assert re.fullmatch(r"error: .*pip.*\n", done.stderr)


@needs_bash
def test_environment_of_another_python_is_made_anew_and_one_without_pip_completed(project):
    project.environment()
    folder, python = str(project.folder / ".venv"), project.folder / ".venv" / "bin" / "python"
    python.write_text(f"#!{BASH}\nexit 1\n")  # of another version
    assert project.environment()[1][0] == ["-m", "venv", "--clear", folder]
    project.python = python  # as find_python.sh chooses it
    assert project.environment(STUB_WITHOUT="pip")[1][0] == ["-m", "venv", folder]


@needs_bash
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"STUB_VERSION": "3.10"}, "no Python 3.11 or newer"),
        ({"PYTHON": "/nowhere/python"}, "/nowhere/python"),
        ({"STUB_WITHOUT": "ensurepip"}, "python3-venv"),
        ({"STUB_WITHOUT": "venv"}, "python3-venv"),
    ],
)
@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_missing_python_is_named_in_two_lines(project, script, variables, named):
    done, calls = project.run(project.folder / script, **variables)
    assert done.returncode == 2 and calls == []
    assert done.stderr.startswith("error: ") and named in done.stderr and done.stderr.count("\n") == 2
    assert not (project.folder / ".venv").exists()


@needs_bash
def test_python_without_venv_is_passed_over_and_the_variable_comes_first(project):
    project.command("python3.13", f'[ "$2" != "import ensurepip, venv" ] && exec "{project.python}" "$@"')
    assert project.demo()[0].returncode == 0
    project.python.rename(project.bin / "mine")
    shutil.rmtree(project.folder / ".venv")
    assert project.demo()[0].returncode == 2
    assert project.demo(PYTHON=str(project.bin / "mine"))[0].returncode == 0
    # From now on the .venv itself is a Python that will do, where none other is left.
    (project.bin / "mine").unlink()
    assert project.demo()[0].returncode == 0


# --- the demo -------------------------------------------------------------------------------------


@needs_bash
def test_demo_help_makes_nothing(project):
    done, calls = project.demo("--help")
    assert done.returncode == 0 and calls == []
    for option in ("--data", "--out", "--set"):
        assert option in done.stdout
    assert not (project.folder / ".venv").exists() and not (project.folder / "outputs").exists()


@needs_bash
def test_demo_from_nothing_and_once_more(project):
    done, calls = project.demo("--set", "autoencoder_train.n_epochs=2", "--set", "a.b=c d")
    assert done.returncode == 0, done.stderr
    common = ["-c", "config/config_demo.json", "-e", "outputs/demo/environment.json"]
    common += ["--set", "channel=1"]  # T1w, of the simulated contrasts
    common += ["--set", "autoencoder_train.n_epochs=2", "--set", "a.b=c d"]
    simulate = ["simulate_brains.py", "--out", "outputs/demo/data", "--spacing", "4"]
    simulate += ["--tumour-fraction", "0"]
    stages = [
        ["train_autoencoder.py", *common],
        ["train_diffusion.py", *common],
        ["inference.py", *common, "--num", "8", "--batch-size", "4", "--steps", "50"],
        ["evaluate.py", *common, "--out", "outputs/demo/evaluation"],
    ]
    assert calls[2:] == [simulate, *stages]
    assert {call["folder"] for call in project.calls[2:]} == {str(project.folder)}
    out = project.folder / "outputs" / "demo"
    assert json.loads((out / "environment.json").read_text()) == {
        "data_base_dir": "outputs/demo/data",
        "model_dir": "outputs/demo/models",
        "tfevent_path": "outputs/demo/tensorboard",
        "output_dir": "outputs/demo/samples",
    }
    assert re.search(r"Done in \d+ min \d+ s", done.stdout)
    for place in ("outputs/demo/data", "outputs/demo/models", "outputs/demo/samples/inference.py.png"):
        assert place in done.stdout

    (out / "models" / "train_autoencoder.py.png").write_text("the first")
    done, calls = project.demo("--set", "autoencoder_train.n_epochs=2", "--set", "a.b=c d")
    assert done.returncode == 0 and calls[1:] == stages, "not simulated again"
    assert (out / "old-1" / "models" / "train_autoencoder.py.png").read_text() == "the first"
    assert (out / "models" / "train_autoencoder.py.png").read_text() == ""
    assert (out / "old-1" / "samples" / "inference.py.png").exists()
    assert (out / "data" / "dataset.json").exists() and "old-1/samples" not in done.stdout

    project.demo()
    assert (out / "old-2" / "models").exists() and not (out / "old-2" / "old-1").exists()


@needs_bash
def test_demo_on_own_data(project):
    data = project.home / "elsewhere" / 'T1 "raw" \\ brains é'
    data.mkdir(parents=True)
    done, calls = project.demo("--data", f"../elsewhere/{data.name}", folder=project.bin)
    assert done.returncode == 0, done.stderr
    stages = ["train_autoencoder.py", "train_diffusion.py", "inference.py", "evaluate.py"]
    assert scripts_of(calls) == stages
    out = project.folder / "outputs" / f"demo-{data.name}"
    places = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert places["data_base_dir"] == str(data)
    assert (project.folder / places["model_dir"]) == out / "models"
    assert not (project.folder / "outputs" / "demo").exists()

    done, calls = project.demo("--data", data, "--out", "my out", folder=project.home)
    assert done.returncode == 0, done.stderr
    places = json.loads((project.home / "my out" / "environment.json").read_text(encoding="utf-8"))
    assert places["model_dir"] == str(project.home / "my out" / "models")
    assert list(data.iterdir()) == []


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "no/such folder"], "no/such folder"),
        (["--data", "brains", "--out", "brains/demo"], "one lies in the other"),
        (["--data", "brains", "--out", "brains"], "one lies in the other"),
        (["--data", "brains/more", "--out", "brains"], "one lies in the other"),
        (["--out", "brains"], "no demo made"),
        (["--out", "brains/scan.nii.gz"], "is a file"),
        (["--dta", "brains"], "--dta"),
    ],
)
def test_demo_refuses_wrong_folders_before_anything_is_made(project, arguments, named):
    (project.home / "brains" / "more").mkdir(parents=True)
    (project.home / "brains" / "scan.nii.gz").touch()
    done, calls = project.demo(*arguments)
    assert done.returncode == 2 and calls == []
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not (project.folder / ".venv").exists() and not (project.folder / "outputs").exists()
    assert sorted(path.name for path in (project.home / "brains").iterdir()) == ["more", "scan.nii.gz"]


@needs_bash
def test_demo_stops_at_the_step_that_fails(project):
    done, calls = project.demo(STUB_FAIL="train_diffusion.py")
    assert done.returncode == 3
    assert scripts_of(calls) == ["simulate_brains.py", "train_autoencoder.py", "train_diffusion.py"]
    assert done.stderr == "the demo stopped: train_diffusion.py ended with exit code 3\n"


@needs_bash
@pytest.mark.parametrize(("steps", "said"), [(150, "about 12 minutes"), (301, "Expect brains")])
def test_demo_says_what_to_expect_of_this_machine(project, steps, said):
    """6 minutes for 150 steps: 12 for the 300 that make brains."""
    done, _ = project.demo(STUB_SAID=f"diffusion: about {steps} steps in 6 minutes, 2.4 s each")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"note: stage 2 will take about {steps} steps in 6 minutes. ") == 1
    assert said in done.stdout
    assert ("--set diffusion_train.max_minutes=12" in done.stdout) == (steps < 300)


# --- the tests' own launcher ----------------------------------------------------------------------


@needs_bash
def test_test_sh_lints_then_ends_with_pytest(project):
    lpips = ["-m", "pip", "install", "--quiet", "--retries", "1", "--no-deps"]
    lpips += ["-c", "constraints.txt", "lpips"]
    pytest_ = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    done, calls = project.run(project.folder / "test.sh", "-k", "two words", STUB_FAIL="-m pytest")
    assert done.returncode == 3, "pytest's exit code"
    assert calls[1:] == [
        install("requirements.txt", "requirements-test.txt"),
        lpips,
        ["-m", "ruff", "check", "."],
        [*pytest_, "-k", "two words"],
    ]
    assert {call["folder"] for call in project.calls} == {str(project.folder)}

    done, calls = project.run(project.folder / "test.sh", STUB_FAIL="lpips")
    assert done.returncode == 0 and calls[-1] == pytest_ and "note: lpips" in done.stderr

    done, calls = project.run(project.folder / "test.sh", STUB_FAIL="ruff")
    assert done.returncode == 3 and pytest_ not in calls

    done, calls = project.run(project.folder / ".ci" / "run", "-q")
    assert done.returncode == 0 and calls[-1] == [*pytest_, "-q"]


# --- training on several GPUs ---------------------------------------------------------------------


@needs_bash
def test_train_ldm(project):
    script = project.folder / "launchers" / "train_LDM.sh"
    done, calls = project.run(script, PYTHON=str(project.python), STUB_FAIL="inference.py")
    files = ["-c", "config/config_train_32g.json", "-e", "config/environment.json"]
    assert done.returncode == 1, "the stand-in's training looks for the environment file"
    assert calls == [["train_autoencoder.py", *files, "-g", "1"]], "no stage follows one that failed"

    for name in ("my env.json", "my config.json"):
        (project.folder / name).write_text(json.dumps({"model_dir": "models", "output_dir": "out"}))
    done, calls = project.run(script, "my config.json", "my env.json", "2", PYTHON=str(project.python))
    assert done.returncode == 0, done.stderr
    files = ["-c", "my config.json", "-e", "my env.json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert calls == [
        [*torchrun, "train_autoencoder.py", *files, "-g", "2"],
        [*torchrun, "train_diffusion.py", *files, "-g", "2"],
        ["inference.py", *files],
    ]


@needs_bash
def test_slurm_starts_one_torchrun_a_machine(project):
    project.command("scontrol", '[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"')
    project.command("srun", 'printf "%s\\n" "$@" > "$STUB_LOG.srun"')
    activate = project.folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    spooled = shutil.copy(project.folder / "launchers" / "train_slurm.sbatch", project.home / "slurm_script")
    job = {
        "SLURM_SUBMIT_DIR": str(project.folder),
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
    }
    done, _ = project.run(BASH, spooled, "train_diffusion.py", "c.json", "e.json", "--set", "a=b c", **job)
    assert done.returncode == 0, done.stderr
    srun = Path(f"{project.log}.srun").read_text().splitlines()
    assert srun[srun.index("python") :] == [
        *["python", "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=4", "--rdzv_id=1234567"],
        *["--rdzv_backend=c10d", "--rdzv_endpoint=gpu07:30067", "train_diffusion.py"],
        *["-c", "c.json", "-e", "e.json", "-g", "4", "--set", "a=b c"],
    ]


def test_windows_torchrun_works_with_a_torch_that_has_no_libuv(tmp_path):
    """Two processes meet with the options of the .bat, though a store with libuv (the default) is refused."""
    (tmp_path / "no_libuv.py").write_text(
        "from torch.distributed import TCPStore\n"
        "with_libuv = TCPStore.__init__\n"
        "def without(self, *args, use_libuv=True, **kwargs):\n"
        "    if use_libuv:\n"
        "        raise RuntimeError('this torch was built without libuv')\n"
        "    with_libuv(self, *args, use_libuv=False, **kwargs)\n"
        "TCPStore.__init__ = without\n"
    )
    (tmp_path / "torchrun.py").write_text("import no_libuv\nfrom torch.distributed.run import main\nmain()\n")
    (tmp_path / "worker.py").write_text(
        "import no_libuv, torch\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(total)\n"
        "print(f'rank {dist.get_rank()} sum {total.item()}', flush=True)\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    text = (ROOT / "launchers" / "multigpu.bat").read_text()
    variables = dict(re.findall(r"^set ([A-Z_]+)=(\d)$", text, re.MULTILINE))
    assert variables["USE_LIBUV"] == "0"
    options = re.search(r'^set "MEET=(.*)"$', text, re.MULTILINE)[1].split()
    for _ in range(3):  # on a busy machine the rendezvous itself may fail; what is refused fails every time
        done = subprocess.run(
            [sys.executable, "torchrun.py", *options, "--nproc_per_node=2", "worker.py"],
            cwd=tmp_path,
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank \d sum \d", done.stdout)  # the two lines may run together
    assert sorted(said) == ["rank 0 sum 3", "rank 1 sum 3"]


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_multigpu_batch_starts_its_own_script_with_options_that_it_has(stage):
    name = f"train_{stage}_multigpu.bat"
    text = (ROOT / "launchers" / name).read_text()
    assert f'call "%~dp0multigpu.bat" {stage} %*' in text and f"{name} NUM_GPUS CONFIG AMP COMPILE" in text
    command = (ROOT / "launchers" / "multigpu.bat").read_text().partition("    train_%STAGE%.py ")[2]
    options = set(re.findall(r"(?<!\S)--?[a-z]+", command))
    assert options == {"-c", "-e", "-g", "--set"} and (ROOT / f"train_{stage}.py").exists()
    keys = re.findall(r"--set %STAGE%_train\.(\w+)=", command)
    schema = json.loads((ROOT / "config" / "schema.json").read_text())
    assert keys == ["amp", "compile"]
    assert set(keys) <= set(schema["properties"][f"{stage}_train"]["properties"])


# --- the files themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_batch_files_are_fit_for_windows(path):
    raw = path.read_bytes()
    assert raw.count(b"\n") == raw.count(b"\r\n") == len(raw.splitlines()), "line ends are CRLF"
    text = raw.decode("ascii").replace("\r\n", "\n")
    commands = [line for line in text.splitlines() if not line.startswith("rem")]
    assert commands[:2] == ["@echo off", "setlocal"] and "%~dp0" in text
    assert not re.search(r"\bpause\b|\b[A-Za-z]:\\", text, re.IGNORECASE)
    assert all(line.replace('%PYTHON:"=%', "").count('"') % 2 == 0 for line in commands)
    for label in re.findall(r"\b(?:goto|call) :?([a-z]+)", text):
        assert f":{label}" in commands, f"no label {label}"
    for script in re.findall(r"[\w\\]+\.(?:py|bat)", "\n".join(commands)):
        folder = path.parent if script.startswith("dp0") else ROOT
        inside = folder / script.removeprefix("dp0").replace("\\", "/")
        assert inside.exists(), f"{script} does not exist"
    # After each program its exit code is passed on, or it is the last one.
    for line, following in zip(commands, commands[1:], strict=False):
        if re.match(r'(?:%PYTHON_COMMAND%|\.venv\\|call "| {4}--set )', line):
            assert "%errorlevel%" in following, line


@needs_bash
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_are_fit_for_bash(path):
    raw = path.read_bytes()
    assert b"\r" not in raw
    checked = subprocess.run([BASH, "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    if path.name != "find_python.sh":  # sourced, under its caller's settings
        assert raw.startswith(b"#!/usr/bin/env bash\n") and b"\nset -euo pipefail\n" in raw
        assert os.access(path, os.X_OK)


def test_every_requirement_has_a_tested_version_in_its_range():
    def read(name):
        lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        requirements = [Requirement(line) for line in lines if line]
        return {requirement.name: requirement.specifier for requirement in requirements}

    tested = read("constraints.txt")
    assert all(str(version).startswith("==") for version in tested.values())
    for name, wanted in {**read("requirements.txt"), **read("requirements-test.txt")}.items():
        assert str(tested[name])[2:] in wanted, name
