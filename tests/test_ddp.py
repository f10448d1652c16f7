"""Two processes on a CPU (gloo): they train what one process trains with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import chain
import pytest
import torch
from chain import ROOT, Project, copy_of
from test_quantised import CODEBOOK

import cache_latents
import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import configs
from ldm.data.datasets import VolumeDataset
from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.losses import AutoencoderLoss
from ldm.models.autoencoder import Autoencoder
from ldm.models.control import MASK, coded
from ldm.models.definitions import NETWORKS, instantiate
from ldm.models.denoiser import predict
from ldm.training import controlnet
from ldm.training.autoencoder import WithPosteriorDraw
from ldm.training.diffusion import build_learner
from ldm.training.latents import WithNoise
from ldm.training.step import Optimizer
from ldm.training.wrapping import wrap_network

pytestmark = [
    pytest.mark.skipif(
        os.name == "nt", reason="torchrun asks for libuv, which PyTorch for Windows does not have"
    ),
    pytest.mark.filterwarnings("ignore::FutureWarning:generative"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Three epochs of two steps, the adversarial term from the second epoch on.
RUN = ["--no-amp", "--set", "autoencoder_train.max_epochs=3", "--set", "diffusion_train.max_epochs=3"]
RUN += ["--set", "autoencoder_train.adversarial_warmup_epochs=1", "--set", "autoencoder_train.scale_lr=false"]
RUN += ["--set", "diffusion_train.scale_lr=false"]
SINGLE = ["--set", "autoencoder_train.batch_size=1", "--set", "diffusion_train.batch_size=1"]

# One process of two: a step looked at closely, then the scripts. Arguments: folder, data, and a JSON file of
# those of each script.
WORKER = """
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import cache_latents
import inference
import test_ddp
import train_autoencoder
from ldm.training import autoencoder

# One group for all, since a process that opens gloo's a second time may hang.
dist.init_process_group("gloo")
destroy = dist.destroy_process_group
dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None

folder, data, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
argv = json.loads(Path(sys.argv[3]).read_text())
torch.save(test_ddp.one_step(folder / "config.json", data), folder / f"step_{rank}.pt")

built = []
for name in ("Autoencoder", "PatchDiscriminator"):
    def build(*args, cls=getattr(autoencoder, name), **kwargs):
        built.append(cls(*args, **kwargs))
        return built[-1]
    setattr(autoencoder, name, build)
train_autoencoder.main(argv["train"])
torch.save([network.state_dict() for network in built], folder / f"weights_{rank}.pt")
train_autoencoder.main(argv["resume"])
inference.main(argv["sample"])
cache_latents.main(argv["cache"])
dist.barrier()  # a rank that leaves while the other still talks to it may abort
destroy()
os._exit(0)  # as `utils.command` does
"""


def one_step(config_file: Path, data: Path) -> dict:
    """Gradients of one step, with and without accumulation, and the draws they rest on, of this process."""
    config = utils.load_config(config_file)
    config["diffusion_def"]["in_channels"] = config["latent_channels"]  # without the conditions
    config["diffusion_def"].pop("covariate_embed", None)
    section = config["autoencoder_train"]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    section["batch_size"] = 2 // world_size
    run = utils.start(Namespace(gpus=None, device="cpu", amp=False))
    cases, _ = find_cases(data)
    dataset = VolumeDataset(cases, Preprocessing.from_config(config), chain.SHAPE)
    found = {}
    for accumulate in (1, 2):
        section["accumulate_steps"] = accumulate
        torch.manual_seed(0)
        encoder = Autoencoder(configs.define_network(config, "autoencoder_def"))
        network = wrap_network(encoder, section, run, False)
        stepper = Optimizer(network, section, None)
        loss = AutoencoderLoss(section, None)
        first, second = (
            utils.make_loader(kind(dataset, [3, 8, 10, 6], seed=0), section, config, run)
            for kind in (WithPosteriorDraw, WithNoise)
        )
        for number, (batch, chance) in enumerate(zip(first, second, strict=True)):
            with stepper.accumulating(number + 1 == accumulate):
                terms = loss(
                    batch["image"], *network(batch["image"], batch["posterior_noise"]), torch.Generator()
                )
                stepper.backward(terms["loss"])
            if number == 0:
                found["draws"] = [
                    batch["posterior_noise"],
                    *(chance[key] for key in ("posterior_noise", "noise", "uniform")),
                ]
            if number + 1 == accumulate:
                break
        found[accumulate] = [p.grad.clone() for p in encoder.parameters()]
    found["muon"] = step_of_muon(config, run)
    found["unused"] = steps_with_unused_parameters(config, run)
    found["codes"] = codes_after_steps(run)
    found["control"] = control_after_steps(utils.load_config(config_file), run)
    return found


def step_of_muon(config: dict, run) -> dict:
    """The weights of the UNet after a step with gradients that are the same on every rank."""
    config = {
        **config,
        "diffusion_train": config["diffusion_train"] | {"optimizer": "muon", "scale_lr": False},
    }
    torch.manual_seed(0)
    learner = build_learner(config, False, run)
    for parameter in learner.optimizer.parameters:
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.clip()
    learner.optimizer.step(1e-3, torch.zeros(()))
    return learner.unet.state_dict()


def steps_with_unused_parameters(config: dict, run) -> dict:
    """The weights of a UNet of monai-generative, whose attention never applies its `proj_attn`, after two
    steps of two accumulated batches, of two volumes each over all ranks."""
    config["diffusion_def"] = {
        **{k: v for k, v in config["diffusion_def"].items() if k != "channels"},
        "_target_": "generative.networks.nets.DiffusionModelUNet",
        "num_channels": [8, 16],
    }
    config["diffusion_train"] |= {"accumulate_steps": 2, "ema_decay": 0.0, "optimizer": "adam"}
    torch.manual_seed(0)
    learner = build_learner(config, False, run)
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    generator, mine = torch.Generator().manual_seed(1), slice(run.rank, None, run.world_size)
    for _ in range(2):
        for last in (False, True):
            z0, noise = torch.randn(2, 2, 3, 8, 8, 8, generator=generator)[:, mine]
            with learner.optimizer.accumulating(last):
                t = torch.full((len(z0),), 500.0)
                prediction = predict(learner.model, process.add_noise(z0, noise, t), t, {})
                learner.optimizer.backward(diffusion_loss(process, prediction, z0, noise, t))
        learner.optimizer.clip()
        learner.optimizer.step(1e-3, torch.zeros(()))
    return learner.unet.state_dict()


def control_after_steps(config: dict, run) -> dict:
    """The weights of a ControlNet after two steps of two volumes over all ranks."""
    config["diffusion_def"]["in_channels"] = config["latent_channels"]
    config["diffusion_def"].pop("covariate_embed", None)
    config["controlnet_train"] |= {"scale_lr": False, "ema_decay": 0.0, "lr": 1e-3}
    torch.manual_seed(0)
    unet = configs.define_network(config, "diffusion_def")
    torch.nn.init.normal_(unet.out[2].conv.weight)  # MONAI begins with zeros
    learner = controlnet.build_learner(config, unet, [1, 5], False, run)
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    generator, mine = torch.Generator().manual_seed(1), slice(run.rank, None, run.world_size)
    for _ in range(2):
        z0, noise = torch.randn(2, 2, 3, 8, 8, 8, generator=generator)[:, mine]
        mask = torch.randint(6, (2, 16, 16, 16), generator=generator)[mine]
        with learner.optimizer.accumulating(True):
            t, cond = torch.full((len(z0),), 500.0), {MASK: coded(mask, learner.bits)}
            prediction = predict(learner.model, process.add_noise(z0, noise, t), t, cond)
            learner.optimizer.backward(diffusion_loss(process, prediction, z0, noise, t))
        learner.optimizer.clip()
        learner.optimizer.step(1e-3, torch.zeros(()))
    return learner.control.state_dict()


def codes_after_steps(run) -> dict:
    """The codebook and the measured latents of a VQ-VAE after three steps of two volumes over all ranks."""
    torch.manual_seed(0)
    network = instantiate(CODEBOOK, NETWORKS, "here")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.rand(2, 1, 8, 8, 8, generator=generator)[run.rank :: run.world_size]
        network.decode(network.encode(images)[0])
    return {
        name: one for name, one in network.state_dict().items() if "quantizer" in name or "channel_" in name
    }


def launch(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def finish(*processes: subprocess.Popen) -> str:
    """What the processes printed; they should all end well, and end."""
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its ranks with it
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return "\n".join(printed)


@pytest.fixture(scope="module")
def alone(done, tmp_path_factory) -> Project:
    """One process, batches of 2; the second stage with Muon and all that goes with it."""
    project = copy_of(done, tmp_path_factory.mktemp("ddp") / "alone")
    project.change(**chain.with_all_on(project.config))
    project.run(train_autoencoder, *RUN)
    project.printed["diffusion"] = project.run(train_diffusion, *RUN)
    project.run(inference, "--num", "3", "--steps", "2", *RUN[1:])
    return project


@pytest.fixture(scope="module")
def together(alone) -> Project:
    """Two processes, batches of 1: the first stage; an epoch more of what one process trained ("resumed");
    and samples and latents of the networks of that process ("drawn")."""
    beside = alone.folder.parent
    project = copy_of(alone, beside / "together")
    resumed = copy_of(alone, beside / "resumed", "autoencoder_last.pt", "split.json", "train_log.jsonl")
    drawn = copy_of(alone, beside / "drawn", "autoencoder.pt", "diffusion_unet.pt", "split.json")
    argv = {
        "train": project.argv(*RUN, *SINGLE),
        "resume": resumed.argv(*RUN, *SINGLE, "--set", "autoencoder_train.max_epochs=4"),
        "sample": drawn.argv("--num", "3", "--steps", "2", *RUN[1:]),
        "cache": drawn.argv("--no-amp"),
    }
    (beside / "argv.json").write_text(json.dumps(argv))
    (beside / "worker.py").write_text(WORKER)
    worker = [beside / "worker.py", project.folder, project.data, beside / "argv.json"]
    finish(launch([*TORCHRUN, "--standalone", "--nproc_per_node=2", *worker]))
    return project


@pytest.fixture(scope="module")
def two_machines(alone) -> Project:
    """Two launchers of one process each, as on two machines: the second stage."""
    project = copy_of(alone, alone.folder.parent / "two_machines", "autoencoder.pt", "split.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    script = ["train_diffusion.py", *project.argv(*RUN, *SINGLE, "-g", "1")]
    project.printed["diffusion"] = finish(
        *[launch([*TORCHRUN, *common, f"--node_rank={rank}", *script]) for rank in (0, 1)]
    )
    return project


@pytest.fixture(scope="module")
def steps(together) -> list[dict]:
    """`one_step` of one process, and of each of two."""
    ranks = [torch.load(together.folder / f"step_{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [one_step(together.config_file, together.data), *ranks]


def test_gradients_of_two_halves_are_those_of_the_whole_batch(steps):
    whole, *ranks = steps
    for accumulate in (1, 2):
        size = max(float(gradient.abs().max()) for gradient in whole[accumulate])
        for rank in ranks:
            for a, b in zip(rank[accumulate], whole[accumulate], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * size)
    apart = [float((a - b).abs().max()) for a, b in zip(whole[1], whole[2], strict=True)]
    assert max(apart) > 1e-3 * size  # one batch and two are not the same


def test_parameters_that_no_loss_reaches_do_not_stop_an_accumulated_step(steps):
    """monai-generative's `proj_attn`: DDP would wait for its gradient ("Expected to have finished
    reduction")."""
    whole, *ranks = (one["unused"] for one in steps)
    for weights in ranks:
        chain.assert_weights_close(whole, weights)


def test_ranks_share_the_work_of_muon_and_take_the_same_step(steps):
    whole, *ranks = (one["muon"] for one in steps)
    for weights in ranks:
        assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_ranks_train_the_controlnet_of_one(steps):
    whole, *ranks = (one["control"] for one in steps)
    assert whole["controlnet_mid_block.conv.weight"].abs().max() > 1e-4  # it began with zeros
    for weights in ranks:
        chain.assert_weights_close(whole, weights)


def test_ranks_keep_one_codebook(steps):
    whole, *ranks = (one["codes"] for one in steps)
    assert whole["channel_mean"].abs().max() > 1e-3
    for codes in ranks:
        for name, value in whole.items():
            torch.testing.assert_close(codes[name], value, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in whole)


def test_ranks_draw_noise_of_their_own(steps):
    """Posterior draw, second posterior draw, noise and time of the first batch."""
    for whole, first, second in zip(*(one["draws"] for one in steps), strict=True):
        assert not torch.equal(first, second)
        assert torch.equal(torch.cat([first, second]), whole)


def test_both_ranks_hold_the_weights_that_are_saved(together):
    ranks = [torch.load(together.folder / f"weights_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not chain.differences(*ranks)
    last = together.checkpoint("autoencoder_last.pt")
    discriminator = next(one for one in ranks[0] if one.keys() == last["discriminator"].keys())
    assert not chain.differences(discriminator, last["discriminator"])
    assert not chain.differences({f"autoencoder.{k}": v for k, v in last["model"].items()}, ranks[0][0])


def test_two_processes_train_the_autoencoder_of_one(alone, together):
    a, b = (one.checkpoint("autoencoder_last.pt") for one in (alone, together))
    assert (a["step"], a["epoch"]) == (b["step"], b["epoch"]) == (6, 2)
    assert b["discriminator_stepper"]["optimizer"]["state"][0]["step"] == 4
    chain.assert_weights_close(a["model"], b["model"])
    # Instance norm takes the mean from each gradient: of some weights nothing but rounding is left.
    chain.assert_weights_close(a["discriminator"], b["discriminator"], share=0.05)
    assert together.split() == alone.split()
    logs = [one.log("autoencoder") for one in (alone, together)]
    assert len(logs[0]) == len(logs[1])  # written once
    for one, other in zip(*logs, strict=True):  # training and validation numbers are those of all ranks
        assert one.keys() == other.keys()
        for key in one.keys() - {"stage", "seconds"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


def test_promise_6_plain_and_ddp_checkpoints_load_each_other(alone, together, tmp_path):
    """What two processes saved, one resumes from, and the other way round, under the bare names."""
    names = set(alone.checkpoint("autoencoder_last.pt")["model"])
    plain = copy_of(together, tmp_path / "plain", "autoencoder_last.pt", "split.json", "train_log.jsonl")
    longer = ("--set", "autoencoder_train.max_epochs=4")
    printed = plain.run(train_autoencoder, *RUN, *SINGLE, *longer)
    assert "batches_per_epoch 2 before, 4 now, cases_per_batch 2 before, 1 now" in printed
    last = plain.checkpoint("autoencoder_last.pt")
    assert set(last["model"]) == names and (last["epoch"], last["batches_per_epoch"]) == (3, 4)
    resumed = alone.folder.parent / "resumed" / "models" / "autoencoder_last.pt"
    last = torch.load(resumed, weights_only=True)
    assert set(last["model"]) == names and last["batches_per_epoch"] == 2
    assert (last["epoch"], last["step"]) == (3, 8)


def test_two_processes_train_the_diffusion_model_of_one(alone, two_machines):
    a, b = (one.checkpoint("diffusion_unet_last.pt") for one in (alone, two_machines))
    assert a["step"] == b["step"] == 6
    chain.assert_weights_close(a["model"], b["model"])
    assert a["scale_factor"] == pytest.approx(b["scale_factor"], rel=1e-6)
    assert a["geometry"] == b["geometry"]
    best = [one.checkpoint("diffusion_unet.pt")["best"] for one in (alone, two_machines)]
    assert best[0] == pytest.approx(best[1], rel=1e-4)
    assert len(two_machines.log("diffusion")) == len(alone.log("diffusion"))
    said = two_machines.printed["diffusion"]
    assert said.count("scale factor") == 1 and "cpu x 2" in said


def test_two_processes_draw_the_samples_of_one(alone, together):
    drawn = together.folder.parent / "drawn" / "samples"
    names = sorted(path.name for path in drawn.iterdir())
    records = [f"sample_{seed:06d}.json" for seed in range(3)]
    volumes = [f"sample_{seed:06d}.nii.gz" for seed in range(3)]
    assert names == sorted([*records, *volumes, "samples.png"])
    for name in [*volumes, "samples.png"]:
        assert (drawn / name).read_bytes() == (alone.output_dir / name).read_bytes()


def test_two_processes_cache_the_latents_of_one(alone, together):
    folders = []
    alone.run(cache_latents, "--no-amp")
    for project in (alone.folder, together.folder.parent / "drawn"):
        folder = project / "models" / "cache" / "latents"
        assert len(list(folder.glob("*.npy"))) == 6
        folders.append(chain.fingerprint(folder))
    assert folders[0] == folders[1]


FAILING = """
import os
import sys

source = open("inference.py", encoding="utf-8").read()
if os.environ["RANK"] == "1":
    source = source.replace("drawn = generation.draw(", "raise FloatingPointError('this is why'); (")
sys.argv[0] = "inference.py"
exec(compile(source, "inference.py", "exec"))
"""


def test_the_reason_of_the_process_that_failed_is_told(alone, tmp_path):
    """Though the other one, which waits for it, notices too; and no traceback covers it."""
    drawn = copy_of(alone, tmp_path / "drawn", "autoencoder.pt", "diffusion_unet.pt")
    (tmp_path / "worker.py").write_text(FAILING)
    argv = drawn.argv("-n", "4", "--batch-size", "1", "--steps", "2", *RUN[1:])
    process = launch([*TORCHRUN, "--standalone", "--nproc_per_node=2", tmp_path / "worker.py", *argv])
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 1 and printed.count("error: this is why") == 1, printed
    assert "FloatingPointError" not in printed, printed


def test_a_mistake_under_the_printed_torchrun_line_is_told_once(alone, monkeypatch):
    """The line that `-g 2` prints starts two processes; they refuse to go on from nowhere."""
    argv = ["train_autoencoder.py", *alone.argv("-g", "2", *RUN, "--resume", "nowhere.pt")]
    monkeypatch.setattr("sys.argv", argv)
    line = alone.refused(train_autoencoder, "-g", "2", *RUN).splitlines()[1].split()
    assert line[0] == "torchrun"
    before = chain.fingerprint(alone.folder)
    process = launch([*TORCHRUN, *line[1:]])
    try:
        printed = process.communicate(timeout=600)[0]
    finally:
        process.terminate()
    assert process.returncode != 0
    assert printed.count("error: ") == 1 and "nowhere.pt: no such checkpoint" in printed, printed
    assert chain.fingerprint(alone.folder) == before
