"""Draw figs/pipeline.png: from scans to latents, through both trainings, to new volumes.

python docs/make_pipeline_png.py

Takes half a minute on one core and no patient's data. What its pictures show is computed: brains of
ldm/data/simulation.py; latents and reconstructions of an autoencoder that starts as a block transform
(ldm/models/initialisation.py); noise added by ldm/diffusion/process.py. Nothing is trained: the prediction
is a Wiener filter's, and the steps of sampling are a brain's latents with less and less noise.
"""

import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from nibabel.orientations import axcodes2ornt, ornt_transform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from ldm import configs
from ldm.data.preprocessing import Preprocessing
from ldm.data.simulation import CONTRASTS, simulate_subject
from ldm.diffusion.process import NoiseProcess
from ldm.figures import middle, upright
from ldm.models.autoencoder import Autoencoder, LatentMoments, set_posterior_std
from ldm.models.initialisation import start_as_block_transform

SPACING = (2.0, 2.0, 2.0)  # mm
SUBJECTS = (3, 5, 8)
TIMES = (1000, 700, 450, 220)  # of the 1000 of the noise process, that sampling is shown at
NOISY = 500  # the time of the training step

WIDTH, HEIGHT = 1000, 678  # of the drawing, in hundredths of an inch
PIXELS = 2  # for each
INK, GREY, LINE = "#1f2933", "#5f6b78", "#4a5663"
TEAL, INDIGO, AMBER = "#0f766e", "#5145a8", "#b45f06"
PALE = {TEAL: "#eef7f5", INDIGO: "#f2f0fb", AMBER: "#fdf5ea"}
LATENT = LinearSegmentedColormap.from_list("latent", ["#16425b", "#5b9bb0", "#f7f5f0", "#e39a6b", "#8f2d1c"])


# ---------------------------------------------------------------- what the pictures show


@torch.no_grad()
def compute() -> dict[str, np.ndarray]:
    """Simulate, read, encode, add noise, decode.

    Returns:
        Slices (rows, columns) by name: volumes in [0, 1], latents in units of each channel's own spread.
    """
    torch.manual_seed(0)
    config = utils.load_config(Path(__file__).resolve().parents[1] / "config/config_t1_2mm.json")
    stored, volumes = zip(*map(read_back, SUBJECTS), strict=True)
    volumes = torch.from_numpy(np.stack(volumes))
    autoencoder = configs.define_network(config, "autoencoder_def").eval()
    start_as_block_transform(autoencoder, volumes)
    set_posterior_std(autoencoder, 0.1)
    encoder, moments = Autoencoder(autoencoder), LatentMoments()
    mean, std = encoder.encode(volumes)
    moments.add(mean, std)
    scale_factor = moments.scale_factor()
    latents = (mean + std * torch.randn_like(mean)) * scale_factor
    image = encoder.decode(latents[1:2] / scale_factor)
    mean, std, latents = map(standardised, (mean, std, latents))
    trained, drawn = latents[:1], latents[1:2]

    process, noise = NoiseProcess.from_config(config["NoiseScheduler"]), torch.randn_like(trained)
    noisy = process.add_noise(trained, noise, torch.tensor([NOISY]))
    a, s = process.levels(torch.tensor(NOISY))
    space = (2, 3, 4)
    power = torch.fft.fftn(latents, dim=space, norm="ortho").abs().square().mean(0)
    share = a * power / (a**2 * power + s**2)  # Wiener's: the best linear guess of the clean latents
    clean = torch.fft.ifftn(share * torch.fft.fftn(noisy, dim=space), dim=space).real
    steps = [process.add_noise(drawn, noise, torch.tensor([time])) for time in TIMES] + [drawn]
    return {
        "stored": stored[0],
        "volume": axial(volumes[0, 0]),
        "reconstruction": axial(encoder.reconstruct(volumes[:1])[0, 0]),
        "sample": axial(image[0, 0]),
        "mean": coarse(mean[0]),
        "std": coarse(std[0]),
        "latents": coarse(trained[0]),
        "noise": coarse(noise[0]),
        "noisy": coarse(noisy[0]),
        "prediction": coarse((noisy - a * clean)[0] / s),
        **{f"step {i}": coarse(step[0]) for i, step in enumerate(steps)},
    }


def read_back(subject: int) -> tuple[np.ndarray, np.ndarray]:
    """A slice of a simulated T1 scan as its file holds it, in an orientation and units of its own; and the
    volume (1, D, H, W) that it is read as."""
    simulated = simulate_subject(0, subject, SPACING)
    image = nib.Nifti1Image(simulated.image[..., CONTRASTS.index("T1w")], simulated.affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("LPS")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        nib.save(image, path)
        volume = Preprocessing((0,), SPACING)([path])
    voxels = np.asarray(image.dataobj)[:, :, image.shape[2] // 2]
    return 0.8 * voxels / voxels.max(), volume


def standardised(latents: torch.Tensor) -> torch.Tensor:
    """Each channel of (B, c, d, h, w) with mean 0 and variance 1, so that weak ones are seen too."""
    return (latents - latents.mean((0, 2, 3, 4), True)) / latents.std((0, 2, 3, 4), keepdim=True)


def axial(volume: torch.Tensor) -> np.ndarray:
    """The middle axial slice of (D, H, W), in [0, 1]."""
    return np.clip(middle_axial(volume), 0, 1)


def coarse(latents: torch.Tensor) -> np.ndarray:
    """The middle axial slice of the first channel of (c, d, h, w)."""
    return middle_axial(latents[0])


def middle_axial(volume: torch.Tensor) -> np.ndarray:
    """The middle axial slice of (D, H, W)."""
    return upright(volume.detach().float().numpy(), "axial", middle(volume.shape)[2])


# ---------------------------------------------------------------- pieces of the drawing; (x, y) is a middle


def words(axis: Axes, x: float, y: float, text: str, size: float = 11, color: str = INK, **more) -> None:
    options = {"ha": "center", "va": "center", "linespacing": 1.3} | more
    axis.text(x, y, text, fontsize=0.72 * size, color=color, **options)


def caption(axis: Axes, x: float, top: float, text: str) -> None:
    words(axis, x, top + 26, text, 11.5, GREY, va="baseline")


def box(axis: Axes, x0: float, y0: float, x1: float, y1: float, radius: float = 6, **look) -> None:
    style = f"round,pad=0,rounding_size={radius}"
    axis.add_patch(FancyBboxPatch((x0, y0), x1 - x0, y1 - y0, boxstyle=style, **look))


def picture(axis: Axes, x: float, y: float, image: np.ndarray, width: float, height: float, **how) -> None:
    extent = (x - width / 2, x + width / 2, y + height / 2, y - height / 2)
    axis.imshow(image, extent=extent, aspect="auto", zorder=3, **how)


def cards(axis: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    """The edges of others behind a picture, 8 to the right and above."""
    for shift in (8, 4):
        corner, look = (x - width / 2 + shift, y - height / 2 - shift), {"facecolor": color, "linewidth": 0.8}
        axis.add_patch(Rectangle(corner, width, height, edgecolor="white", zorder=2, **look))


def scan(axis: Axes, x: float, y: float, image: np.ndarray, width: float = 80, height: float = 96) -> None:
    cards(axis, x, y, width, height, "#39424c")
    picture(axis, x, y, image, width, height, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")


def latent(axis: Axes, x: float, y: float, image: np.ndarray, width: float = 56, height: float = 67) -> None:
    cards(axis, x, y, width, height, "#86afbf")
    picture(axis, x, y, image, width, height, cmap=LATENT, vmin=-2.4, vmax=2.4, interpolation="nearest")


def network(axis: Axes, x: float, y: float, text: str, color: str, sides: tuple[float, float, float]) -> None:
    """A shape 74 wide whose left edge, middle and right edge are so high, with its name in it."""
    places = [x - 37, x, x + 37]
    upper = [(at, y - side / 2) for at, side in zip(places, sides, strict=True)]
    lower = [(at, y + side / 2) for at, side in zip(places, sides, strict=True)]
    axis.add_patch(Polygon(upper + lower[::-1], facecolor=color, edgecolor=color, joinstyle="round", lw=4))
    words(axis, x, y, text, 11.5, "white", weight="bold")


def sign(axis: Axes, x: float, y: float, text: str) -> None:
    axis.add_patch(Circle((x, y), 12, facecolor="white", edgecolor=LINE, linewidth=1.2, zorder=3))
    words(axis, x, y - 0.5, text, 11.5, zorder=4)


def pill(axis: Axes, x: float, y: float, text: str, color: str, width: float) -> None:
    look = {"facecolor": "white", "edgecolor": color, "linewidth": 1.2}
    box(axis, x - width / 2, y - 12, x + width / 2, y + 12, 12, **look)
    words(axis, x, y, text, 10.5, color)


def arrow(axis: Axes, *places: tuple[float, float]) -> None:
    """A line through these places, with a head at the last."""
    how = {"color": LINE, "linewidth": 1.25, "zorder": 2}
    xs, ys = zip(*places, strict=True)
    if len(places) > 2:
        axis.plot(xs[:-1], ys[:-1], solid_capstyle="projecting", **how)
    head = {"arrowstyle": "-|>,head_length=4.2,head_width=2.1", "shrinkA": 0, "shrinkB": 0}
    how |= {"joinstyle": "miter", "capstyle": "butt", "mutation_scale": 1}
    axis.add_patch(FancyArrowPatch(places[-2], places[-1], **head, **how))


def band(
    axis: Axes, top: float, bottom: float, color: str, title: str, what: str, about: str, script: str
) -> None:
    """A panel with its title on the left."""
    box(axis, 12, top, WIDTH - 12, bottom, 10, facecolor=PALE[color], edgecolor="none", zorder=0)
    box(axis, 12, top, 17, bottom, 2, facecolor=color, edgecolor="none", zorder=1)
    left = {"ha": "left", "va": "top"}
    words(axis, 30, top + 17, title, 16, color, weight="bold", **left)
    words(axis, 30, top + 41, what, 12, **left)
    words(axis, 30, top + 66, about, 10.5, GREY, **left)
    words(axis, 30, bottom - 17, script, 9.6, color, family="monospace", ha="left")


# ---------------------------------------------------------------- the drawing


def draw(shown: dict[str, np.ndarray]) -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axis = figure.add_axes([0, 0, 1, 1])
    axis.set_axis_off()
    stage_1(axis, 12, shown)
    stage_2(axis, 256, shown)
    sampling(axis, 478, shown)
    axis.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="equal")
    return figure


def stage_1(axis: Axes, top: float, shown: dict) -> None:
    about = "Scans to latents and back.\nEach term of the loss\nhas its weight."
    band(axis, top, top + 234, TEAL, "Stage 1", "autoencoder", about, "train_autoencoder.py")
    y, loss = top + 98, top + 207
    caption(axis, 240, top, "scan (NIfTI)")
    scan(axis, 236, y, shown["stored"], 96, 80)
    arrow(axis, (295, y), (310, y))
    box(axis, 313, y - 34, 405, y + 34, facecolor="white", edgecolor=LINE, linewidth=1.2)
    words(axis, 359, y, "orient RAS\nresample\nintensity to [0, 1]", 9.6)
    arrow(axis, (408, y), (423, y))
    caption(axis, 470, top, "volume")
    scan(axis, 466, y, shown["volume"])
    arrow(axis, (517, y), (532, y))
    network(axis, 574, y, "encoder", TEAL, (100, 78, 56))
    arrow(axis, (616, y), (631, y))
    posterior(axis, 656, top, shown)
    arrow(axis, (689, y), (704, y))
    caption(axis, 739, top, r"$z = \mu + \sigma\,\epsilon$")
    latent(axis, 735, y, shown["latents"])
    arrow(axis, (774, y), (789, y))
    network(axis, 831, y, "decoder", TEAL, (56, 78, 100))
    arrow(axis, (873, y), (888, y))
    caption(axis, 935, top, "reconstruction")
    scan(axis, 931, y, shown["reconstruction"])

    box(axis, 492, loss - 15, 838, loss + 15, 15, facecolor="white", edgecolor=TEAL, linewidth=1.2)
    words(axis, 665, loss, "loss  =  reconstruction  +  KL  +  perceptual  +  adversarial", 10.5, TEAL)
    arrow(axis, (466, y + 52), (466, loss), (489, loss))
    arrow(axis, (656, y + 64), (656, loss - 18))
    arrow(axis, (931, y + 52), (931, loss), (841, loss))


def posterior(axis: Axes, x: float, top: float, shown: dict) -> None:
    """Mean above standard deviation."""
    caption(axis, x + 4, top, r"$\mu$ and $\sigma$")
    latent(axis, x, top + 70, shown["mean"], 44, 52)
    latent(axis, x, top + 133, shown["std"], 44, 52)


def stage_2(axis: Axes, top: float, shown: dict) -> None:
    about = "Each volume is encoded\nonce. Scale factor $s$:\n1 / std of all latents."
    band(axis, top, top + 212, INDIGO, "Stage 2", "diffusion model", about, "train_diffusion.py")
    y, low = top + 98, top + 178
    caption(axis, 232, top, "volumes")
    scan(axis, 228, y, shown["volume"])
    arrow(axis, (278, y), (292, y))
    network(axis, 333, y, "encoder", TEAL, (100, 78, 56))
    words(axis, 333, y + 62, "frozen", 10.5, TEAL, style="italic")
    arrow(axis, (374, y), (388, y))
    posterior(axis, 412, top, shown)
    arrow(axis, (444, y), (458, y))
    sign(axis, 471, y, r"$\times\,s$")
    arrow(axis, (484, y), (498, y))
    caption(axis, 532, top, "$z_0$")
    latent(axis, 528, y, shown["latents"])
    arrow(axis, (566, y), (580, y))
    sign(axis, 593, y, "+")
    arrow(axis, (606, y), (620, y))
    caption(axis, 654, top, "$z_t$")
    latent(axis, 650, y, shown["noisy"])
    arrow(axis, (688, y), (702, y))
    network(axis, 743, y, "UNet", INDIGO, (92, 52, 92))
    caption(axis, 743, top, "time $t$")
    arrow(axis, (743, top + 33), (743, y - 31))
    arrow(axis, (784, y), (798, y))
    caption(axis, 832, top, "prediction")
    latent(axis, 828, y, shown["prediction"])
    arrow(axis, (866, y), (880, y))
    pill(axis, 931, y, "squared error", INDIGO, 98)

    latent(axis, 593, low, shown["noise"], 40, 48)
    words(axis, 565, low, "noise", 11.5, GREY, ha="right")
    arrow(axis, (593, low - 34), (593, y + 14))
    arrow(axis, (624, low), (931, low), (931, y + 15))
    words(axis, 776, low - 10, "target: the noise, the velocity or $z_0$", 10.5, GREY)


def sampling(axis: Axes, top: float, shown: dict) -> None:
    about = "From noise alone, in tens\nof steps. A volume\nfollows from its seed."
    band(axis, top, top + 188, AMBER, "Sampling", "new volumes", about, "inference.py")
    y, low = top + 90, top + 160
    tiles = [216 + 84.5 * i for i in range(5)]
    caption(axis, tiles[0] + 4, top, "noise")
    caption(axis, tiles[-1] + 4, top, "$z_0$")
    for i, x in enumerate(tiles):
        latent(axis, x, y, shown[f"step {i}"])
        if i:
            arrow(axis, (x - 46, y), (x - 31, y))
            arrow(axis, (x - 38.5, low - 16), (x - 38.5, y + 6))
    box(axis, 188, low - 14, 590, low + 14, 14, facecolor=INDIGO, edgecolor="none")
    words(axis, 389, low, "UNet, $N$ steps", 11.5, "white", weight="bold")
    arrow(axis, (593, y), (608, y))
    sign(axis, 622, y, r"$\div\,s$")
    arrow(axis, (636, y), (650, y))
    network(axis, 692, y, "decoder", TEAL, (56, 78, 100))
    words(axis, 692, y + 62, "frozen", 10.5, TEAL, style="italic")
    arrow(axis, (734, y), (749, y))
    caption(axis, 796, top, "volume (NIfTI)")
    scan(axis, 792, y, shown["sample"])
    arrow(axis, (843, y), (857, y))
    box(axis, 860, y - 34, 980, y + 34, facecolor="white", edgecolor=AMBER, linewidth=1.2)
    words(axis, 920, y - 14, "evaluate", 11.5, AMBER, weight="bold")
    words(axis, 920, y + 11, "samples against\nheld-out scans", 9.8, GREY)


if __name__ == "__main__":
    draw(compute()).savefig(Path(__file__).resolve().parents[1] / "figs/pipeline.png", dpi=100 * PIXELS)
