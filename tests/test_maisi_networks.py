"""MAISI's networks by `_target_`: on a CPU, of any size, with weights of any origin, in all scripts."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, Project, make_data
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from test_labels import VALUES, add_labels

import cache_latents
import inference
import train_autoencoder
import train_controlnet
import train_diffusion
from ldm import UserError, configs
from ldm.data.cases import Case
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.coverage import check_region, region_of, region_tensors, spacing_tensor
from ldm.export.bundle import check_definitions
from ldm.export.formats import write_torchscript
from ldm.models import maisi
from ldm.models.control import Controlled, control_definition, start_as_unet
from ldm.models.definitions import NETWORKS, instantiate
from ldm.models.weights import load_weights

AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 3,
    "num_channels": [8, 16],
    "num_res_blocks": [1, 1],
    "norm_num_groups": 4,
    "attention_levels": [False, False],
}
UNET = {
    "spatial_dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "num_channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "include_top_region_index_input": True,
    "include_bottom_region_index_input": True,
    "include_spacing_input": True,
}
EMBEDDING = {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [8, 16]}
MEMORY = {"num_splits": 4, "norm_float16": True, "save_mem": True, "print_info": False}
KL = f"{maisi.PACKAGE}autoencoderkl_maisi.AutoencoderKlMaisi"
CONDITIONS = {"spacing": True, "region": True}


def drawn(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A network whose every parameter is drawn, those too that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def built(target: str, definition: dict) -> torch.nn.Module:
    return instantiate({"_target_": target, **definition}, NETWORKS, "here").eval()


# ---------------------------------------------------------------- networks


@torch.no_grad()
def test_an_autoencoder_for_large_gpus_runs_on_a_cpu(capsys):
    """As MAISI's own class without its savings, which fail on a CPU, and on sides that 4 does not divide."""
    plain = drawn(AutoencoderKlMaisi(**AUTOENCODER, num_splits=1, norm_float16=False, save_mem=False))
    images = torch.rand(1, 1, 20, 8, 6)
    sparing = AutoencoderKlMaisi(**AUTOENCODER, **MEMORY)
    with pytest.raises(RuntimeError):
        sparing.encode(images)
    maisi.tell_once.cache_clear()
    network = built(KL, AUTOENCODER | MEMORY)
    assert "note: here.norm_float16 is not followed" in capsys.readouterr().out
    load_weights(network, plain.state_dict(), "here")
    for one, other in zip(network.encode(images), plain.encode(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    latents = torch.randn(1, 3, 10, 4, 3)
    torch.testing.assert_close(network.decode(latents), plain.decode(latents), rtol=1e-4, atol=1e-5)


def coverage(batch: int) -> dict[str, torch.Tensor]:
    return {
        "spacing_tensor": spacing_tensor([1.5, 1.5, 3.0], batch),
        **region_tensors(["chest:abdomen"] * batch),
    }


@torch.no_grad()
def test_a_controlnet_is_derived():
    """It has no inputs for spacing and regions. At first it changes nothing."""
    unet = drawn(built(maisi.UNET, UNET | {"use_flash_attention": True}))
    definition = control_definition({"_target_": maisi.UNET, **UNET}, (4, 4, 4), [1, 130])
    assert definition["conditioning_embedding_in_channels"] == 8
    assert definition["conditioning_embedding_num_channels"] == [16, 32, 64]
    control = built(definition["_target_"], {k: v for k, v in definition.items() if k != "_target_"})
    assert isinstance(control, ControlNetMaisi) and start_as_unet(control, unet) > 20
    layer = "down_blocks.0.resnets.0.time_emb_proj.weight"
    own, theirs = control.state_dict()[layer], unet.state_dict()[layer]
    assert own.shape == (8, 32) and theirs.shape == (8, 128) and torch.equal(own, theirs[:, :32])
    both = Controlled(unet, control).eval()
    x, t, mask = torch.randn(2, 3, 4, 4, 4), torch.full((2,), 500.0), torch.rand(2, 8, 16, 16, 16).round()
    expected = unet(x, timesteps=t, **coverage(2))
    torch.testing.assert_close(both(x, timesteps=t, mask=mask, **coverage(2)), expected)
    control.controlnet_mid_block.conv.bias.add_(1)
    assert (both(x, timesteps=t, mask=mask, **coverage(2)) - expected).abs().max() > 1e-3


def old_names(state: dict) -> dict:
    """As monai-generative has them, with its attention's projection that is not applied."""
    old = {}
    for name, value in state.items():
        was = name.replace(".postconv.", ".conv.").replace(".attn.to_", ".to_")
        old[was] = value
        if was.endswith(".to_q.weight"):
            old[was.replace("to_q", "proj_attn")] = torch.randn_like(value)
            old[was.replace("to_q.weight", "proj_attn.bias")] = torch.randn(len(value))
    return old


@torch.no_grad()
def test_released_weights_of_old_names():
    x, t = torch.randn(1, 3, 4, 4, 4), torch.tensor([300.0])
    control = {key: value for key, value in UNET.items() if "include" not in key and key != "out_channels"}
    for cls, target, definition, call in (
        (DiffusionModelUNetMaisi, maisi.UNET, UNET, lambda net: net(x, timesteps=t, **coverage(1))),
        (
            ControlNetMaisi,
            maisi.CONTROLNET,
            control
            | {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [8, 16]},
            lambda net: net(x, timesteps=t, controlnet_cond=torch.ones(1, 8, 8, 8, 8))[1],
        ),
    ):
        released, network = drawn(cls(**definition)), built(target, definition)
        state = old_names(released.state_dict())
        assert len(state) > len(network.state_dict()) or ".attn." not in str(state)
        load_weights(network, state, "here")
        torch.testing.assert_close(call(network), call(released))


# ---------------------------------------------------------------- spacing and regions


def test_regions_and_spacing_as_maisi_has_them():
    case = Case("a", (), covariates={"top_region_index": [0, 1, 0, 0], "bottom_region_index": [0, 0, 1, 0]})
    assert region_of(case) == "chest:abdomen" == check_region("chest:abdomen")
    tensors = region_tensors(["chest:abdomen", "head:head"])
    assert tensors["top_region_index_tensor"].tolist() == [[0, 100, 0, 0], [100, 0, 0, 0]]
    assert tensors["bottom_region_index_tensor"].tolist() == [[0, 0, 100, 0], [100, 0, 0, 0]]
    assert spacing_tensor([1.5, 1.5, 2.0], 2).tolist() == [[150, 150, 200]] * 2
    for text in ("chest", "abdomen:chest", "chest:knee"):
        with pytest.raises(UserError, match="expected two of head, chest, abdomen, lower"):
            check_region(text)
    for index in (None, [1, 1, 0, 0], [0, 1, 0], "chest"):
        bad = Case("b", (), covariates={"top_region_index": index, "bottom_region_index": [0, 0, 0, 1]})
        with pytest.raises(UserError, match="b: top_region_index: "):
            region_of(bad)


# ---------------------------------------------------------------- all scripts


def add_regions(data) -> None:
    """The first half of the scans is a head, the others reach from the chest down."""
    content = json.loads((data / "dataset.json").read_text())
    for i, entry in enumerate(content["training"]):
        top, bottom = (0, 0) if i < 3 else (1, 2)
        entry |= {"top_region_index": [int(k == top) for k in range(4)]}
        entry |= {"bottom_region_index": [int(k == bottom) for k in range(4)]}
    (data / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """All three stages with MAISI's networks."""
    folder = tmp_path_factory.mktemp("maisi")
    project = Project(folder / "run", make_data(folder / "data"))
    add_labels(project.data)
    add_regions(project.data)
    project.config["autoencoder_train"] |= {"max_epochs": 1, "adversarial_weight": 0}
    project.config["diffusion_train"] |= {"max_epochs": 1, "latent_cache": True}
    project.change(
        autoencoder_def={"_target_": KL, **AUTOENCODER, **MEMORY},
        diffusion_def={"_target_": maisi.UNET, **UNET, "use_flash_attention": True},
        conditions=CONDITIONS,
        controlnet_train={"max_epochs": 1},
    )
    for script in (train_autoencoder, cache_latents, train_diffusion, train_controlnet):
        argv = [] if script is cache_latents else ["--no-amp"]
        project.printed[script.__name__] = project.run(script, *argv)
    return project


def test_stage_2_is_told_regions_and_spacing(project):
    checkpoint = project.checkpoint("diffusion_unet.pt")
    assert checkpoint["conditions"]["regions"] == sorted(
        "head:head" if name in ("scan_0", "scan_1", "scan_2") else "chest:abdomen"
        for name in project.split()["training"]
    )
    assert "conditions: region chest:abdomen (3), head:head (3)" in project.printed["train_diffusion"]
    assert checkpoint["model"]["spacing_layer.0.weight"].shape == (32, 3)


@torch.no_grad()
def test_a_sample_by_hand(project):
    argv = ["--steps", "1", "--sampler", "euler", "--size", "20,20,12", "--spacing", "2,1.5,2.5"]
    said = project.run(inference, *argv, "--condition", "region=head:chest")
    assert "warning: volumes have voxels of 2 x 1.5 x 2.5 mm; the model was trained on 2 x 1.5 x 3 mm" in said
    image = nib.load(project.output_dir / "sample_000000.nii.gz")
    assert image.shape == (20, 20, 12) and image.header.get_zooms() == (2, 1.5, 2.5)
    checkpoint = project.checkpoint("diffusion_unet.pt")
    unet = project.network("diffusion_def", checkpoint["model"])
    autoencoder = project.network("autoencoder_def", project.checkpoint("autoencoder.pt")["model"])
    z = torch.randn(3, 10, 10, 6, generator=torch.Generator().manual_seed(0))[None]
    cond = {"spacing_tensor": torch.tensor([[200.0, 150.0, 250.0]])}
    cond["top_region_index_tensor"] = torch.tensor([[100.0, 0, 0, 0]])
    cond["bottom_region_index_tensor"] = torch.tensor([[0, 100.0, 0, 0]])
    z = z + unet(z, timesteps=torch.tensor([1000.0]), **cond)
    expected = autoencoder.decode(z / checkpoint["scale_factor"])[0, 0].numpy()
    ((low, high),) = checkpoint["geometry"]["limits"]
    expected = expected * (high - low) + low
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    record = json.loads((project.output_dir / "sample_000000.json").read_text())
    assert record["condition"] == {"region": "head:chest"}


def test_what_is_not_asked_is_drawn_and_what_cannot_be_is_refused(project):
    said = project.run(inference, "--seed", "5", "--steps", "1")
    assert "region not given: drawn from the training volumes'" in said
    record = json.loads((project.output_dir / "sample_000005.json").read_text())
    assert record["condition"]["region"] in ("head:head", "chest:abdomen")
    for argv, what in (
        (["--condition", "region=knee:toe"], "expected two of head"),
        (["--condition", "region=head:chest", "--guidance", "2"], "no input for an unknown condition"),
    ):
        assert what in project.refused(inference, "--seed", "6", *argv)
    config = {"conditions": CONDITIONS, "spatial_dims": 3}
    with pytest.raises(UserError, match="conditions.spacing: a bundle"):
        check_definitions(config | {"autoencoder_def": {"_target_": KL}, "diffusion_def": {}})
    with pytest.raises(UserError, match="conditions.spacing: no TorchScript"):
        write_torchscript(project.folder / "ts", None, config)


UNCHECKED = ["--steps", "1", "--tries", "0"]  # an untrained network fits no label


def test_a_controlnet_follows_masks_and_is_reproduced(project, capsys):
    mask = str(project.data / "labelsTr/scan_1.nii.gz")
    argv = ["--seed", "20", *UNCHECKED, "--mask", mask, "--condition", "region=head:head"]
    project.run(inference, *argv)
    inference.main(["--reproduce", str(project.output_dir / "sample_000020.json")])
    assert capsys.readouterr().out.count("byte-identical to the recorded") == 2


def test_files_of_others(project, tmp_path):
    """MAISI's files: an autoencoder, a network with its scale factor, a ControlNet; none says more."""
    files = {name: tmp_path / f"{name}.pt" for name in ("autoencoder", "unet", "controlnet")}
    ours = {
        key: project.checkpoint(f"{name}.pt")
        for key, name in zip(files, ("autoencoder", "diffusion_unet", "controlnet"), strict=True)
    }
    scale = torch.tensor(ours["unet"]["scale_factor"])
    torch.save(ours["autoencoder"]["model"], files["autoencoder"])
    state = old_names(ours["unet"]["model"])
    torch.save({"unet_state_dict": state, "scale_factor": scale, "epoch": 3}, files["unet"])
    torch.save({"controlnet_state_dict": ours["controlnet"]["model"], "epoch": 3}, files["controlnet"])
    given = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    mask = str(project.data / "labelsTr/scan_1.nii.gz")
    argv = [
        *given,
        "--seed",
        "30",
        "--steps",
        "1",
        "--tries",
        "0",
        "--mask",
        mask,
        "--size",
        "16,20,12",
        "--set",
        "spacing=null",
    ]
    labels = ["--set", f"label_values={VALUES}".replace(" ", "")]
    window = ["--set", "intensity.window=[0,1]", "--set", "intensity.upper_percentile=null"]
    window += ["--set", "intensity.lower_percentile=null"]
    assert "or give --spacing and --size" in project.refused(inference, *argv, *window)
    argv += ["--spacing", "2,1.5,3", *window]
    assert "Name the labels that they know" in project.refused(inference, *argv)
    assert "Give it by --condition region=" in project.refused(inference, *argv, *labels)
    argv += [*labels, "--condition", "region=head:head"]
    project.run(inference, *argv)
    drawn_by_others = nib.load(project.output_dir / "sample_000030.nii.gz").get_fdata()
    own = ["--seed", "30", *UNCHECKED, "--mask", mask, "--condition", "region=head:head"]
    project.set_environment(output_dir=str(project.folder / "own"))
    project.run(inference, *own)
    project.set_environment()
    ((low, high),) = ours["unet"]["geometry"]["limits"]
    ours_drawn = (nib.load(project.folder / "own/sample_000030.nii.gz").get_fdata() - low) / (high - low)
    np.testing.assert_allclose(drawn_by_others, ours_drawn, atol=1e-4)


def test_a_case_without_regions_and_a_network_without_them(project, tmp_path):
    other = Project(
        tmp_path / "run", make_data(tmp_path / "data"), config=json.loads(json.dumps(project.config))
    )
    other.model_dir.mkdir()
    (other.model_dir / "autoencoder.pt").write_bytes((project.model_dir / "autoencoder.pt").read_bytes())
    plain = ["--no-amp", "--set", "diffusion_train.latent_cache=false"]
    assert "scan_0: top_region_index: missing" in other.refused(train_diffusion, *plain)
    other.change(diffusion_def=CONFIG["diffusion_def"])
    assert "conditions.region: the network takes no top_region_index" in other.refused(
        train_diffusion, *plain
    )
    other.change(diffusion_def=project.config["diffusion_def"], conditions={})
    assert "the network needs spacing_tensor" in other.refused(train_diffusion, *plain)


# ---------------------------------------------------------------- modalities


def test_codes_and_their_two_step_dropout():
    """A tenth becomes the generic code, and then a tenth of all 0."""
    section = configs.completed({"conditions": {"modality": True}})["conditions"]
    config = {"conditions": section, "spatial_dims": 3, "diffusion_def": {"num_class_embeds": 128}}
    cases = [Case(name, (), covariates={"modality": name}) for name in ("mri_t1", "ct_contrast", "33")]
    conditions = Conditions.of_training(config, cases, None)
    assert [int(conditions.of(case)["class_labels"]) for case in cases] == [9, 3, 33]
    generator = torch.Generator().manual_seed(0)
    drawn = [[int(conditions.draw(case, generator)["class_labels"]) for _ in range(3000)] for case in cases]
    for codes, own, generic in zip(drawn, (9, 3, 33), (8, 1, 8), strict=True):
        shares = [codes.count(code) / 3000 for code in (own, generic, 0)]
        assert np.allclose(shares, [0.81, 0.09, 0.1], atol=0.03) and sum(shares) == pytest.approx(1)
    assert conditions.unknown(2)["class_labels"].tolist() == [0, 0] and conditions.can_drop
    assert conditions.parse(["modality=mri_t1"]) == {"modality": "mri_t1"}
    with pytest.raises(UserError, match="trained on unknown, ct, ct_contrast, mri, mri_t1, 33"):
        conditions.parse(["modality=mri_t2"])
    assert "modality 33 (1), ct_contrast (1), mri_t1 (1)" in conditions.summary(cases)
    with pytest.raises(UserError, match="modality=pet: expected a whole number, or one of unknown"):
        conditions.parse(["modality=pet"])
    with pytest.raises(UserError, match="expected more than 33"):
        Conditions.of_training(config | {"diffusion_def": {"num_class_embeds": 33}}, cases, None)
    with pytest.raises(UserError, match="d: modality: missing"):
        Conditions.of_training(config, [Case("d", ())], None)
