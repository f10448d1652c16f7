"""A training that is stopped, killed, damaged or started again: promises 1 to 5 of docs/RELIABILITY.md."""

import copy
import gc
import re
import weakref

import chain
import pytest
import torch
from chain import Project, assert_same_result, copy_of, differences, fingerprint, power_cut
from torch.utils._pytree import tree_leaves

import train_autoencoder
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.generation import load_networks
from ldm.system.checkpoints import load_checkpoint, save_checkpoint, weights_hash
from ldm.system.ranks import Run
from ldm.training.progress import Progress
from ldm.training.step import Optimizer

AUTOENCODER = ("autoencoder.pt", "autoencoder_last.pt", "autoencoder_prev.pt")
UNET = ("diffusion_unet.pt", "diffusion_unet_last.pt", "diffusion_unet_prev.pt")
STAGES = [(train_autoencoder, AUTOENCODER), (train_diffusion, UNET)]
BIAS = 1  # the place of the first bias among the parameters, which Muon leaves to Adam
SECTION = {"optimizer": "adam", "lr": 1e-2, "scale_lr": False, "adam_betas": [0.9, 0.99]}
SECTION |= {"accumulate_steps": 1, "clip_grad_norm": None}


@pytest.fixture(scope="session")
def whole(done, tmp_path_factory) -> Project:
    """Both stages in batches of one, 4 steps an epoch, saved at nearly each of them, and never disturbed; the
    second with Muon and all that goes with it."""
    project = copy_of(done, tmp_path_factory.mktemp("whole") / "run")
    project.change(**chain.with_all_on(project.config))
    project.change(autoencoder_train=project.config["autoencoder_train"] | {"latent_noise": 0.3})
    for stage in ("autoencoder_train", "diffusion_train"):
        short = {"batch_size": 1, "max_epochs": 4, "save_minutes": 0, "val_interval": 2}
        project.change(**{stage: project.config[stage] | short})
    for script, _ in STAGES:
        project.run(script, "--no-amp")
    return project


def again(whole: Project, tmp_path) -> Project:
    """A copy of the finished run."""
    return copy_of(whole, tmp_path / "again", *AUTOENCODER, *UNET, "split.json", "train_log.jsonl")


# ---------------------------------------------------------------- promise 4: a resume is exact


@pytest.mark.parametrize(
    "script, calls", [(train_autoencoder, (3, 6, 13, 22)), (train_diffusion, (3, 8, 15))]
)
def test_promise_4_a_resume_in_the_middle_of_an_epoch_is_exact(whole, tmp_path, monkeypatch, script, calls):
    """Broken off again and again, before Adam's step of each of these numbers, and gone on with other numbers
    of loader processes; with EMA, the adversarial term from epoch 2 on, and the cosine."""
    names = () if script is train_autoencoder else ("autoencoder.pt", "split.json")
    project = copy_of(whole, tmp_path / "cut", *names)
    done_calls, middles = 0, 0
    for round_, call in enumerate(calls):
        workers = ("--set", f"data.num_workers={round_ % 2}")
        with power_cut(monkeypatch, call - done_calls):
            project.run(script, "--no-amp", *workers)
        last = project.checkpoint("autoencoder_last.pt" if names == () else "diffusion_unet_last.pt")
        middles += last["batch"] < 4
        done_calls = sum(int(s["optimizer"]["state"][BIAS]["step"]) for s in steppers(last))
    assert middles >= 2
    assert "resumed in epoch" in project.run(script, "--no-amp")
    assert_same_result(project, whole, script, ignoring=("config",))  # the loader processes stand in it


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion])
def test_no_tensor_of_a_checkpoint_outlives_the_start(whole, tmp_path, monkeypatch, script):
    """Neither of the one that is resumed nor of the best nor of stage 1's: each would be one more copy of
    weights, average and moments in main memory until the end. Sums and counters are taken up as they are."""
    project = again(whole, tmp_path)
    stage = "autoencoder_train" if script is train_autoencoder else "diffusion_train"
    read, alive, longer = [], [], ("--set", f"{stage}.max_epochs=5")

    def load(*args, **kwargs):
        content = torch_load(*args, **kwargs)
        tensors = [one for one in tree_leaves(content) if isinstance(one, torch.Tensor)]
        read.extend(weakref.ref(one) for one in tensors if one.numel() > 2)
        return content

    def epochs(self):
        gc.collect()
        alive.extend(tuple(one().shape) for one in read if one() is not None)
        yield from real_epochs(self)

    torch_load, real_epochs = torch.load, Progress.epochs
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(Progress, "epochs", epochs)
    assert "resumed in epoch" in project.run(script, "--no-amp", *longer)
    kept = (
        [] if script is train_autoencoder else [(3, 3, 8, 10, 6)]
    )  # the mean latent and its slopes, an input
    assert len(read) > 100 and alive == kept


def steppers(checkpoint: dict) -> list[dict]:
    """The states of the optimisers that have made a step."""
    found = [checkpoint["stepper"], checkpoint.get("discriminator_stepper")]
    return [one for one in found if one and one["optimizer"]["state"]]


def test_another_batch_size_begins_the_epoch_anew(whole, tmp_path, monkeypatch):
    project = copy_of(whole, tmp_path / "cut", "autoencoder.pt", "split.json")
    with power_cut(monkeypatch, 8):
        project.run(train_diffusion, "--no-amp")
    assert project.checkpoint("diffusion_unet_last.pt")["epoch"] == 1
    said = project.run(train_diffusion, "--no-amp", "--set", "diffusion_train.batch_size=2")
    division = "batches_per_epoch 4 before, 2 now, cases_per_batch 1 before, 2 now"
    assert f"{division}: epoch 1 starts from its first batch" in said
    last = project.checkpoint("diffusion_unet_last.pt")
    assert [last[key] for key in ("epoch", "batch", "step")] == [3, 2, 8]


def test_going_on_with_stage_1_keeps_the_pair_that_belongs_together(whole, tmp_path):
    """The diffusion model would be of no use without the autoencoder that it was trained on."""
    project = again(whole, tmp_path)
    old, epochs = project.model_dir / "old-1", whole.checkpoint("autoencoder_last.pt")["epoch"] + 1
    longer = ("--set", f"autoencoder_train.max_epochs={epochs + 1}")
    save_checkpoint(project.model_dir / "autoencoder.pt", whole.checkpoint("autoencoder.pt") | {"best": -9.0})
    assert "is in" not in project.run(train_autoencoder, "--no-amp", *longer)  # it stays the best
    assert not old.exists()
    save_checkpoint(project.model_dir / "autoencoder.pt", whole.checkpoint("autoencoder.pt") | {"best": 99.0})
    longer = ("--set", f"autoencoder_train.max_epochs={epochs + 3}")
    said = project.run(train_autoencoder, "--no-amp", *longer)
    assert said.count("a copy of both is in") == 1 and f"a copy of both is in {old}" in said
    for name in ("autoencoder.pt", "diffusion_unet.pt"):
        kept = torch.load(old / name, weights_only=True)["model"]
        assert not differences(kept, whole.checkpoint(name)["model"])


def test_promise_5_a_best_that_cannot_be_read_is_not_replaced(whole, tmp_path):
    """Its score is not known, so no other is known to be better."""
    project = again(whole, tmp_path)
    best = project.model_dir / "autoencoder.pt"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    message = project.refused(train_autoencoder, "--no-amp", "--set", "autoencoder_train.max_epochs=20")
    assert message.startswith(f"error: {best}: damaged") and "Move it away" in message
    assert best.read_bytes() == content


def test_a_finished_stage_goes_on_with_the_options_of_the_config(whole, tmp_path):
    """With fewer epochs there is nothing to do. With more, and half as many steps an epoch, the epochs that
    are done count half the steps; the checkpoint brings the moments, and no option of the optimiser."""
    project, epochs = again(whole, tmp_path), 4
    assert "already trained to its end" in project.run(
        train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=1"
    )
    for name in UNET[:2]:
        assert not differences(project.checkpoint(name)["model"], whole.checkpoint(name)["model"])
    given = {"adam_betas": [0.5, 0.75], "max_epochs": 2 * epochs, "accumulate_steps": 2}
    project.change(diffusion_train=project.config["diffusion_train"] | given)
    said = project.run(train_diffusion, "--no-amp")
    assert f"accumulate_steps 1 before, 2 now: epoch {epochs} starts from its first batch" in said
    last = project.checkpoint("diffusion_unet_last.pt")
    assert last["step"] == 2 * epochs * 2 and last["epoch"] == 2 * epochs - 1
    state = last["stepper"]["optimizer"]
    assert state["param_groups"][0]["betas"] == (0.5, 0.75)
    assert state["state"][BIAS]["step"] == 4 * epochs + 2 * epochs


def test_the_state_of_an_optimiser_fits_its_parameters():
    """A parameter that no loss depends on has none, and is no fault."""

    def stepper(*sides: int) -> Optimizer:
        return Optimizer(torch.nn.ParameterList(torch.ones(side) for side in sides), SECTION, None)

    one = stepper(2, 3, 4)
    one.backward(one.parameters[0].sum() + one.parameters[2].sum())
    one.clip()
    one.step(1e-2, torch.zeros(()))
    state = one.state_dict()
    frozen = stepper(2, 3, 4).network.requires_grad_(True)
    frozen[1].requires_grad_(False)  # as networks are built today; the state is from when it was not
    frozen = Optimizer(frozen, SECTION, None)
    frozen.load_state_dict(copy.deepcopy(state), "last.pt")
    assert len(frozen.parameters) == 2 and sorted(frozen.state_dict()["optimizer"]["state"]) == [0, 2]
    assert not differences(frozen.state_dict()["optimizer"]["state"], state["optimizer"]["state"])
    other = stepper(2, 3, 4)
    other.load_state_dict(state, "last.pt")
    assert sorted(state["optimizer"]["state"]) == [0, 2]
    assert not differences(other.state_dict()["optimizer"]["state"], state["optimizer"]["state"])
    for sides in ((2, 3, 5), (2, 3), (4, 3, 2)):
        with pytest.raises(UserError, match=r"last\.pt: the state of its optimiser does not fit"):
            stepper(*sides).load_state_dict(state, "last.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning:generative")
def test_frozen_parameters_are_told_of(whole, tmp_path):
    project = copy_of(whole, tmp_path / "generative", "autoencoder.pt", "split.json")
    unet = {k: v for k, v in project.config["diffusion_def"].items() if k != "channels"}
    unet |= {"_target_": "generative.networks.nets.DiffusionModelUNet", "num_channels": [8, 16]}
    short = project.config["diffusion_train"] | {"max_epochs": 1}
    project.change(diffusion_def=unet, diffusion_train=short)
    said = project.run(train_diffusion, "--no-amp")
    first = "down_blocks.1.attentions.0.proj_attn.weight"
    assert f"diffusion: 8 parameters that no loss reaches are frozen, such as {first}" in said


def test_moments_are_laid_out_in_memory_as_the_parameters_are():
    """Not every machine keeps the channels last; the fused kernels would mix up the voxels."""
    layouts, ends = (torch.channels_last_3d, torch.contiguous_format), []
    start = torch.randn(4, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for first in layouts:
        for second in layouts:
            state = weight = None
            for step, layout in enumerate((first, second)):
                weight = start if weight is None else weight
                network = torch.nn.ParameterList([weight.clone(memory_format=layout)])
                stepper = Optimizer(network, SECTION, None)
                if state is not None:
                    stepper.load_state_dict(state, "last.pt")
                (weight,) = stepper.parameters
                stepper.backward(
                    (weight * torch.randn(start.shape, generator=torch.Generator().manual_seed(step))).sum()
                )
                stepper.clip()
                stepper.step(1e-2, torch.zeros(()))
                state, weight = copy.deepcopy(stepper.state_dict()), weight.detach()
            ends.append(weight)
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what a start begins from


def test_promise_2_the_one_before_is_used_where_the_newest_is_damaged(whole, tmp_path):
    """64 bytes overwritten, a truncated file, or none, as between the two renames of a save: not used; a line
    says so; the end is the same. The code is that of both stages."""
    project = again(whole, tmp_path)
    newest, before = (project.model_dir / name for name in UNET[1:])
    assert load_checkpoint(before)["step"] < load_checkpoint(newest)["step"] == 16
    for how in ("overwritten", "truncated", "missing"):
        newest.unlink() if how == "missing" else chain.damage(newest, how)
        said = project.run(train_diffusion, "--no-amp")
        assert f"{before} is used" in said
        assert f"{newest.name}{' is missing;' if how == 'missing' else ': '}" in said
        assert_same_result(project, whole, train_diffusion)
        load_checkpoint(before)  # a damaged file never takes the place of the good one before it


@pytest.mark.parametrize("script, names", STAGES)
def test_promise_3_where_no_checkpoint_is_good_nothing_starts(whole, tmp_path, script, names):
    project = again(whole, tmp_path)
    for name in names[1:]:
        chain.damage(project.model_dir / name, "overwritten")
    before = fingerprint(project.folder)
    message = project.refused(script)
    assert all(name in message for name in names[1:]) and "--fresh" in message
    for name in names[1:]:
        (project.model_dir / name).unlink()
    message = project.refused(script)
    assert names[0] in message and "--fresh" in message
    after = fingerprint(project.folder)
    assert after == {k: v for k, v in before.items() if not k.endswith(names[1:])}


@pytest.mark.parametrize("script, names", STAGES)
@pytest.mark.parametrize("fault", ["missing", "truncated", "overwritten", "weights only"])
def test_promise_3_an_asked_for_resume_never_starts_afresh(whole, tmp_path, script, names, fault):
    project = again(whole, tmp_path)
    named = tmp_path / "named.pt"
    if fault == "weights only":
        save_checkpoint(named, project.checkpoint(names[0]))
    elif fault != "missing":
        named.write_bytes((project.model_dir / names[1]).read_bytes())
        chain.damage(named, fault)
    before = fingerprint(project.folder)
    assert str(named) in project.refused(script, "--resume", named)
    assert fingerprint(project.folder) == before


@pytest.mark.parametrize("script, names", STAGES)
def test_resume_takes_the_checkpoint_that_is_named_and_keeps_copies(whole, tmp_path, script, names):
    project = again(whole, tmp_path)
    before = fingerprint(project.model_dir)
    named = project.model_dir / names[2]
    step = project.checkpoint(names[2])["step"]
    said = project.run(script, "--no-amp", "--resume", named)
    assert f"step {step}" in said and str(project.model_dir / "old-1") in said
    assert_same_result(project, whole, script)
    kept = fingerprint(project.model_dir / "old-1")
    assert kept and all(kept[name] == before[name] for name in (*names, "train_log.jsonl"))


@pytest.mark.parametrize("script, names, how", [(*STAGES[0], "resume_ckpt"), (*STAGES[1], "--fresh")])
def test_fresh_starts_over_and_moves_what_was_there(whole, tmp_path, script, names, how):
    """Twice: old-1, then old-2. Starting stage 1 over takes its diffusion model along."""
    project = again(whole, tmp_path)
    if how == "resume_ckpt":
        project.set_environment(resume_ckpt=False)
    arguments = ("--fresh",) if how == "--fresh" else ()
    before = fingerprint(project.model_dir)
    moved = {*names} if script is train_diffusion else {*AUTOENCODER, *UNET, "split.json"}
    for n in (1, 2):
        said = project.run(script, "--no-amp", *arguments)
        assert (
            f"starting over{'' if arguments else ' (resume_ckpt is false; remove it to resume instead)'}"
            in said
        )
        kept = fingerprint(project.model_dir / f"old-{n}")
        assert "train_log.jsonl" in kept and (n == 2 or all(kept[name] == before[name] for name in moved))
    assert_same_result(project, whole, script)
    rest = project.log("diffusion" if script is train_autoencoder else "autoencoder")
    assert bool(rest) == (script is train_diffusion)  # stage 2 leaves the log of stage 1 alone
    project.set_environment(resume_ckpt=False)  # flags win
    assert "already trained to its end" in project.run(script, "--resume", project.model_dir / names[1])


@pytest.mark.parametrize("script, names", STAGES)
def test_fresh_moves_nothing_where_there_are_no_data(whole, tmp_path, script, names):
    project = again(whole, tmp_path)
    before = fingerprint(project.model_dir)
    project.set_environment(data_base_dir=str(tmp_path / "mistyped"))
    assert f"{tmp_path / 'mistyped'}: no such data folder" in project.refused(script, "--fresh")
    assert fingerprint(project.model_dir) == before


@pytest.mark.parametrize("flag", [True, None])
def test_resume_ckpt_lets_the_first_run_of_a_stage_start(whole, tmp_path, flag):
    """As the tutorial has it: true goes on where there is something to go on from."""
    project = copy_of(whole, tmp_path / "first", "autoencoder.pt", "split.json")
    project.set_environment(**({} if flag is None else {"resume_ckpt": flag}))
    said = project.run(train_diffusion, "--no-amp")
    assert ("no checkpoint of this stage to resume from" in said) == (flag is True)
    assert_same_result(project, whole, train_diffusion)


FIXED = [  # what a checkpoint was trained with, and how it is told
    ("spacing=[4,3,6]", "spacing [2.0, 1.5, 3.0]"),
    ("channel=1", "channel 0"),
    ("intensity.upper_percentile=99", "intensity.upper_percentile 99.5"),
    ("autoencoder_def.norm_eps=0.1", "autoencoder_def.norm_eps not given"),
]


@pytest.mark.parametrize("script, names", STAGES)
@pytest.mark.parametrize("how", ["the newest", "--resume"])
def test_promise_23_a_resumed_run_is_the_run_that_was_begun(whole, tmp_path, script, names, how):
    """Whatever the weights mean nothing without is refused, and nothing is written; a spacing that the data
    decide is known once they are found."""
    project = again(whole, tmp_path)
    named = project.model_dir / names[2]
    before = fingerprint(project.folder)
    own = [("autoencoder_train.optimizer=muon", 'autoencoder_train.optimizer "adam"')]
    if script is train_diffusion:
        own = [("NoiseScheduler.shift=2", "NoiseScheduler.shift 1.0")]
        own += [("diffusion_train.optimizer=adam", 'diffusion_train.optimizer "muon"')]
    for keys, told in [*FIXED, *own, ("spacing=null longest_side=10", FIXED[0][1])]:
        changed = [word for key in keys.split() for word in ("--set", key)]
        message = project.refused(script, *(("--resume", named) if how == "--resume" else ()), *changed)
        assert f"was trained with {told}" in message and "another model_dir" in message
        after = fingerprint(project.folder)
        assert before == {name: after[name] for name in before}
        assert keys.startswith("spacing=null") or before == after  # then the copy that --resume makes


def test_a_checkpoint_from_before_muon_is_one_of_adam(whole):
    config, key = utils.load_config(whole.config_file), "autoencoder_train.optimizer"
    old = whole.checkpoint("autoencoder_last.pt")["config"]
    del old["autoencoder_train"]["optimizer"]
    configs.check_fixed(old, config, [key], whole.config_file)
    config["autoencoder_train"]["optimizer"] = "muon"
    with pytest.raises(UserError, match=f'{key} "adam"; the config says "muon"'):
        configs.check_fixed(old, config, [key], whole.config_file)


def test_promise_23_every_other_change_is_said(whole, tmp_path):
    project = again(whole, tmp_path)
    changed = ("--set", "diffusion_train.lr=1e-5", "--set", "spacing=null")
    changed = (*changed, "--set", "autoencoder_def.use_checkpoint=true")  # of its memory, not its results
    said = project.run(train_diffusion, "--no-amp", *changed)
    (line,) = [one for one in said.splitlines() if one.startswith("differs from the checkpoint's config: ")]
    told = line.partition(": ")[2].split("; ")
    checkpointing = "autoencoder_def.use_checkpoint true, was not given"
    assert sorted(told) == sorted(["diffusion_train.lr 1e-05, was 0.002", checkpointing])
    assert "differs from" not in project.run(train_diffusion, "--no-amp")


def test_stage_2_does_not_go_on_with_another_autoencoder(whole, tmp_path):
    """The latents of one mean nothing to the diffusion model of another."""
    project = again(whole, tmp_path)
    other = project.checkpoint("autoencoder.pt")
    next(iter(other["model"].values())).mul_(1.01)
    save_checkpoint(tmp_path / "other.pt", other)
    before = fingerprint(project.folder)
    message = project.refused(train_diffusion, "--autoencoder", tmp_path / "other.pt")
    assert str(tmp_path / "other.pt") in message and "--fresh" in message
    assert fingerprint(project.folder) == before


# ---------------------------------------------------------------- promise 5: the best stays the best


def test_promise_5_the_best_is_kept_though_an_older_checkpoint_is_gone_on_from(whole, tmp_path):
    """The best file knows its own score: a resume from before it was found does not lower the bar."""
    project = again(whole, tmp_path)
    best = project.checkpoint("autoencoder.pt") | {"best": -9.0}
    save_checkpoint(project.model_dir / "autoencoder.pt", best)
    project.run(train_autoencoder, "--no-amp", "--resume", project.model_dir / "autoencoder_prev.pt")
    assert project.checkpoint("autoencoder.pt")["best"] == -9.0


def test_a_scheduler_by_name_keeps_the_shift_that_the_training_began_with(whole, tmp_path):
    """Latents of 8 x 10 x 6 and a base of 30 voxels; an older checkpoint, of when it was passed over."""
    project = copy_of(whole, tmp_path / "shifted", "autoencoder.pt", "split.json")
    flow = {"_target_": "monai.networks.schedulers.RFlowScheduler", "use_timestep_transform": True}
    flow |= {"base_img_size_numel": 30, "sample_method": "logit-normal"}
    short = project.config["diffusion_train"] | {"max_epochs": 1}
    project.change(NoiseScheduler=flow, diffusion_train=short)
    assert "keep the shift" not in project.run(train_diffusion, "--no-amp")
    best, files = project.checkpoint("diffusion_unet.pt"), [project.model_dir / name for name in UNET[:2]]
    assert best["shift"] == pytest.approx(16 ** (1 / 3))
    assert best["config"]["diffusion_train"]["timestep_sampling"] == "logit_normal"

    def shift() -> float:
        config, run = utils.load_config(project.config_file), Run(0, 1, torch.device("cpu"))
        weights = project.model_dir / "autoencoder.pt"
        return load_networks(weights, files[0], config, "here", None, False, None, run).process.shift

    assert shift() == best["shift"]
    for path in files:
        old = torch.load(path, weights_only=True)
        del old["shift"]
        save_checkpoint(path, old)
    assert shift() == 1
    said = project.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=2")
    assert "the times keep the shift of 1 that this training began with" in said
    assert project.checkpoint("diffusion_unet_last.pt")["shift"] == 1


@pytest.mark.parametrize("measure", ["PSNR", "another weight"])
def test_promise_5_a_best_that_was_measured_otherwise_is_measured_again(whole, tmp_path, measure):
    """A PSNR, or a loss of other weights, is never compared with the loss; the better file stays."""
    project = again(whole, tmp_path)
    expected, more = (
        project.checkpoint("autoencoder.pt"),
        {"max_epochs": 5, "lr": 1.0, "lr_schedule": "constant"},
    )
    if measure == "PSNR":  # above any loss, so that any loss would replace it
        old = expected | {
            "best": expected["validation"]["psnr"],
            "validation": {"psnr": expected["validation"]["psnr"]},
        }
        save_checkpoint(project.model_dir / "autoencoder.pt", old)
        loss = expected["best"]
    else:
        more["gradient_weight"] = 3.0
        loss = expected["validation"]["recon_loss"] + 3 * expected["validation"]["gradient_loss"]
    project.change(autoencoder_train=project.config["autoencoder_train"] | more)
    before = fingerprint(project.model_dir)
    said = project.run(train_autoencoder, "--no-amp")
    told = re.search(r"was chosen by another measure\. Its held-out loss by this config is (\S+),", said)
    assert float(told[1]) == pytest.approx(loss, rel=1e-3)
    assert fingerprint(project.model_dir)["autoencoder.pt"] == before["autoencoder.pt"]


# ---------------------------------------------------------------- files


def test_the_hash_of_weights_is_of_names_types_shapes_and_values():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.0)}
    same = {key: weights[key].clone() for key in ("c", "a", "b")}
    assert weights_hash(weights) == weights_hash(same)
    for other in (
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "c": torch.tensor(1.0000001)},
        {**weights, "c": torch.tensor(1)},
        {"a": weights["a"], "b": weights["b"], "d": weights["c"]},
    ):
        assert weights_hash(other) != weights_hash(weights)
    assert weights_hash({**weights, "a": weights["a"].T.contiguous().T}) == weights_hash(weights)


def test_the_log_has_neither_gaps_nor_repeats_where_a_kill_cut_a_line(whole, tmp_path):
    project = again(whole, tmp_path)
    path = project.model_dir / "train_log.jsonl"
    text = path.read_text()
    path.write_text(text + text.splitlines()[0] + '\n{"stage": "autoencoder", "st')
    project.run(train_autoencoder, "--no-amp")
    assert not differences(project.log("autoencoder"), whole.log("autoencoder"))
    assert len(project.log("diffusion")) == len(whole.log("diffusion")) > 0
    epochs = [(e["epoch"], "val_psnr" in e) for e in project.log("autoencoder")]
    assert epochs == [(0, False), (0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
