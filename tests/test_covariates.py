"""Covariates: numbers and categories of participants.tsv, from the table to samples that follow them."""

import copy
import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, ROOT, Project

import edit_scan
import evaluate
import export_model
import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.data.cases import Case
from ldm.data.datasets import stream
from ldm.data.posteriors import Posteriors
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.covariates import Covariates
from ldm.diffusion.guidance import guided
from ldm.diffusion.inversion import invert, inverting_sampler
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sources import check_sources
from ldm.evaluation.asked import Structure, known_values, line
from ldm.models.definitions import NETWORKS, instantiate
from ldm.models.denoiser import example_cond, predict
from ldm.models.embedding import encoded_size
from ldm.system.ranks import Run
from ldm.training.latents import Latents

COLUMNS = {"age": [20.0, 60.0], "sex": ["f", "m"]}
SIDE, AGES = 8, [20, 60, 20, 60, 40, 40, "n/a", 50]


def covariates(**more) -> Covariates:
    return Covariates(COLUMNS, rows=[[20.0, "f"], [60.0, None]], **more)


def case(name: str, **values) -> Case:
    return Case(name, (), subject=name, covariates=values)


def config_of(columns: dict, into: tuple = ("embedding",), **definition) -> dict:
    """A config as `check_config` gives it, with the keys that conditions use."""
    defaults = configs.completed({"conditions": {"covariates": columns, "into": list(into)}})
    return defaults | {"diffusion_def": {"in_channels": 2, "out_channels": 2, **definition}}


# ---------------------------------------------------------------- the encoding


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"age": 30.0, "sex": "m"}, [0.25, 0, 0, 1, 0]),
        ({"age": 100.0, "sex": None}, [2.0, 0, 0, 0, 1]),
        ({"sex": "f"}, [0, 1, 1, 0, 0]),
        ({}, [0, 1, 0, 0, 1]),
    ],
)
def test_encoding_by_hand(values, expected):
    found = covariates()
    assert found.encode(values).tolist() == expected
    assert found.size == encoded_size(COLUMNS, True) == len(found.names_of_inputs()) == 5
    assert encoded_size({"age": "number", "sex": ["f", "m"]}, False) == 3


def test_a_model_without_inputs_for_unknown():
    found = covariates(unknown=False)
    assert found.encode({"age": 30.0, "sex": "m"}).tolist() == [0.25, 0, 1]
    with pytest.raises(UserError, match="sex: this model needs a value"):
        found.encode({"age": 30.0})
    with pytest.raises(UserError, match="expected a number"):
        found.parse("age", "unknown")


def test_values_on_the_command_line():
    conditions = Conditions(covariates=covariates())
    given = conditions.parse(["age=20:30.5", "sex=unknown"])
    assert given == {"age": (20.0, 30.5), "sex": None} and conditions.parse(["age=7"]) == {"age": 7.0}
    assert covariates().outside(given) == []
    assert covariates().outside({"age": 70.0, "sex": "f"}) == covariates().outside({"age": (10.0, 30.0)})
    for text, message in (
        ("age=old", "expected a number, or a range such as 20:60"),
        ("age=30:20", "expected a number, or a range"),
        ("age=nan", "expected a number"),
        ("sex=x", "expected one of f, m"),
        ("weight=70", "expected one age=VALUE or sex=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            conditions.parse([text])


def test_what_a_sample_is_not_given_is_that_of_a_training_volume():
    found, seen = covariates(), set()
    for seed in range(200):
        one = found.complete({}, stream(seed, "conditions"))
        assert one == found.complete({}, stream(seed, "conditions"))
        seen.add((one["age"], one["sex"]))
        both = found.complete({"age": (30.0, 40.0)}, stream(seed, "conditions"))
        assert 30 <= both["age"] <= 40 and both["sex"] == one["sex"]
    assert seen == {(20.0, "f"), (60.0, None)}
    draws = [found.complete({"age": (30.0, 40.0)}, stream(seed, "conditions"))["age"] for seed in range(400)]
    assert abs(np.mean(draws) - 35) < 0.5  # standard deviation 0.14
    with pytest.raises(UserError, match="sex: the weights do not say what they were trained on"):
        Covariates(COLUMNS).complete({"age": 30.0}, stream(0))


# ---------------------------------------------------------------- training's values


def test_ranges_are_those_of_the_training_cases():
    cases = [case("a", age=31, sex="m"), case("b", age="55.5"), case("c", age="n/a", sex="f")]
    config = config_of({"age": "number", "sex": ["f", "m"]})
    conditions = Conditions.of_training(config, [*cases, case("held out", age=80, sex="f")], None, cases)
    assert conditions.covariates.columns == {"age": [31.0, 55.5], "sex": ["f", "m"]}
    assert sorted(conditions.covariates.rows, key=str) == [[31.0, "m"], [55.5, None], [None, "f"]]
    assert conditions.of(cases[1])["class_labels"].tolist() == [1, 0, 0, 0, 1]
    assert conditions.of(case("held out", age=80))["class_labels"].tolist() == [2, 0, 0, 0, 1]
    assert (
        conditions.summary(cases)
        == "conditions: age 31 to 55.5, unknown of 1; sex f (1), m (1), unknown of 1"
    )
    again = Conditions.from_checkpoint(json.loads(json.dumps(conditions.state())), config)
    assert again == conditions


@pytest.mark.parametrize(
    "columns, values, message",
    [
        ({"age": "number"}, {"age": "old"}, "age is old, expected a number"),
        ({"sex": ["f", "m"]}, {"sex": "x"}, "b: its sex is x, expected one of f, m"),
        ({"weight": "number"}, {"age": 3}, r"no training case has a value of weight \(found age, sex\)"),
        ({"age": "number"}, {"age": 31}, "age is 31 in every training case"),
    ],
)
def test_values_that_do_not_fit(columns, values, message):
    cases = [case("a", age=31, sex="f"), case("b", **values)]
    with pytest.raises(UserError, match=message):
        Conditions.of_training(config_of(columns), cases, None, cases)


def test_weights_from_elsewhere_need_a_range():
    with pytest.raises(UserError, match=r"covariates.age: the weights do not say its range"):
        Conditions.from_checkpoint({}, config_of({"age": "number"}))
    conditions = Conditions.from_checkpoint({}, config_of(COLUMNS))
    assert conditions.covariates == Covariates(COLUMNS, ["embedding"], rows=[])


def test_dropping_makes_all_of_them_unknown():
    conditions = Conditions(covariates=covariates(), dropout=0.5)
    drawn = [
        conditions.draw(case("a", age=30, sex="m"), stream(i))["class_labels"].tolist() for i in range(200)
    ]
    assert {tuple(one) for one in drawn} == {(0.25, 0, 0, 1, 0), (0, 1, 0, 0, 1)}
    assert abs(drawn.count([0, 1, 0, 0, 1]) - 100) < 30  # standard deviation 7
    never = Conditions(covariates=covariates(unknown=False), dropout=0.99)
    assert never.draw(case("a", age=30, sex="m"), stream(0))["class_labels"].tolist() == [0.25, 0, 1]


# ---------------------------------------------------------------- into the network


def test_three_ways_into_a_network():
    into = ("embedding", "cross_attention", "channels")
    conditions = Conditions(covariates=covariates(into=into), position=(2,)).of_latents((2, 3, 4, 5), None)
    cond = conditions.cond([{"age": 30.0, "sex": "m"}, {}])
    vector = torch.tensor([[0.25, 0, 0, 1, 0], [0, 1, 0, 0, 1]])
    assert torch.equal(cond["class_labels"], vector) and torch.equal(cond["context"], vector[:, None])
    assert cond["channels"].shape == (2, 6, 3, 4, 5)
    assert torch.equal(cond["channels"][:, 1:], vector[..., None, None, None].expand(2, 5, 3, 4, 5))
    alone = Conditions(covariates=covariates()).cond([{}])
    assert alone.keys() == {"class_labels"}


def test_the_mean_latent_follows_the_covariates():
    """Latents that are linear in the covariates are regressed exactly, but for the ridge; what is unknown is
    at the mean, a category too."""
    rows = [[20.0, "f"], [30.0, "m"], [50.0, "f"], [60.0, "m"], [40.0, None]]
    known = Covariates({"age": [20, 60], "sex": ["f", "m"]}, ("mean_latent",), True, rows)
    assert known.centres.tolist() == pytest.approx([0.5, 0, 0.5, 0.5, 0])
    vectors = torch.stack([known.encode({"age": age, "sex": sex}) for age, sex in rows])
    found = known.deviations(vectors)
    assert found[0].tolist() == pytest.approx([-0.5, 0, 0.5, -0.5, 0])
    assert found[4].tolist() == pytest.approx([0, 0, 0, 0, 0])
    assert not known.deviations(known.encode({})[None]).any()

    base, slope = torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)
    z = [base + (age - 40) / 40 * slope + 0.5 * (-1) ** (sex == "m") * (sex is not None) for age, sex in rows]
    entries = torch.stack([torch.stack([one, torch.zeros_like(one)])[None] for one in z])
    cases = [Case(f"s{i}", ()) for i in range(5)]
    data = Latents(Posteriors(cases, entries, 0), None, None, "", [2, 3, 3, 3], {})
    run = Run(0, 1, torch.device("cpu"))
    mean = data.moments(run)[1]
    fitted = data.regression(mean, found.repeat(1, 1), run)
    conditions = Conditions(covariates=known, shape=(2, 3, 3, 3), mean_latent=fitted)
    expected = conditions.cond([{"age": 60.0, "sex": "m"}, {}, {"age": 20.0}])["channels"]
    torch.testing.assert_close(expected[1], mean)
    torch.testing.assert_close(expected[0], base + 0.5 * slope - 0.5, atol=0.25, rtol=0)
    assert (expected[2] - mean + 0.5 * slope).abs().max() < 0.35 * slope.abs().max()
    conditions.check_size((2, 3, 3, 3), "here")
    with pytest.raises(UserError, match="its mean latent is"):
        replace(conditions, mean_latent=mean).check_size((2, 3, 3, 3), "here")


def test_the_embedding_is_added_to_that_of_the_time():
    definition = CONFIG["diffusion_def"] | {"in_channels": 2, "out_channels": 2, "covariate_embed": 5}
    torch.manual_seed(0)
    network = instantiate(definition, NETWORKS, "diffusion_def").eval()
    torch.nn.init.normal_(network.out[-1].conv.weight)
    width = network.class_embedding[-1].out_features
    assert network.time_embed[-1].out_features == width == network.class_embedding[0].out_features
    assert example_cond(definition, 3, [4, 4, 4])["class_labels"].shape == (3, 5)
    x, vector = torch.randn(1, 2, 4, 4, 4), torch.rand(1, 5)
    with torch.no_grad():
        found = predict(network, x, torch.zeros(1), {"class_labels": vector})
        added = network.class_embedding(vector)[0]
        for parameter in network.class_embedding.parameters():
            parameter.zero_()
        network.time_embed[-1].bias += added
        torch.testing.assert_close(found, predict(network, x, torch.zeros(1), {"class_labels": vector}))


@pytest.mark.parametrize(
    "config, message",
    [
        (config_of(COLUMNS, ("channels",)), "in_channels: expected 7, found 2: .*5 of conditions.covariates"),
        (config_of(COLUMNS, ("cross_attention",)), "cross_attention_dim: expected 5.*found None"),
    ],
)
def test_a_network_without_place_for_them(config, message):
    with pytest.raises(UserError, match=message):
        check_sources(config)


@pytest.mark.parametrize(
    "definition, message",
    [
        ({"covariate_embed": 4}, "covariate_embed: expected 5, found 4"),
        ({"num_class_embeds": 2}, "num_class_embeds: covariates take its place"),
    ],
)
def test_an_embedding_that_does_not_fit(definition, message):
    config = copy.deepcopy(CONFIG) | {"conditions": {"covariates": COLUMNS}}
    config["diffusion_def"] |= definition
    with pytest.raises(UserError, match=message):
        configs.check_config(config, "config.json")


@pytest.mark.parametrize(
    "known, message", [([60, 20], r"expected \[low, high\]"), (["f", "unknown"], "'unknown' is no category")]
)
def test_columns_that_cannot_be(known, message):
    config = copy.deepcopy(CONFIG) | {"conditions": {"covariates": {"age": known}}}
    with pytest.raises(UserError, match=message):
        configs.check_config(config, "config.json")


def test_a_range_of_small_numbers_is_kept():
    found = Covariates({"v": [0.0, 1e-4]}, rows=[[0.0]])
    draws = {found.complete({"v": (1e-5, 5e-5)}, stream(seed))["v"] for seed in range(20)}
    assert len(draws) == 20 and 1e-5 <= min(draws) <= max(draws) <= 5e-5


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("time, expected", [(0.1, 4.0), (0.5, 7.0), (0.79, 7.0), (0.9, 4.0)])
def test_guidance_within_an_interval(time, expected):
    """c = 4, u = 1 and guidance 2, at times from 0.2 to 0.8."""

    def unet(x, timesteps, class_labels):
        return x + class_labels

    cond, unknown = ({"class_labels": torch.tensor([value])} for value in (4.0, 1.0))
    model = guided(unet, cond, unknown, 2.0, (0.2, 0.8))
    assert model(torch.zeros(1), torch.tensor([time])).item() == expected


# ---------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Project:
    """A model of balls that get brighter with age. Look, but do not touch."""
    folder = tmp_path_factory.mktemp("covariates")
    rng, data = np.random.default_rng(0), folder / "data"
    data.mkdir()
    ball = sum(axis**2 for axis in np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3)) < 1.2
    table = ["participant_id\tage\tsex"]
    for i, age in enumerate(AGES):
        brightness = 0.6 if age == "n/a" else age / 70
        voxels = ball * brightness + 0.02 * rng.random([SIDE] * 3)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), data / f"scan_{i}.nii.gz")
        table.append(f"scan_{i}\t{age}\t{'fm'[i % 2]}")
    (data / "participants.tsv").write_text("\n".join(table) + "\n")
    config = copy.deepcopy(CONFIG)
    config |= {"spacing": [1, 1, 1], "intensity": {"window": [0, 1]}}
    into = ["embedding", "cross_attention", "channels"]
    config["conditions"] = {"covariates": {"age": "number", "sex": ["f", "m"]}, "into": into}
    config["data"]["val_fraction"] = 0.25
    config["autoencoder_train"] |= {"max_epochs": 40, "val_interval": 40, "adversarial_weight": 0, "lr": 5e-3}
    config["diffusion_def"] |= {"in_channels": 8, "with_conditioning": True, "cross_attention_dim": 5}
    config["diffusion_train"] |= {"max_epochs": 80, "val_interval": 40, "lr": 5e-3, "sample_interval": 80}
    config["diffusion_train"] |= {"optimizer": "muon"}
    project = Project(folder, data, config)
    for script in (train_autoencoder, train_diffusion):
        project.printed[script.__name__] = project.run(script, "--no-amp")
    return project


def drawn(project: Project, where: str, *more: str) -> tuple[list, list, str]:
    """Volumes and records of samples, in a folder of their own, and what was printed."""
    project.set_environment(output_dir=str(project.folder / where))
    printed = project.run(inference, "--steps", "6", *more)
    files = sorted((project.folder / where).glob("*.nii.gz"))
    volumes = [nib.load(path).get_fdata(dtype=np.float32) for path in files]
    records = [
        json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text()) for path in files
    ]
    return volumes, records, printed


def test_training_says_what_it_conditions_on(done):
    printed = done.printed["train_diffusion"]
    assert "conditions: age 20 to 60" in printed and "unknown of 1" in printed
    saved = done.checkpoint("diffusion_unet.pt")["conditions"]["covariates"]
    assert saved["columns"]["sex"] == ["f", "m"] and len(saved["rows"]) == 6


def test_samples_follow_a_number(done):
    more = ("--num", "3", "--guidance", "3", "--condition")
    young, old = (drawn(done, f"age{age}", *more, f"age={age}")[0] for age in (20, 60))
    assert np.mean(old) > 1.2 * np.mean(young)


def test_a_sample_by_hand(done):
    """Euler's steps on u + 2 (c - u) within the interval, c elsewhere."""
    request = ["--condition", "age=50", "--condition", "sex=m", "--guidance", "2", "--interval", "0.3:0.8"]
    (volume,), (record,), _ = drawn(done, "hand", *request, "--sampler", "euler")
    assert record["condition"] == {"age": "50", "sex": "m"} and record["interval"] == [0.3, 0.8]
    checkpoint = done.checkpoint("diffusion_unet.pt")
    unet = done.network("diffusion_def", checkpoint["model"])
    low, high = checkpoint["conditions"]["covariates"]["columns"]["age"]
    z = torch.randn(checkpoint["latent_shape"], generator=torch.Generator().manual_seed(0))[None]
    vectors = torch.tensor([[(50 - low) / (high - low), 0, 0, 1, 0], [0, 1, 0, 0, 1]])
    with torch.no_grad():
        for i in range(6):
            t = 1 - i / 6
            both = torch.cat(
                [z.expand(2, -1, -1, -1, -1), vectors[..., None, None, None].expand(2, 5, *z.shape[2:])], 1
            )
            c, u = unet(both, torch.full((2,), 1000 * t), class_labels=vectors, context=vectors[:, None])
            z = z - (2 * c - u if 0.3 <= t <= 0.8 else c)[None] * -1 / 6
        autoencoder = done.network("autoencoder_def", done.checkpoint("autoencoder.pt")["model"])
        expected = autoencoder.decode(z / checkpoint["scale_factor"])[0, 0].numpy()
    np.testing.assert_allclose(volume, expected, atol=1e-4)


def test_ranges_tables_and_reproduction(done, capsys):
    table = done.folder / "asked.tsv"
    table.write_text("participant_id\tage\tsex\nx\t30\tm\ny\t\tunknown\n")
    more = ["--conditions", table, "--condition", "age=40:50", "--batch-size", "2", "--guidance", "2"]
    volumes, (first, second), _ = drawn(done, "table", *map(str, more))
    assert first["condition"] == {"age": "30", "sex": "m"} and second["condition"]["sex"] == "unknown"
    assert 40 <= float(second["condition"]["age"]) <= 50
    assert first["conditions"] == [first["condition"], second["condition"]]
    assert "2 of 2 volumes already exist" in drawn(done, "table", *map(str, more))[2]
    capsys.readouterr()
    inference.main(["--reproduce", str(done.folder / "table/sample_000001.json")])
    assert "byte-identical" in capsys.readouterr().out


def test_a_grid_has_each_seed_under_each_value(done):
    _, records, printed = drawn(done, "grid", "--num", "2", "--grid", "age=20,40,60")
    assert [(one["seed"], one["condition"]["age"]) for one in records] == [
        (seed, age) for seed in (0, 1) for age in ("20", "40", "60")
    ]
    assert len({one["condition"]["sex"] for one in records if one["seed"] == 0}) == 1
    assert "sex not given: drawn from the training volumes'" in printed
    assert (done.folder / "grid/grid.png").is_file()
    assert (done.folder / "grid/sample_000001_age-40.nii.gz").is_file()


def test_a_number_beyond_the_range_is_told(done):
    printed = drawn(done, "beyond", "--condition", "age=90", "--condition", "sex=f")[2]
    assert "warning: age lies beyond 20 to 60, which the model was trained on" in printed
    assert "not given" not in printed


@pytest.mark.parametrize(
    "more, message",
    [
        (["--condition", "sex=x"], "expected one of f, m"),
        (["--grid", "age=1,1"], "expected different values"),
        (["--condition", "sex=f", "--interval", "0.2:0.8"], "limits guidance"),
        (["--condition", "sex=f", "--guidance", "2", "--interval", "0.8:0.2"], "expected two numbers"),
        (["--conditions", "missing.tsv"], "missing.tsv: cannot be read"),
        (["--grid", "age=20:30,40:50"], "cannot be part of a file's name"),
    ],
)
def test_bad_requests(done, more, message):
    assert message in done.refused(inference, *more)


def test_a_real_scan_under_another_condition(done, capsys):
    """Drawn again it is the autoencoder's reconstruction; older, it is brighter, as in the training set."""
    files = ["-c", str(done.config_file), "-e", str(done.environment_file), "--device", "cpu"]
    out = ["--out", str(done.folder / "edited")]
    scan = ["--scan", str(done.data / "scan_0.nii.gz"), "--of", "age=20", "sex=f"]
    edit_scan.main([*files, *scan, "--condition", "age=60", "--guidance", "3", *out])
    printed = capsys.readouterr().out
    assert float(re.search(r"([\d.]+) dB to the autoencoder's", printed)[1]) > 40
    volumes = {
        kind: nib.load(done.folder / f"edited/scan_0_{kind}.nii.gz").get_fdata()
        for kind in ("scan", "again", "edited")
    }
    np.testing.assert_allclose(volumes["scan"], nib.load(done.data / "scan_0.nii.gz").get_fdata(), atol=1e-3)
    assert volumes["edited"].mean() > 1.1 * volumes["again"].mean()
    assert (done.folder / "edited/scan_0.png").is_file()
    for more, message in (
        (out, "scan_0_scan.nii.gz exists"),
        (["--out", str(done.folder / "new"), "--guidance", "-1"], "--guidance -1.0: expected a number"),
    ):
        with pytest.raises(SystemExit):
            edit_scan.main([*files, *scan, "--condition", "age=60", *more])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["rectified_flow", "scaled_linear_beta"])
def test_inversion_is_exact_where_the_network_is_smooth(schedule):
    """With the optimal network of normal data, sampling from the inverted noise gives the latents again; the
    noise of a latent is (z_0 - mean) / std."""
    section = configs.completed({"NoiseScheduler": {"schedule": schedule}})["NoiseScheduler"]
    process = NoiseProcess.from_config(section)
    mean, std = 0.3, 0.5

    def model(x, t):
        a, s = (level.reshape(-1, 1, 1, 1, 1).to(x) for level in process.levels(t))
        z0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        noise = (x - a * z0) / s
        return z0 - noise if process.is_flow else noise

    name = inverting_sampler(process)
    times = process.sampling_times(50, SAMPLERS[name].even)
    z0 = mean + std * torch.randn(2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    noise = invert(model, process, z0, times)
    torch.testing.assert_close(
        SAMPLERS[name].solve(model, process, noise, times, None), z0, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(noise, (z0 - mean) / std, atol=0.12, rtol=0.05)


# ---------------------------------------------------------------- do samples follow?


def test_a_structure_is_what_thresholds_find():
    """A dark core of 2 x 2 x 2 voxels in a block of 8, and a dark voxel at its surface; voxels of 2 mm."""
    volume = np.zeros((12, 12, 12), np.float32)
    volume[2:10, 2:10, 2:10] = 0.9
    volume[5:7, 5:7, 5:7] = 0.1
    volume[2, 5, 5] = 0.1
    volume, texts = torch.from_numpy(volume)[None, None], ("a=0:0.3", "a=0:0.3:4", "a=0.5:1")
    found = [Structure.parse(text).millilitres(volume, (2, 2, 2)) for text in texts]
    assert found == pytest.approx([9 * 0.008, 8 * 0.008, (512 - 9) * 0.008])
    for text in ("a", "a=0.3", "a=0.3:0.1", "=0:1", "a=0:1:2:3", "a=0:x", "a=0:1:-1"):
        with pytest.raises(UserError, match="expected NAME=LOW:HIGH"):
            Structure.parse(text)


def test_correlation_and_slope_by_hand():
    assert np.isnan(line(np.full(6, 0.7), np.arange(6.0))).all()
    assert known_values({"age": "31.0", "sex": " f", "site": "n/a", "arm": "unknown"}) == {
        "age": "31",
        "sex": "f",
    }
    asked = np.array([20.0, 40, 60, 80])
    assert line(asked, 3 + 0.5 * asked) == pytest.approx((1, 0.5))
    assert line(asked, np.array([1.0, 2, 2, 1]))[1] == pytest.approx(0)
    assert np.isnan(line(asked, np.ones(4))).all()


def test_the_evaluation_compares_what_was_asked_for_with_what_is_there(done):
    files = ["-c", str(done.config_file), "-e", str(done.environment_file), "--device", "cpu"]
    volumes, records, _ = drawn(done, "asked", "--num", "6", "--condition", "age=20:60")
    out = done.folder / "asked/evaluation"
    evaluate.main([*files, "--structure", "bright=0.4:1"])
    figures = {one["key"]: one for one in json.loads((out / "metrics.json").read_text())["figures"]}
    ages = np.array([float(one["condition"]["age"]) for one in records])
    millilitres = np.array([((one >= 0.4) & (one < 1)).sum() / 1000 for one in volumes])
    expected = line(ages, millilitres)
    scans = [(age, i) for i, age in enumerate(AGES) if age != "n/a"]
    voxels = [nib.load(done.data / f"scan_{i}.nii.gz").get_fdata() for _, i in scans]
    real = line(
        np.array([age for age, _ in scans], float),
        np.array([((one >= 0.4) & (one < 1)).sum() / 1000 for one in voxels]),
    )
    for i, kind in enumerate(("correlation", "slope")):
        row = figures[f"{kind}_bright_age"]
        assert (row["value"], row["floor"]) == pytest.approx((expected[i], real[i]), rel=1e-3)
        assert row["counts"] == "6 samples, 7 scans"
    categories = [key for key in figures if key.startswith("mmd_own_sex")]
    assert categories and all(
        figures[key]["missing"] or figures[key]["floor"] is not None for key in categories
    )


def test_brainldm(tmp_path):
    """Its config, with fewer channels and smaller volumes, and weights that the real classes make."""
    small = {
        "autoencoder_def.channels": [8, 8, 8, 8],
        "autoencoder_def.norm_num_groups": 4,
        "diffusion_def.channels": [8, 8, 16],
        "diffusion_def.num_head_channels": [0, 8, 16],
        "diffusion_def.norm_num_groups": 4,
        "diffusion_train.patch_size": [32, 32, 32],
        "autoencoder_train.patch_size": [32, 32, 32],
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    source = ROOT / "config/config_brainldm.json"
    config = utils.load_config(source, overrides)
    assert config["diffusion_def"]["cross_attention_dim"] == 4 and config["diffusion_def"]["in_channels"] == 7
    for key, name in (("autoencoder_def", "autoencoder"), ("diffusion_def", "model")):
        torch.save(configs.define_network(config, key).state_dict(), tmp_path / f"{name}.pt")
    paths = {"data_base_dir": "data", "model_dir": "models", "tfevent_path": "tb", "output_dir": "out"}
    (tmp_path / "env.json").write_text(json.dumps({key: str(tmp_path / one) for key, one in paths.items()}))
    files = ["-c", source, "-e", tmp_path / "env.json", "--device", "cpu", "--scale-factor", "1"]
    files += ["--autoencoder", tmp_path / "autoencoder.pt", "--unet", tmp_path / "model.pt"]
    files += ["--sampler", "ddim", "--steps", "2", *(word for one in overrides for word in ("--set", one))]
    asked = ["gender=1", "age=0.7", "ventricular=0.7", "brain=0.5"]
    inference.main([*map(str, files), "--condition", *asked])
    record = json.loads((tmp_path / "out/sample_000000.json").read_text())
    assert record["condition"] == dict(one.split("=") for one in asked)
    assert nib.load(tmp_path / "out/sample_000000.nii.gz").shape == (32, 32, 32)
    conditions = Conditions.from_checkpoint({"latent_shape": [3, 4, 4, 4]}, config)
    cond = conditions.cond([conditions.parse(asked)])
    expected = torch.tensor([[[1.0, 0.7, 0.7, 0.5]]])
    torch.testing.assert_close(cond["context"], expected)
    torch.testing.assert_close(cond["channels"], expected.reshape(1, 4, 1, 1, 1).expand(1, 4, 4, 4, 4))
    with pytest.raises(SystemExit):
        inference.main([*map(str, files), "--seed", "1", "--condition", *asked[:3]])


def test_exports(done, tmp_path, capsys):
    """TorchScript takes the encoded covariates; a bundle needs a network that MONAI can build."""
    files = ["-c", str(done.config_file), "-e", str(done.environment_file)]
    with pytest.raises(SystemExit):
        export_model.main([*files, "--out", str(tmp_path / "all")])
    assert "covariate_embed is this project's own, unknown to MONAI" in capsys.readouterr().err
    export_model.main([*files, "--out", str(tmp_path / "out"), "--formats", "torchscript"])
    unet = torch.jit.load(tmp_path / "out/torchscript/unet.ts")
    checkpoint = done.checkpoint("diffusion_unet.pt")
    network = done.network("diffusion_def", checkpoint["model"])
    shape = checkpoint["latent_shape"]
    z, vector, t = torch.randn(1, *shape), torch.tensor([[0.5, 0, 1, 0, 0]]), torch.tensor([300.0])
    constant = vector[..., None, None, None].expand(1, 5, *shape[1:])
    with torch.no_grad():
        expected = network(torch.cat([z, constant], 1), t, class_labels=vector, context=vector[:, None])
        torch.testing.assert_close(unet(z, t, vector), expected, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert "`age`, 20 to 60" in card and "age, 0 at 20 and 1 at 60" in card
