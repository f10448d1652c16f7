"""Conditions: classes from participants.tsv, their dropout, guidance, and samples that follow them."""

import contextlib
import copy
import io
import json
import sys

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, Project, copy_of
from monai.bundle import ConfigParser

import cache_latents
import export_model
import inference
import train_autoencoder
import train_diffusion
from ldm import UserError, configs
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset, stream
from ldm.data.layouts import find_cases
from ldm.data.posteriors import Posteriors
from ldm.data.preprocessing import Preprocessing
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.guidance import guided
from ldm.diffusion.sources import check_sources
from ldm.system.ranks import Run
from ldm.training.latents import WithNoise
from ldm.training.memory import Meter

SIDE, CLASSES = 8, ["0", "1", "0", "1", "0", "1", "n/a", "1"]
NETWORKS = ("autoencoder.pt", "diffusion_unet.pt", "diffusion_unet_last.pt", "split.json")


def case(name: str, **covariates) -> Case:
    return Case(name, (), subject=name, covariates=covariates)


def config_of(
    column: str | None = "group",
    classes: int | None = 3,
    dropout: float = 0.1,
    mean_latent: bool = False,
    **more,
) -> dict:
    definition = {"in_channels": 2, "out_channels": 2, **({"num_class_embeds": classes} if classes else {})}
    section = {"class_labels": column, "dropout": dropout, "mean_latent": mean_latent}
    return configs.completed({"conditions": section}) | {"diffusion_def": {**definition, **more}}


# ---------------------------------------------------------------- classes


def test_classes_are_the_sorted_values_and_unknown_is_the_last():
    cases = [
        case("a", group="b"),
        case("b", group="a"),
        case("c", group="n/a"),
        case("d"),
        case("e", group=""),
    ]
    conditions = Conditions.of_training(config_of(), cases, None)
    assert conditions.values == ["a", "b"]
    assert [int(conditions.of(one)["class_labels"]) for one in cases] == [1, 0, 2, 2, 2]
    assert conditions.of(cases[0])["class_labels"].dtype == torch.int64
    assert conditions.unknown(2)["class_labels"].tolist() == [2, 2]
    assert conditions.cond([conditions.parse(["group=b"])] * 3)["class_labels"].tolist() == [1, 1, 1]
    assert "a (1), b (1), unknown (3)" in conditions.summary(cases)
    again = Conditions.from_checkpoint(json.loads(json.dumps(conditions.state())), config_of())
    assert again == conditions


def test_numbers_of_a_json_list_are_values_too():
    conditions = Conditions.of_training(config_of(), [case("a", group=1), case("b", group=0)], None)
    assert conditions.values == ["0", "1"] and conditions.parse(["group=1"]) == {"group": "1"}


def test_an_unconditioned_model_has_no_cond():
    conditions = Conditions.of_training(config_of(None, None), [case("a", group=1)], None)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert not conditions and conditions.of(case("a")) == conditions.unknown(2) == {}
    assert conditions.draw(case("a", group=1), generator) == {}
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "texts, told",
    [
        (["group=3"], "expected one of 0, 1"),
        (["group=n/a"], "expected one of 0, 1"),
        (["site=1"], "expected one group=VALUE"),
        (["group"], "expected one group=VALUE"),
        (["group=0", "group=1"], "expected one group=VALUE"),
    ],
)
def test_a_condition_that_the_model_does_not_know(texts, told):
    with pytest.raises(UserError, match=told):
        Conditions("group", ["0", "1"]).parse(texts)


@pytest.mark.parametrize(
    "cases, classes, told",
    [
        ([case("a", group=0), case("b", group=1)], 2, "num_class_embeds: expected 3, found 2"),
        ([case("a", age=3), case("b")], 3, r"no case has a value of group \(found age\)"),
        ([case("a"), case("b")], 3, "no participants.tsv was found"),
        ([case("a", group=[1, 2])], 3, "a: group is .1, 2.. Expected a text or a number"),
    ],
)
def test_columns_that_do_not_fit(cases, classes, told):
    with pytest.raises(UserError, match=told):
        Conditions.of_training(config_of(classes=classes), cases, None)


def test_a_value_that_came_after_the_training_began():
    with pytest.raises(UserError, match="b: its group is 2, which the model was not trained with"):
        Conditions("group", ["0", "1"]).of(case("b", group=2))


@pytest.mark.parametrize(
    "config, told",
    [
        (config_of(classes=None), "conditions.class_labels: the network takes no classes"),
        (config_of(None), "needs class_labels, which the config does not give: name a column"),
        (config_of(None, None, with_conditioning=True, cross_attention_dim=4), "needs context"),
        (config_of(include_spacing_input=True), "needs spacing_tensor"),
        (
            config_of(None, None, in_channels=4),
            "needs channels, .* does not give: set conditions.mean_latent",
        ),
        (config_of(mean_latent=True), "in_channels: expected 4, found 2"),
    ],
)
def test_a_network_without_its_condition(config, told):
    with pytest.raises(UserError, match=told):
        check_sources(config)


# ---------------------------------------------------------------- where covariates come from


def test_a_table_beside_any_layout(tmp_path, write_image):
    folder = tmp_path / "parent" / "task"
    voxels = np.ones((2, 2, 2), np.float32)
    for name in ("one", "two"):
        write_image(folder / "imagesTr" / f"{name}.nii.gz", voxels)
    entries = [{"image": "imagesTr/one.nii.gz", "age": 3}, {"image": "imagesTr/two.nii.gz", "group": 7}]
    (folder / "participants.tsv").write_text("participant_id\tgroup\none\t1\ntwo\t0\n")

    def groups(source) -> list:
        return [one.covariates.get("group") for one in find_cases(source)[0]]

    (folder / "list.json").write_text(json.dumps({"training": entries}))
    assert groups(folder / "list.json") == ["1", 7]  # the list's own entries win
    assert groups(folder) == ["1", "0"]  # as a plain folder
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    assert groups(folder) == groups(folder.parent) == ["1", 7]
    assert find_cases(folder)[0][0].covariates["age"] == 3


# ---------------------------------------------------------------- dropout


def dataset(dropout: float, column: str | None = "group") -> WithNoise:
    cases = [case(f"case {i}", group=str(i % 2)) for i in range(40)]
    conditions = Conditions(column, ["0", "1"], dropout)
    return WithNoise(Posteriors(cases, torch.zeros(40, 1, 2, 1, 1, 1, 1), 0), (1, 1, 1, 1), 5, conditions)


def labels(data: WithNoise, epoch: int) -> list[int]:
    return [int(data[epoch, i]["cond"]["class_labels"]) for i in range(len(data))]


def test_dropout_is_a_share_and_a_function_of_seed_epoch_and_case():
    data = dataset(0.25)
    found = [labels(data, epoch) for epoch in range(25)]
    flat = np.array(found)
    assert abs((flat == 2).mean() - 0.25) < 0.05  # of 1000, standard deviation 0.014
    assert all(label in (i % 2, 2) for one in found for i, label in enumerate(one))
    assert found[0] == labels(dataset(0.25), 0) and found[0] != found[1]
    assert labels(dataset(0.0), 0) == [i % 2 for i in range(40)] and set(labels(dataset(1.0), 0)) == {2}


def test_conditions_change_no_other_draw():
    plain, conditioned = dataset(0.25, None)[3, 7], dataset(0.25)[3, 7]
    assert plain["cond"] == {}
    for key in ("posterior_noise", "noise", "uniform"):
        assert torch.equal(plain[key], conditioned[key])
    generator = stream(5, "diffusion", 3, "case 7")
    assert torch.equal(plain["posterior_noise"], torch.randn(1, 1, 1, 1, generator=generator))


# ---------------------------------------------------------------- the mean latent


def test_the_mean_latent_is_an_input_whatever_the_class():
    mean = torch.arange(2.0).reshape(2, 1, 1, 1)
    conditions = Conditions("group", ["0", "1"], 1.0).of_latents(mean.shape, mean)
    generator = torch.Generator().manual_seed(0)
    for one in (conditions.of(case("a", group=1)), conditions.draw(case("a", group=1), generator)):
        assert torch.equal(one["channels"], mean)
    for cond in (conditions.unknown(3), conditions.cond([{"group": "1"}] * 3)):
        assert torch.equal(cond["channels"], torch.stack([mean] * 3))

    def unet(x, timesteps, class_labels):
        assert torch.equal(x[:, 2:], torch.stack([mean] * 3))
        return x[:, :2]

    model = conditions.guided_model(unet, [{"group": "1"}] * 3, 2.0, torch.device("cpu"))
    z = torch.randn(3, 2, 1, 1, 1)
    torch.testing.assert_close(model(z, torch.zeros(3)), z)


def test_positions_are_inputs_from_one_end_to_the_other():
    conditions = Conditions(position=(2, 0)).of_latents((4, 3, 2, 5), None)
    channels = conditions.unknown(2)["channels"]
    assert channels.shape == (2, 2, 3, 2, 5)
    torch.testing.assert_close(channels[1, 0, 2, 1], torch.linspace(-1, 1, 5))
    torch.testing.assert_close(channels[0, 1, :, 0, 3], torch.tensor([-1.0, 0, 1]))
    assert conditions.describe() == "the position along axes 2, 0"
    mean = torch.ones(4, 3, 2, 5)
    both = conditions.of_latents(mean.shape, mean).unknown(1)["channels"]
    assert torch.equal(both[0, :4], mean) and torch.equal(both[:, 4:], channels[:1])


def test_the_network_is_told_what_the_augmentation_did(write_image, tmp_path):
    """1 for a mirrored volume, the share of the largest shift for a shifted one; 0 in samples."""
    voxels = np.zeros((8, 8, 8), np.float32)
    voxels[1:3, 2:4, 2:4] = 1
    path = write_image(tmp_path / "scan.nii.gz", voxels)
    augment = {"flip_axes": [0], "flip_prob": 0.5, "translate_voxels": 3, "affine_prob": 1.0}
    augment |= {"rotate_degrees": 0, "scale": 0}
    preprocessing = Preprocessing((0,), (1, 1, 1))
    volumes = VolumeDataset([Case("scan", (path,))], preprocessing, (8, 8, 8), augment=augment, seed=3)
    conditions = Conditions(told=4).of_latents((1, 8, 8, 8), None)
    data = WithNoise(volumes, (1, 8, 8, 8), 3, conditions, augment)
    told = []
    for epoch in range(24):
        item = data[epoch, 0]
        parameters = item["cond"]["channels"][:, 0, 0, 0]
        assert torch.equal(item["cond"]["channels"], parameters[:, None, None, None].expand(4, 8, 8, 8))
        mirrored, *shift = parameters.tolist()
        centre = np.array([5.5 if mirrored else 1.5, 2.5, 2.5]) - 3 * np.array(shift)
        image = item["image"][0].numpy()
        found = [(image.sum((*{0, 1, 2} - {axis},)) * np.arange(8)).sum() / image.sum() for axis in range(3)]
        if (centre > 1).all() and (centre < 6).all():  # nothing was shifted out
            np.testing.assert_allclose(found, centre, atol=1e-4)
            told.append(mirrored)
    assert {0.0, 1.0} == set(told)
    assert not conditions.unknown(2)["channels"].any() and not conditions.of(case("a"))["channels"].any()
    assert conditions.describe() == "the parameters of the augmentation, none in samples"


def test_it_is_the_mean_over_the_training_set_scaled_as_the_latents(done):
    """Of the checkpoint, against the latents encoded one by one."""
    checkpoint = done.checkpoint("diffusion_unet.pt")
    autoencoder = done.network("autoencoder_def", done.checkpoint("autoencoder.pt")["model"])
    names = json.loads((done.model_dir / "split.json").read_text())["training"]
    with torch.no_grad():
        scans = [
            nib.load(done.data / f"imagesTr/{name}.nii.gz").get_fdata(dtype=np.float32) for name in names
        ]
        means = [autoencoder.encode(torch.from_numpy(one)[None, None])[0][0] for one in scans]
    expected = torch.stack(means).mean(0) * checkpoint["scale_factor"]
    torch.testing.assert_close(checkpoint["mean_latent"], expected, atol=1e-5, rtol=1e-4)


def test_a_mean_latent_of_another_size(model):
    changed = model.checkpoint("diffusion_unet.pt")
    torch.save({**changed, "mean_latent": changed["mean_latent"][:, 1:]}, model.folder / "changed.pt")
    message = model.refused(inference, "--unet", model.folder / "changed.pt")
    assert "changed.pt: its mean latent is [3, 3, 4, 4], its latents are [3, 4, 4, 4]" in message


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("guidance, expected", [(0, 10.0), (1, 14.0), (2, 18.0), (0.5, 12.0), (-1, 6.0)])
def test_guidance_by_hand(guidance, expected):
    """The network gives x + t + 2 labels; of 3 and of 1: c = 14, u = 10, u + w (c - u)."""
    calls = []

    def unet(x, timesteps, class_labels):
        calls.append(int(class_labels))
        return x + timesteps + 2 * class_labels

    cond, unknown = ({"class_labels": torch.tensor([n])} for n in (3, 1))
    model = guided(unet, cond, unknown, guidance)
    assert model(torch.tensor([5.0]), torch.tensor([3.0])).item() == expected
    assert calls == ([3] if guidance == 1 else [3, 1])


# ---------------------------------------------------------------- the whole way


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Project:
    """A model of two classes, dark and bright, and an unknown one, with the mean latent. Look, but do not
    touch."""
    folder = tmp_path_factory.mktemp("classes")
    rng, data = np.random.default_rng(0), folder / "data"
    (data / "imagesTr").mkdir(parents=True)
    ball = sum(axis**2 for axis in np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3)) < 1.2
    table = ["participant_id\tage\tgroup"]
    for i, group in enumerate(CLASSES):
        voxels = ball * (0.9 if group == "1" else 0.3) + 0.02 * rng.random([SIDE] * 3)
        image = nib.Nifti1Image(voxels.astype(np.float32), np.eye(4))
        nib.save(image, data / "imagesTr" / f"scan_{i}.nii.gz")
        table.append(f"scan_{i}\t{30 + i}\t{group}")
    listed = [{"image": f"./imagesTr/scan_{i}.nii.gz"} for i in range(len(CLASSES))]
    (data / "dataset.json").write_text(json.dumps({"training": listed}))
    (data / "participants.tsv").write_text("\n".join(table) + "\n")

    config = copy.deepcopy(CONFIG)
    config |= {"spacing": [1, 1, 1], "intensity": {"window": [0, 1]}}
    config["conditions"] = {"class_labels": "group", "mean_latent": True}
    config["data"]["val_fraction"] = 0.25
    config["autoencoder_train"] |= {"max_epochs": 40, "val_interval": 40, "adversarial_weight": 0, "lr": 5e-3}
    config["diffusion_def"] |= {"in_channels": 6, "num_class_embeds": 3, "attention_levels": [False, False]}
    config["diffusion_def"].pop("num_head_channels")
    config["diffusion_train"] |= {"max_epochs": 60, "val_interval": 30, "lr": 5e-3, "sample_interval": 60}
    config["diffusion_train"] |= {"optimizer": "muon", "snapshot": 0.5}
    project = Project(folder, data, config)
    for script in (train_autoencoder, train_diffusion):
        project.printed[script.__name__] = project.run(script, "--no-amp")
    return project


@pytest.fixture
def model(done, tmp_path) -> Project:
    """The trained networks, and nothing drawn from them."""
    return copy_of(done, tmp_path / "model", *NETWORKS)


def drawn(project: Project, folder: str, *more: str) -> list[np.ndarray]:
    project.output_dir = project.folder / folder
    project.set_environment(output_dir=str(project.output_dir))
    project.printed[folder] = project.run(inference, "--steps", "6", *more)
    return [nib.load(path).get_fdata() for path in sorted(project.output_dir.glob("*.nii.gz"))]


def test_training_says_what_it_is_conditioned_on(done):
    assert "classes by group, with their cases: 0 (3), 1 (4), unknown (1)" in done.printed["train_diffusion"]
    assert done.checkpoint("diffusion_unet.pt")["conditions"] == {
        "class_labels": {"column": "group", "values": ["0", "1"]}
    }
    assert list((done.model_dir / "samples").glob("epoch_*.png"))


def test_samples_follow_their_condition(model):
    dark, bright = (drawn(model, value, "--num", "3", "--condition", f"group={value}") for value in "01")
    assert np.mean(bright) > 1.5 * np.mean(dark)
    assert "no --condition" not in model.printed["0"]
    strong = drawn(model, "strong", "--num", "3", "--condition", "group=1", "--guidance", "2")
    assert np.mean(strong) > np.mean(bright)
    (unknown,) = drawn(model, "unknown")
    assert "no --condition, so group is unknown (it may be 0, 1)" in model.printed["unknown"]
    record = json.loads((model.output_dir / "sample_000000.json").read_text())
    assert not {"condition", "guidance"} & record.keys()
    (none,) = drawn(model, "none", "--condition", "group=1", "--guidance", "0")
    np.testing.assert_allclose(none, unknown, atol=1e-4)


def test_a_sample_by_hand(model):
    """Euler's steps on u + 2 (c - u)."""
    (volume,) = drawn(model, "hand", "--condition", "group=1", "--guidance", "2", "--sampler", "euler")
    checkpoint = model.checkpoint("diffusion_unet.pt")
    unet = model.network("diffusion_def", checkpoint["model"])
    z = torch.randn(checkpoint["latent_shape"], generator=torch.Generator().manual_seed(0))[None]
    mean = checkpoint["mean_latent"][None]
    with torch.no_grad():
        for i in range(6):
            t = torch.tensor([1000 * (1 - i / 6)])
            c, u = (
                unet(torch.cat([z, mean], 1), timesteps=t, class_labels=torch.tensor([n])) for n in (1, 2)
            )
            z = z + (2 * c - u) / 6
        autoencoder = model.network("autoencoder_def", model.checkpoint("autoencoder.pt")["model"])
        expected = autoencoder.decode(z / checkpoint["scale_factor"])[0, 0].numpy()
    np.testing.assert_allclose(volume, expected, atol=1e-4)


def test_a_guided_sample_by_hand(model):
    """Euler's steps on g + 2 (d - g), of the network and the snapshot in its file; and from its record."""
    (volume,) = drawn(model, "guided", "--autoguidance", "2", "--sampler", "euler")
    checkpoint = model.checkpoint("diffusion_unet.pt")
    unet, guide = (model.network("diffusion_def", checkpoint[key]) for key in ("model", "guide"))
    z = torch.randn(checkpoint["latent_shape"], generator=torch.Generator().manual_seed(0))[None]
    mean, unknown = checkpoint["mean_latent"][None], torch.tensor([2])
    with torch.no_grad():
        for i in range(6):
            t = torch.tensor([1000 * (1 - i / 6)])
            inputs = torch.cat([z, mean], 1)
            d, g = (net(inputs, timesteps=t, class_labels=unknown) for net in (unet, guide))
            z = z + (2 * d - g) / 6
        autoencoder = model.network("autoencoder_def", model.checkpoint("autoencoder.pt")["model"])
        expected = autoencoder.decode(z / checkpoint["scale_factor"])[0, 0].numpy()
    np.testing.assert_allclose(volume, expected, atol=1e-4)
    assert not chain.differences(checkpoint["model"], unet.state_dict())
    assert chain.differences(checkpoint["model"], checkpoint["guide"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inference.main(["--reproduce", str(model.output_dir / "sample_000000.json")])
    assert "byte-identical" in out.getvalue()
    assert "another config" in model.refused(inference, "--steps", "6", "--sampler", "euler")


def test_autoguidance_without_a_snapshot(model):
    changed = {**model.checkpoint("diffusion_unet.pt"), "guide": None}
    torch.save(changed, model.folder / "none.pt")
    message = model.refused(inference, "--autoguidance", "2", "--unet", model.folder / "none.pt")
    assert "none.pt: holds no early snapshot, as diffusion_train.autoguidance 2 needs" in message
    assert "--autoguidance -1.0: expected" in model.refused(inference, "--autoguidance", "-1")
    asked = ("--set", "diffusion_train.autoguidance=2", "--set", "diffusion_train.snapshot=null")
    message = model.refused(train_diffusion, "--no-amp", *asked)
    assert "diffusion_train.autoguidance: needs a guide. Set diffusion_train.snapshot" in message


def test_a_record_holds_the_condition_and_reproduces(model):
    drawn(model, "records", "--condition", "group=1", "--guidance", "1.5")
    path = model.output_dir / "sample_000000.json"
    record = json.loads(path.read_text())
    assert record["condition"] == {"group": "1"} and record["guidance"] == 1.5
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inference.main(["--reproduce", str(path)])
    assert "byte-identical" in out.getvalue()
    asked = ("--steps", "6", "--condition", "group=1", "--guidance")
    assert "1 of 1 volumes already exist" in model.run(inference, *asked, "1.5")
    assert "guidance 1.5, now 2.0" in model.refused(inference, *asked, "2")
    message = model.refused(inference, "--steps", "6", "--condition", "group=0")
    assert "condition {'group': '1'}, now {'group': '0'}" in message
    assert "condition {'group': '1'}, now None" in model.refused(inference, "--steps", "6")


@pytest.mark.parametrize(
    "options, told",
    [
        (("--condition", "group=7"), "expected one of 0, 1"),
        (("--condition", "age=30"), "expected one group=VALUE"),
        (("--guidance", "2"), "--guidance: strengthens a condition"),
        (("--condition", "group=1", "--guidance", "nan"), "--guidance nan"),
        (("--condition", "group=1", "--guidance", "-1"), "--guidance -1.0"),
    ],
)
def test_wrong_conditions_on_the_command_line(model, options, told):
    assert told in model.refused(inference, *options)
    assert not model.output_dir.exists()


def test_a_condition_for_an_unconditioned_model(tmp_path_factory, tmp_path):
    other = chain.trained(tmp_path_factory.getbasetemp())
    project = copy_of(other, tmp_path / "other", "autoencoder.pt", "diffusion_unet.pt")
    assert "this model is unconditioned" in project.refused(inference, "--condition", "group=1")


def test_bare_weights_do_not_say_what_their_classes_mean(model):
    model.change(diffusion_train={**model.config["diffusion_train"], "patch_size": [SIDE] * 3})
    torch.save(model.checkpoint("diffusion_unet.pt")["model"], model.folder / "bare.pt")
    model.set_environment(output_dir=str(model.folder / "none"))
    message = model.refused(inference, "--unet", model.folder / "bare.pt", "--scale-factor", "1")
    assert "bare.pt: its network needs channels, class_labels, of which the file says nothing" in message


def test_a_config_of_another_column_is_refused(model):
    message = model.refused(inference, "--set", "conditions.class_labels=age")
    assert "was trained with conditions.class_labels" in message
    assert "conditions.class_labels" in model.refused(
        train_diffusion, "--no-amp", "--set", "conditions.class_labels=age"
    )


def test_a_training_resumes_bit_exactly_and_from_the_cache_is_the_same(done, tmp_path):
    """Four epochs at once; two and two; and four from cached latents, without an image."""

    def trained(name: str, *epochs: int, **section) -> dict:
        project = copy_of(done, tmp_path / name, "autoencoder.pt", "split.json")
        project.change(diffusion_train={**project.config["diffusion_train"], "sample_interval": 0, **section})
        if section.get("latent_cache"):
            project.run(cache_latents)
            project.set_environment(data_base_dir=str(tmp_path / "gone"))
        for count in epochs:
            project.run(train_diffusion, "--no-amp", "--set", f"diffusion_train.max_epochs={count}")
        return project.checkpoint("diffusion_unet_last.pt")

    constant = {"lr_schedule": "constant"}
    whole = trained("whole", 4, **constant)
    halves = trained("halves", 2, 4, **constant)
    assert not chain.differences(whole["model"], halves["model"])
    assert not chain.differences(whole["stepper"], halves["stepper"])
    cached = trained("cached", 4, latent_cache=True, **constant)
    assert not chain.differences(cached["model"], whole["model"])
    assert cached["conditions"] == whole["conditions"]
    assert torch.equal(cached["mean_latent"], whole["mean_latent"])


def test_a_cache_of_other_groups_is_refused(done, tmp_path):
    project = copy_of(done, tmp_path / "cached", "autoencoder.pt", "split.json")
    project.change(diffusion_train={**project.config["diffusion_train"], "latent_cache": True})
    project.run(cache_latents)
    copied = tmp_path / "data"
    (copied / "imagesTr").mkdir(parents=True)
    for path in done.data.rglob("*.*"):
        (copied / path.relative_to(done.data)).write_bytes(path.read_bytes())
    table = (copied / "participants.tsv").read_text()
    (copied / "participants.tsv").write_text(table.replace("\t31\t1", "\t31\t0"))
    project.set_environment(data_base_dir=str(copied))
    message = project.refused(train_diffusion, "--no-amp")
    assert "1 case changed: scan_1" in message and "cache_latents.py again" in message


def test_a_dry_run_counts_both_passes_of_guidance():
    config = copy.deepcopy(CONFIG) | {"latent_channels": 3}
    for key in ("autoencoder_def", "diffusion_def"):
        config[key] |= {"in_channels": 1 if key == "autoencoder_def" else 3}
        config[key]["out_channels"] = config[key]["in_channels"]
    config["autoencoder_def"]["latent_channels"] = 3
    config["diffusion_def"]["num_class_embeds"] = 3
    config["diffusion_train"] = {"autoguidance": 1.0}
    run, peaks = Run(0, 1, torch.device("cpu")), []
    for guidance in (1.0, 2.0):
        meter = Meter(like_gpu=True)
        inference.rehearse(config, [16, 16, 16], 2, meter, run, guidance)
        peaks.append(meter.peaks["sampling"].total)
    assert peaks[0] < peaks[1] < 1.2 * peaks[0]  # the prediction under the condition is kept meanwhile


# ---------------------------------------------------------------- exports


def test_every_export_takes_the_condition(model, monkeypatch):
    model.change(diffusion_train={**model.config["diffusion_train"], "autoguidance": 2})
    out, files = model.folder / "out", ["-c", str(model.config_file), "-e", str(model.environment_file)]
    with contextlib.redirect_stdout(io.StringIO()):
        export_model.main([*files, "--out", str(out)])
    (expected,) = drawn(model, "plain", "--condition", "group=1", "--guidance", "2")

    files = {
        key: out / f"safetensors/{name}.safetensors"
        for key, name in (("--autoencoder", "autoencoder"), ("--unet", "diffusion_unet"))
    }
    given = [str(word) for pair in files.items() for word in pair]
    (volume,) = drawn(model, "safetensors", "--condition", "group=1", "--guidance", "2", *given)
    np.testing.assert_array_equal(volume, expected)

    monkeypatch.chdir(out / "bundle")
    monkeypatch.syspath_prepend(str(out / "bundle"))
    content = json.loads((out / "bundle/configs/inference.json").read_text())
    content |= {"condition": "group=1", "guidance": 2, "steps": 6, "output_dir": str(out / "samples")}
    with contextlib.redirect_stdout(io.StringIO()):
        ConfigParser(content).get_parsed_content("run")
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]  # another test's bundle has one of its own
    volume = nib.load(out / "samples" / "sample_000000.nii.gz").get_fdata()
    np.testing.assert_allclose(volume, expected, atol=1e-4)
    metadata = json.loads((out / "bundle/configs/metadata.json").read_text())
    assert "1: 1" in str(metadata["network_data_format"]["inputs"]["class_labels"]["channel_def"])

    unet = torch.jit.load(out / "torchscript/unet.ts")
    checkpoint = model.checkpoint("diffusion_unet.pt")
    own, guide = (model.network("diffusion_def", checkpoint[key]) for key in ("model", "guide"))
    z, t, label = torch.randn(1, 3, 4, 4, 4), torch.tensor([500.0]), torch.tensor([1])
    inputs = torch.cat([z, checkpoint["mean_latent"][None]], 1)
    with torch.no_grad():
        d, g = (net(inputs, timesteps=t, class_labels=label) for net in (own, guide))
        torch.testing.assert_close(unet(z, t, label), 2 * d - g)
    card = (out / "MODEL_CARD.md").read_text()
    assert "Conditions: `group`, one of 0, 1; or unknown; and the mean latent of the training set" in card
    code = next(one for one in card.split("```python\n") if "torch.jit.load" in one).partition("```")[0]
    monkeypatch.chdir(out)
    exec(code, {})
    assert "--condition group=VALUE" in card and (out / "sample.nii.gz").is_file()
