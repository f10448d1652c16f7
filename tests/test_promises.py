"""Promises of docs/RELIABILITY.md that concern the scripts as a whole; the others lie beside their parts."""

import pickle
import socket
import zipfile

import pytest
import torch
from chain import Project, copy_of

import inference
import train_autoencoder
import train_diffusion

STAGES = [(train_autoencoder, "autoencoder_last.pt"), (train_diffusion, "diffusion_unet_last.pt")]
ALL = ("autoencoder.pt", "autoencoder_last.pt", "diffusion_unet.pt", "diffusion_unet_last.pt")


@pytest.mark.parametrize("script, name", STAGES)
def test_promise_6_plain_and_compiled_checkpoints_load_each_other(done, tmp_path, monkeypatch, script, name):
    """Plain, gone on with compiled, and again plain: the names are those of the bare network throughout.
    tests/test_ddp.py does the same with DDP. The compiler's backend is not what matters here."""
    compiled, real = [], torch.compile

    def compile_without_code(network):
        compiled.append(network)
        return real(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_code)
    project = copy_of(done, tmp_path / "compiled", *ALL, "split.json", "train_log.jsonl")
    names = set(done.checkpoint(name)["model"])
    section = "autoencoder_train" if script is train_autoencoder else "diffusion_train"
    epochs = project.config[section]["max_epochs"]
    for more, option in enumerate(("--compile", "--no-compile"), 1):
        longer = ("--set", f"{section}.max_epochs={epochs + more}")
        said = project.run(script, "--no-amp", option, *longer)
        assert f"step {2 * (epochs + more - 1)}" in said
        last = project.checkpoint(name)
        assert set(last["model"]) == names and last["step"] == 2 * (epochs + more)
        assert bool(compiled) == (more >= 1)
    project.run(inference, "--steps", "1")


class Malicious:
    """What a pickle may do: make a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "zip with more"])
def test_promise_15_no_checkpoint_can_run_code(done, tmp_path, kind):
    """Each way in which a script reads a checkpoint; the file that it would make is not made."""
    project = copy_of(done, tmp_path / "evil", *ALL, "split.json")
    evil, marker = tmp_path / "evil.pt", tmp_path / "marker"
    content = {"model": {"weight": torch.zeros(1)}, "stepper": {}, "more": Malicious(marker)}
    if kind == "bare pickle":
        evil.write_bytes(pickle.dumps(content))
    elif kind == "zip with more":
        torch.save({"model": {"weight": torch.zeros(1)}}, evil)
        with zipfile.ZipFile(evil, "a") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=kind == "zip")
    for script, arguments in (
        (train_autoencoder, ("--resume", evil)),
        (train_diffusion, ("--resume", evil)),
        (inference, ("--autoencoder", evil)),
        (inference, ("--unet", evil)),
        (train_diffusion, ("--fresh", "--autoencoder", evil)),
    ):
        assert str(evil) in project.refused(script, *arguments)
        assert not marker.exists()
    for name in ALL:
        (project.model_dir / name).write_bytes(evil.read_bytes())
    for script in (train_autoencoder, train_diffusion, inference):
        assert str(project.model_dir) in project.refused(script)
        assert not marker.exists()
    with open(evil, "rb") as file:  # the trap works: without the guard it would have sprung
        if kind == "bare pickle":
            pickle.load(file)["more"].close()
            assert marker.exists()


def test_promise_19_the_whole_chain_runs_without_a_network(done, tmp_path, monkeypatch):
    """On a CPU; any connection, and any look for an address, fails."""

    def refused(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    with pytest.raises(AssertionError, match="a connection was tried"):
        socket.create_connection(("127.0.0.1", 9))
    project = Project(tmp_path / "offline", done.data)
    short = ("--set", "autoencoder_train.max_epochs=1", "--set", "diffusion_train.max_epochs=1")
    for script, more in ((train_autoencoder, ()), (train_diffusion, ()), (inference, ("--steps", "2"))):
        project.run(script, *more, *short)
    assert (project.output_dir / "sample_000000.nii.gz").is_file()
