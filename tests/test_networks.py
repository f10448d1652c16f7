"""Weights of other origins give the same numbers here; recomputed activations change none."""

import argparse
import contextlib
import copy
import pickle

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock
from torch import nn

from ldm import UserError
from ldm.diffusion.process import NoiseProcess
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import (
    NETWORKS,
    check_discriminator_size,
    check_networks,
    check_size,
    downsampling_factor,
    instantiate,
    latent_size,
    network_divisor,
    small_input,
)
from ldm.models.denoiser import example_cond
from ldm.models.layers import GroupNorm, add_checkpointing, freeze_unreached, on_device
from ldm.models.weights import load_weights, plain_names
from ldm.system import instructions, ranks
from ldm.system.checkpoints import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:generative")

SMALL = {"spatial_dims": 3, "num_res_blocks": 1, "norm_num_groups": 4, "attention_levels": [False, True]}
CPU = ranks.Run(0, 1, torch.device("cpu"))
AUTOENCODER = SMALL | {"in_channels": 1, "out_channels": 1, "latent_channels": 2}
AUTOENCODER |= {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True}
UNET = SMALL | {"in_channels": 2, "out_channels": 2, "num_head_channels": [0, 4]}
CROSS = {"with_conditioning": True, "cross_attention_dim": 3, "transformer_num_layers": 1}
NEW = {"monai": "channels", "generative": "num_channels"}
ARGUMENTS = {"AutoencoderKL": AUTOENCODER, "DiffusionModelUNet": UNET}


def build(package: str, name: str, arguments: dict | None = None, seed: int = 0) -> nn.Module:
    """A tiny network whose every parameter is drawn, those too that start at zero."""
    arguments = arguments or ARGUMENTS[name]
    definition = {"_target_": f"{package}.networks.nets.{name}", NEW[package]: [8, 8], **arguments}
    network = instantiate(definition, NETWORKS, "here").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def test_further_noise_on_the_latents_is_a_share_of_their_spread():
    """Of two volumes whose latents spread by 2 and by 0; the posterior's own noise adds to it."""

    class Codes(nn.Module):
        def encode(self, images):
            return images, torch.full_like(images, 0.5)

        def decode(self, latents):
            return latents

    mean = torch.stack([torch.tensor([-2.0, 2.0] * 4).reshape(1, 2, 2, 2), torch.ones(1, 2, 2, 2)])
    mean[0] *= 7**0.5 / 8**0.5  # torch's standard deviation divides by n - 1
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    autoencoder = Autoencoder(Codes())
    drawn = autoencoder(mean, eps, torch.tensor([0.6, 0.6]))[0]
    torch.testing.assert_close(drawn[0], mean[0] + (0.5**2 + 1.2**2) ** 0.5 * eps[0])
    torch.testing.assert_close(drawn[1], mean[1] + 0.5 * eps[1])
    torch.testing.assert_close(autoencoder(mean, eps)[0], mean + 0.5 * eps)


def attending(network: nn.Module) -> list[nn.Module]:
    return [block for block in network.modules() if isinstance(block, SABlock | CrossAttentionBlock)]


@pytest.mark.parametrize("arguments", [UNET, {**UNET, **CROSS}])
def test_fused_attention_gives_what_the_matrix_gives(arguments):
    network = build("monai", "DiffusionModelUNet", arguments)
    x, t = numbers(2, 2, 4, 4, 4), torch.tensor([1.0, 500.0])
    context = {"context": numbers(2, 1, 3)} if "with_conditioning" in arguments else {}
    outputs = []
    for fused in (True, False):
        for block in attending(network):
            assert block.use_flash_attention is (True if fused else block.use_flash_attention)
            block.use_flash_attention = fused
        outputs.append(network(x, timesteps=t, **context))
        outputs[-1].square().sum().backward()
        outputs.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        network.zero_grad()
    assert attending(network)
    for one, other, rtol in ((outputs[0], outputs[2], 1e-4), (outputs[1], outputs[3], 1e-3)):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-4 * float(other.detach().std()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_compiling_makes_one_graph_for_all_steps(name):
    """No break in the graph, and no compiling again for other values, times or weights."""
    torch._dynamo.reset()
    network, is_unet = build("monai", name).train(), name == "DiffusionModelUNet"
    add_checkpointing(network)
    network = network if is_unet else Autoencoder(network)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for step in range(3):
        x = numbers(1, 2, 4, 4, 4, seed=step)
        if is_unet:
            output = compiled(x, timesteps=torch.tensor([1.0 + step]))
        else:
            output, _, _ = compiled(numbers(1, 1, 8, 8, 8, seed=step), x)
        output.sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(0.1)
    assert counters["stats"]["unique_graphs"] == 1


def test_group_norms_keep_half_precision_and_are_the_same_in_full():
    networks = nn.ModuleList([build("monai", name) for name in ARGUMENTS])
    norms = [module for module in networks.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(type(module) is GroupNorm for module in norms)
    x = 3 + 2 * numbers(2, 8, 4, 4, 4)
    groups = x.reshape(2, 4, -1)
    variance = groups.var(2, keepdim=True, correction=0)
    expected = ((groups - groups.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()).reshape(x.shape)
    weight, bias = (one.reshape(1, 8, 1, 1, 1) for one in (norms[0].weight, norms[0].bias))
    expected = expected * weight + bias
    torch.testing.assert_close(norms[0](x), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norms[0](x).dtype == torch.float32
        half = norms[0](x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


def test_attention_with_dropout_is_not_fused():
    """MONAI would pass the dropout to the fused kernels in evaluation too."""
    network = build("monai", "DiffusionModelUNet", {**UNET, **CROSS, "dropout_cattn": 0.5})
    assert {block.use_flash_attention for block in attending(network) if block.dropout_rate} == {False}
    x, t, context = numbers(1, 2, 4, 4, 4), torch.tensor([1.0]), numbers(1, 1, 3)
    a, b = (network(x, timesteps=t, context=context) for _ in range(2))
    assert torch.equal(a, b)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(network: nn.Module, **conditions) -> torch.Tensor:
    """All that a network computes of fixed inputs, with a gradient."""
    if hasattr(network, "encode"):
        mean, std = network.encode(numbers(2, 1, 8, 8, 8))
        return torch.cat([x.flatten() for x in (mean, std, network.decode(numbers(2, 2, 4, 4, 4)))])
    return network(numbers(2, 2, 4, 4, 4), timesteps=torch.tensor([3, 700]), **conditions).flatten()


# ---- weights of monai-generative


@pytest.mark.parametrize("include_fc", [True, False])
def test_autoencoder_of_monai_generative(include_fc):
    old = build("generative", "AutoencoderKL")
    new = build("monai", "AutoencoderKL", AUTOENCODER | {"include_fc": include_fc}, seed=1)
    assert not torch.allclose(outputs(old), outputs(new), atol=0.1)
    load_weights(new, old.state_dict(), "old.pt")
    assert (outputs(old) - outputs(new)).abs().max() < 1e-5 * outputs(old).abs().max()


OPTIONS = [({}, True), ({"resblock_updown": True}, False), ({"num_class_embeds": 3}, True), (CROSS, True)]


@pytest.mark.parametrize("options, include_fc", OPTIONS)
def test_unet_of_monai_generative(options, include_fc):
    own = {"include_fc": include_fc, "use_combined_linear": False}
    old = build("generative", "DiffusionModelUNet", UNET | options)
    new = build("monai", "DiffusionModelUNet", UNET | options | own, seed=1)
    given = {"context": numbers(2, 5, 3)} if options == CROSS else {}
    if "num_class_embeds" in options:
        given["class_labels"] = torch.tensor([2, 0])
    expected = outputs(old, **given)
    assert not torch.allclose(outputs(new, **given), expected, atol=0.1)
    load_weights(new, old.state_dict(), "old.pt")
    assert (outputs(new, **given) - expected).abs().max() < 1e-5 * expected.abs().max()


OTHERS = [
    ("AutoencoderKL", AUTOENCODER | {"use_convtranspose": True}, {}),  # kernels of 3 voxels there, of 2 here
    ("DiffusionModelUNet", UNET | CROSS, {"include_fc": False}),  # a projection there that is missing here
]


@pytest.mark.parametrize("name, old, own", OTHERS)
def test_network_that_computes_something_else_is_refused(name, old, own):
    with pytest.raises(UserError, match=r"old\.pt: weights do not fit"):
        load_weights(build("monai", name, old | own), build("generative", name, old).state_dict(), "old.pt")


def test_scheduler_of_monai_generative():
    section = {"num_train_timesteps": 100, "schedule": "scaled_linear_beta"}
    section |= {"beta_start": 0.0015, "beta_end": 0.0195}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 100, dtype=torch.float64) ** 2
    for prediction in ("epsilon", "v_prediction", "sample"):
        target = {"_target_": "generative.networks.schedulers.DDPMScheduler", "prediction_type": prediction}
        process = NoiseProcess.from_config(target | section)
        assert torch.allclose(process.alphas_cumprod, torch.cumprod(1 - betas, 0), rtol=1e-5)
        assert process.prediction == prediction and process.num_train_timesteps == 100
        plain = {"zero_terminal_snr": False, "shift": 1.0}
        own = NoiseProcess.from_config(section | plain | {"prediction_type": prediction})
        assert torch.equal(own.alphas_cumprod, process.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "RFlowScheduler"])
def test_scheduler_of_monai(name):
    section = {"_target_": f"monai.networks.schedulers.{name}", "num_train_timesteps": 50}
    process = NoiseProcess.from_config(section)
    assert process.is_flow == (name == "RFlowScheduler") and process.num_train_timesteps == 50


# ---- names


def test_prefixes_of_wrappers_are_stripped():
    network = build("monai", "AutoencoderKL")
    state = network.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        wrapped = {prefix + name: value for name, value in state.items()}
        assert set(plain_names(wrapped)) == set(state)
        other = build("monai", "AutoencoderKL", seed=1)
        load_weights(other, wrapped, "wrapped.pt")
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert set(plain_names({"module.a": 1, "b": 2})) == {"module.a", "b"}  # not a wrapper's


def test_weights_that_do_not_fit():
    network = build("monai", "AutoencoderKL")
    before, name = copy.deepcopy(network.state_dict()), "quant_conv_mu.conv.weight"
    faults = {
        rf"1 missing \({name}\)": {k: v for k, v in before.items() if k != name},
        r"1 unknown \(zzz\)": before | {"zzz": torch.zeros(1)},
        rf"1 of another shape \({name}\)": before | {name: torch.zeros(3)},
        r"\d+ missing \(decoder\.": {k: v for k, v in before.items() if not k.startswith("decoder.")},
        r"\d+ missing \(.*\d+ unknown": build("generative", "DiffusionModelUNet").state_dict(),
    }
    for message, state in faults.items():
        changed = {k: torch.zeros_like(v) for k, v in state.items()}
        with pytest.raises(UserError, match=rf"model\.pt: weights do not fit .*{message}"):
            load_weights(network, changed, "model.pt")
    assert all(torch.equal(value, before[k]) for k, value in network.state_dict().items())


# ---- files of others


def below(prefix: str, network: nn.Module) -> dict:
    return {prefix + name: value for name, value in network.state_dict().items()}


def files_of_others(autoencoder: nn.Module, unet: nn.Module, discriminator: nn.Module) -> dict[str, dict]:
    """What MAISI's and Lightning's scripts save, and others."""
    maisi = {"epoch": 3, "loss": torch.tensor(0.1), "num_train_timesteps": 1000}
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 1e-4}}
    like = {name: torch.zeros_like(value) for name, value in discriminator.named_parameters()}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": value} for i, value in enumerate(like.values())}
    lightning["optimizer_states"] = [{"state": moments, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}]
    networks = {"unet": unet, "autoencoder": autoencoder, "discriminator": discriminator}
    states = {name: network.state_dict() for name, network in networks.items()}
    kl = states["autoencoder"]
    together = below("autoencoder.", autoencoder) | below("unet.module.", unet)
    return {
        "MAISI": {**maisi, "unet_state_dict": states["unet"], "scale_factor": torch.tensor(0.75)},
        "MAISI, its autoencoder": {"unet_state_dict": states["autoencoder"]},
        "MAISI, its autoencoder, later": {"epoch": 3, "autoencoder_state_dict": states["autoencoder"]},
        "with a discriminator": {"state_dict": kl, "discriminator": states["discriminator"]},
        "both": {f"{name}_state_dict": state for name, state in states.items()},
        "DDP": {"model": below("module.", unet)},
        "Lightning, one network": {**lightning, "state_dict": below("model.", autoencoder)},
        "Lightning, compiled": {**lightning, "state_dict": below("net._orig_mod.", unet)},
        "Lightning, all": {**lightning, "state_dict": together | below("discriminator.", discriminator)},
    }


def test_files_of_others_are_read(tmp_path):
    """With the network's own weights, and MAISI's scale factor, which is a tensor, as a number."""
    networks = {"autoencoder": build("monai", "AutoencoderKL"), "unet": build("monai", "DiffusionModelUNet")}
    discriminator = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 1, 3))
    lacking = {"autoencoder": ["MAISI", "DDP", "Lightning, compiled"], "unet": ["with a discriminator"]}
    lacking["unet"] += ["MAISI, its autoencoder", "MAISI, its autoencoder, later", "Lightning, one network"]
    for name, content in files_of_others(*networks.values(), discriminator).items():
        torch.save(content, tmp_path / "others.pt")
        for role, network in networks.items():
            other = build("monai", type(network).__name__, seed=1)
            found = load_checkpoint(tmp_path / "others.pt", role)
            if name in lacking[role]:
                with pytest.raises(UserError, match="do not fit"):
                    load_weights(other, found["model"], "others.pt")
                continue
            load_weights(other, found["model"], "others.pt")
            weights = network.state_dict()
            assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
            assert found.get("scale_factor") == (0.75 if name == "MAISI" else None)


def test_which_of_several_networks_is_meant_is_asked(tmp_path):
    network = build("monai", "AutoencoderKL")
    state, path = network.state_dict(), tmp_path / "two.pt"
    for names, role in ((("generator", "teacher"), None), (("vae", "vae_ema"), "autoencoder")):
        torch.save(dict.fromkeys(names, state), path)
        with pytest.raises(UserError, match=rf"two\.pt: holds several networks \({', '.join(names)}\)\. Sa"):
            load_checkpoint(path, *([role] if role else []))
    both = below("net.", network) | below("ema.", network)
    with pytest.raises(UserError, match=r"two\.pt: holds several networks of this kind \(net\., ema\.\)\. S"):
        load_weights(network, both, "two.pt")
    for factor in (torch.tensor(0.0), torch.ones(2), "x"):
        torch.save({"state_dict": state, "scale_factor": factor}, path)
        with pytest.raises(UserError, match=r"two\.pt: scale_factor: expected a number from 1e-09 to .*, f"):
            load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content, held", [("network", "torch.nn.modules.linear.Linear"), ("namespace", "argparse")]
)
def test_a_pickle_of_more_than_tensors_is_refused_in_words(tmp_path, content, held, zipped):
    """Torch's own text advises `weights_only=False`, which runs what is in the file."""
    content = nn.Linear(2, 2) if content == "network" else {"hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "more.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "more.ckpt")
    text = str(error.value)
    assert f"more.ckpt: a pickle that holds more than tensors ({held}" in text and "could run code" in text
    assert "TROUBLESHOOTING" in text and "weights_only" not in text and "\n" not in text


def test_no_file_brings_torchs_advice_to_the_user(tmp_path, recwarn):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "program.pt")
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": argparse.Namespace()}))
    (tmp_path / "empty.pt").touch()
    recwarn.clear()
    cases = {"program": "TorchScript", "page": "damaged", "plain": "damaged", "empty": "EOF"}
    for name, words in cases.items():
        with pytest.raises(UserError, match=rf"{name}\.pt: .*{words}") as error:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert "weights_only" not in str(error.value)
    assert not recwarn.list


# ---- recomputed activations


@pytest.mark.parametrize("package", ["monai", "generative"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_checkpointing_changes_no_number(package, name):
    plain, recomputing = (build(package, name) for _ in range(2))
    add_checkpointing(recomputing)
    assert list(recomputing.state_dict()) == list(plain.state_dict())
    kept = []
    for network in (plain, recomputing):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            result = outputs(network)
        (result * numbers(len(result), seed=9) / len(result)).sum().backward()
        if network is plain:
            expected = result
    assert torch.allclose(result, expected, atol=1e-6 * expected.abs().max().item())
    assert sum(kept[1]) < 0.6 * sum(kept[0])  # what it is for
    for (key, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        if a.grad is None:  # monai-generative's unused projections
            assert b.grad is None and ".proj_attn." in key
        else:
            assert (a.grad - b.grad).abs().max() <= 1e-6 * max(1, a.grad.abs().max()), key
    load_weights(build(package, name, seed=1), recomputing.state_dict(), "recomputing.pt")


# ---- parameters that no loss reaches


def frozen(network: nn.Module, *inputs: torch.Tensor | float, **more: torch.Tensor) -> set[str]:
    freeze_unreached(network, *inputs, **more)
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("recomputing", [False, True])
def test_parameters_that_no_loss_reaches_are_frozen(recomputing):
    """Those that a backward pass leaves without gradient, and no other; the weights stay."""
    images, latents = (torch.empty(1, channels, 8, 8, 8, device="meta") for channels in (1, 2))
    times = torch.zeros(1, device="meta")
    for package, count in (("generative", 8), ("monai", 0)):
        encoder = Autoencoder(build(package, "AutoencoderKL"))
        unet = build(package, "DiffusionModelUNet", UNET | {"num_class_embeds": 3})
        for network in (encoder.network, unet) if recomputing else ():
            add_checkpointing(network)
        before = copy.deepcopy(encoder.state_dict() | unet.state_dict())
        labels = torch.zeros(1, dtype=torch.long, device="meta")
        of_unet = frozen(unet, latents, timesteps=times, class_labels=labels)
        found = frozen(encoder, images, 0.0), of_unet
        assert [len(names) for names in found] == [count] * 2
        assert all(".proj_attn." in name for names in found for name in names)
        after = encoder.state_dict() | unet.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in after.items())


# ---- networks of a config


MAISI_UNET = {
    "_target_": "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
    "include_spacing_input": True,
}
REGIONS = {"include_top_region_index_input": True, "include_bottom_region_index_input": True}


def networks_of(dims: int = 3, **unet) -> dict:
    """A config of tiny networks, whose UNet has these arguments."""
    names = {"_target_": "monai.networks.nets.AutoencoderKL", "channels": [8, 8]}
    autoencoder = {**AUTOENCODER, **names, "spatial_dims": dims}
    levels = "num_channels" if "_target_" in unet else "channels"  # MAISI's name
    names = {"_target_": "monai.networks.nets.DiffusionModelUNet", levels: [8, 8]}
    return {
        "spatial_dims": dims,
        "image_channels": 1,
        "volume_channels": 1,
        "autoencoder_def": autoencoder,
        "diffusion_def": {**UNET, **names, "spatial_dims": dims, **unet},
    }


MAISI_INPUTS = {"spacing_tensor", "top_region_index_tensor", "bottom_region_index_tensor"}
NEEDED = [
    ({}, set()),
    ({**CROSS, "num_class_embeds": 3, "in_channels": 3}, {"class_labels", "context", "channels"}),
    ({**MAISI_UNET, **REGIONS, "num_class_embeds": 2}, {"class_labels", *MAISI_INPUTS}),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("unet, expected", NEEDED)
def test_networks_with_conditions_pass_the_check(dims, unet, expected):
    """Trained with its conditions, no layer of such a network is frozen, the embeddings included."""
    config = networks_of(dims, **unet)
    check_networks(config)
    definition, inputs = config["diffusion_def"], small_input(config, "diffusion_def")
    with torch.device("meta"):
        cond = example_cond(definition, 1, inputs.shape[2:])
        assert cond.keys() == expected
        cond.pop("channels", None)
        network = instantiate(definition, NETWORKS, "here")
        assert not frozen(network, inputs, timesteps=torch.zeros(1), **cond)


MISFITS = [
    ({"in_channels": 1}, ": it cannot be used with the autoencoder's latents"),
    ({"in_channels": 3, "out_channels": 3}, r"\.out_channels: expected 2, as many as .* have, found 3\."),
    ({"spatial_dims": 2}, r"\.spatial_dims: expected 3, found 2\."),
    ({"channels": [8] * 10}, r": 10 levels are too many\."),
    ({"num_class_embeds": -1}, r"\.num_class_embeds: expected whole numbers from 0"),
]


@pytest.mark.parametrize("unet, message", MISFITS)
def test_networks_that_do_not_fit_are_named(unet, message):
    with pytest.raises(UserError, match=f"diffusion_def{message}"):
        check_networks(networks_of(**unet))


# ---- sizes


def test_nearest_sizes_are_named():
    check_size([16, 32, 48], (16, 16, 16), "here")
    with pytest.raises(UserError, match=r"here: \[30, 32, 3\] .* multiples of 8: 24 or 32 x 32 x 8\."):
        check_size([30, 32, 3], (8, 8, 8), "here")
    with pytest.raises(UserError, match=r"multiples of 8 x 8 x 4: 24 or 32 x 32 x 4\."):
        check_size([30, 32, 3], (8, 8, 4), "here")


def test_factors_by_definition_and_by_network():
    three, two = {"spatial_dims": 3, "channels": [8, 8, 8]}, {"spatial_dims": 2, "num_channels": [8, 8]}
    assert downsampling_factor(three) == (4, 4, 4) and downsampling_factor(two) == (2, 2, 1)
    with pytest.raises(UserError, match="x: `channels` should list"):
        downsampling_factor({"_target_": "x", "spatial_dims": 3, "channels": 8})
    config = {"autoencoder_def": three, "diffusion_def": {"spatial_dims": 3, "channels": [8, 8]}}
    assert network_divisor(config) == (8, 8, 8) and latent_size(config, [16, 24, 32]) == [4, 6, 8]


# AVX-512, its bfloat16 and AMX of a CPU; its vendor; ONEDNN_MAX_CPU_ISA; whether bfloat16 is fast, and
# whether a frozen autoencoder in float32 has its channels last.
MACHINES = [
    ("000", "GenuineIntel", None, False, False),  # AVX2 alone
    ("000", "", None, False, False),  # ARM
    ("100", "GenuineIntel", None, False, True),
    ("110", "GenuineIntel", None, False, True),
    ("110", "AuthenticAMD", None, True, True),
    ("110", "AuthenticAMD", "AVX512_CORE", False, True),
    ("111", "GenuineIntel", None, True, True),
    ("111", "GenuineIntel", "DEFAULT", True, True),
    ("111", "GenuineIntel", "no_such_name", True, True),
    ("111", "GenuineIntel", "AVX512_CORE_AMX", True, True),
    ("111", "GenuineIntel", "AVX10_1_512_AMX", True, True),
    ("111", "GenuineIntel", "AVX512_CORE_BF16", False, True),
    ("111", "GenuineIntel", "avx2", False, False),
]


@pytest.mark.parametrize(("has", "vendor", "cap", "bfloat16", "last"), MACHINES)
def test_precision_and_layout_by_instructions(monkeypatch, tmp_path, has, vendor, cap, bfloat16, last):
    for name, there in zip(("avx512", "avx512_bf16", "amx_tile"), has, strict=True):
        monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda there=there: there == "1")
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(instructions, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if cap is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    cpu, half = torch.device("cpu"), torch.bfloat16 if bfloat16 else None
    assert ranks.amp_dtype(cpu) == half
    assert instructions.wants_channels_last(cpu, None, frozen_autoencoder=True) == last
    assert instructions.wants_channels_last(cpu, half) == bfloat16
    assert not instructions.wants_channels_last(torch.device("cuda"), torch.bfloat16, True)


def test_the_layout_changes_results_by_rounding_alone(monkeypatch):
    """In float64 both layouts of an autoencoder and its gradients agree to 1e-12."""
    results, image = [], numbers(1, 1, 8, 8, 8).double()
    for last in (False, True):
        monkeypatch.setattr("ldm.models.layers.wants_channels_last", lambda *_, last=last: last)
        torch.manual_seed(0)
        network = on_device(build("monai", "AutoencoderKL", AUTOENCODER | {"spatial_dims": 3}).double(), CPU)
        weight = network.encoder.blocks[1].conv1.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) == last
        output = network.decode(network.encode(image)[0])
        gradient = torch.autograd.grad(output.square().sum(), weight)[0]
        results.append((output.detach(), gradient))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("package", ["monai", "generative"])
@pytest.mark.parametrize("dims", [2, 3])
def test_one_interface_of_autoencoders(package, dims):
    """2D (slice by slice) and 3D, of either package: shapes, float32, and the factor of the network."""
    definition = AUTOENCODER | {"spatial_dims": dims}
    network = on_device(build(package, "AutoencoderKL", definition).bfloat16(), CPU)
    autoencoder = Autoencoder(network)
    assert (autoencoder.latent_channels, autoencoder.is_slicewise) == (2, dims == 2)
    factor = (2, 2, 1) if dims == 2 else (2, 2, 2)
    assert autoencoder.factor == downsampling_factor({**definition, "channels": [8, 8]}) == factor
    images = numbers(2, 1, 8, 4, 8).bfloat16()
    mean, std = autoencoder.encode(images)
    assert (
        mean.shape == std.shape == (2, 2, 4, 2, 8 // factor[-1]) and mean.dtype == std.dtype == torch.float32
    )
    assert autoencoder.decode(mean.bfloat16()).shape == images.shape
    assert autoencoder.decode(mean.bfloat16()).dtype == autoencoder.reconstruct(images).dtype == torch.float32
    assert torch.equal(autoencoder.activations(images)[-1], autoencoder.network.encode(images)[0])


@pytest.mark.parametrize("layers, norm", [(1, "INSTANCE"), (2, "INSTANCE"), (3, "INSTANCE"), (3, "BATCH")])
def test_patch_too_small_for_the_discriminator_is_found_beforehand(layers, norm):
    """Refused where, and only where, the network itself fails."""
    arguments = {"spatial_dims": 3, "in_channels": 1, "channels": 4, "num_layers_d": layers, "norm": norm}
    definition = {"_target_": "monai.networks.nets.PatchDiscriminator", "out_channels": 1, **arguments}
    discriminator = instantiate(definition, NETWORKS, "here")
    for side in range(4, 33, 4):
        try:
            discriminator(numbers(1, 1, side, side, side))
        except (RuntimeError, ValueError):
            refused = pytest.raises(UserError, match=rf"here: \[40, {side}, 36\] is too small")
        else:
            refused = contextlib.nullcontext()
        with refused:
            check_discriminator_size(discriminator, [40, side, 36], "here")
