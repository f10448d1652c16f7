"""Intensities of a scanner to [0, 1], and back."""

from dataclasses import dataclass, replace

import numpy as np

from ldm.configs import channels_of

LARGEST_VALUE = 1e37  # differences and sums of such values are float32, too
BULK = 99.9  # % of the voxels; a note is given where values further out set the range
FAR_BELOW, FAR_ABOVE, FAR_BELOW_PADDING = 0.5, 0.9, 0.33  # of the range from 0 to 1, without the bulk
LEAST_OF_WINDOW = 0.05
LATER = ("window", "nonzero", "nan_is_background")  # keys that older caches lack: they count only where used


@dataclass(frozen=True)
class Intensity:
    """How the values of a file become 0 to 1.

    Args:
        lower, upper: percentiles of the whole volume that become 0 and 1, without a `window`.
        clip: clip to [0, 1].
        window: for each channel the two values that become 0 and 1, the same in every volume.
        nan_is_background: NaN becomes background, see `without_nan`; else it is an error.
        nonzero: percentiles of the voxels that are not 0 alone.
    """

    lower: float | None = 0.0
    upper: float | None = 99.5
    clip: bool = True
    window: tuple[tuple[float, float], ...] | None = None
    nan_is_background: bool = False
    nonzero: bool = False

    @classmethod
    def from_config(cls, config: dict) -> "Intensity":
        """The config's section `intensity`, with a window for each channel that is used."""
        section = config["intensity"]
        window = section["window"]
        if window is not None:
            pairs = window if isinstance(window[0], list) else [window] * len(channels_of(config))
            window = tuple((float(low), float(high)) for low, high in pairs)
        ends = (section["lower_percentile"], section["upper_percentile"])
        return cls(*ends, section["clip"], window, section["nan_is_background"], section["nonzero"])

    def __str__(self) -> str:
        """What becomes 0 and 1."""
        if self.window is None:
            of = "what is not 0 in each volume" if self.nonzero else "each volume"
            return f"percentiles {self.lower:g} and {self.upper:g} of {of}"
        return "the values " + ", ".join(f"{low:g} and {high:g}" for low, high in self.window)

    def of_channel(self, c: int) -> "Intensity":
        """That of channel `c` alone, an index into the channels that are used."""
        return self if self.window is None else replace(self, window=(self.window[c],))

    def limits(self, volume: np.ndarray) -> np.ndarray:
        """The values that become 0 and 1 in each channel of a whole volume: (C, D, H, W) -> (C, 2)."""
        if self.window is not None:
            return np.array(self.window)
        ends, channels = [self.lower, self.upper], volume.reshape(len(volume), -1)
        if not self.nonzero:
            return np.percentile(channels, ends, axis=1).T
        some = [channel[channel != 0] if channel.any() else channel for channel in channels]
        return np.stack([np.percentile(channel, ends) for channel in some])

    def nonfinite_reason(self, voxels: np.ndarray) -> str | None:
        """Why voxels of a channel, as stored, cannot be mapped (NaN, infinite), or None."""
        nan, infinite = np.count_nonzero(np.isnan(voxels)), np.count_nonzero(np.abs(voxels) > LARGEST_VALUE)
        if infinite:
            return f"has {infinite} infinite voxels, or beyond {LARGEST_VALUE:g}. Fix or remove the file"
        if nan == voxels.size:
            return "every voxel is NaN. Remove the file"
        if nan and not self.nan_is_background:
            return (
                f"has {nan} NaN voxels. Set intensity.nan_is_background to true in the config if they lie "
                "outside of the body; else fix or remove the file"
            )
        return None

    def without_nan(self, voxels: np.ndarray) -> np.ndarray:
        """A channel with NaN replaced by the low end of its window, else by its least value."""
        if not np.isnan(voxels).any():
            return voxels
        low = self.window[0][0] if self.window else np.nanmin(voxels)
        return np.where(np.isnan(voxels), np.float32(low), voxels)

    def constant_reason(self, voxels: np.ndarray, limits: np.ndarray) -> str | None:
        """Why a channel shows nothing once its `limits` (2,) are mapped to 0 and 1, or None."""
        low, high = voxels.min(), voxels.max()
        if low == high:
            return "all zero" if low == 0 else f"constant: every voxel is {low:g}"
        if self.window and (low >= limits[1] or high <= limits[0]):
            return (
                f"its values, {low:g} to {high:g}, lie outside of intensity.window, {limits[0]:g} to "
                f"{limits[1]:g}. Is it in other units?"
            )
        if limits[1] <= limits[0]:
            return (
                f"constant between its percentiles {self.lower:g} and {self.upper:g}: nearly empty. Remove "
                "it, or change `intensity` in the config"
            )
        return None

    def low_contrast_reason(self, voxels: np.ndarray, limits: np.ndarray) -> str | None:
        """Why most of a channel takes up little of the range from 0 to 1, or None.

        The file is good, the mapping is not: a stray voxel, or padding below all tissue, becomes 0.
        """
        (low, high), (least, most) = limits, (voxels.min(), voxels.max())
        a, b = np.percentile(voxels, [100 - BULK, BULK])
        bulk = f"{BULK:g} % of its voxels lie between {a:.4g} and {b:.4g}"
        if self.window:
            if min(b, high) - max(a, low) < LEAST_OF_WINDOW * (high - low):
                return f"{bulk}, a small part of intensity.window, {low:g} to {high:g}. Is it in other units?"
            return None
        remedy = "or set intensity.window"
        if not self.clip:
            low, high = min(low, least), max(high, most)
        if a - low > FAR_BELOW * (high - low):
            return f"minimum {least:.4g}, but {bulk}: raise intensity.lower_percentile {remedy}"
        if high - b > FAR_ABOVE * (high - low):
            return f"maximum {most:.4g}, but {bulk}: lower intensity.upper_percentile {remedy}"
        if low >= 0:  # 0 around bright tissue is proper background
            return None
        above = voxels[voxels > low + 0.01 * (high - low)]
        share = 1 - above.size / voxels.size
        if above.size and share > 1 - BULK / 100:
            a = np.percentile(above, 2)
            if a - low > FAR_BELOW_PADDING * (high - low):
                return (
                    f"{share:.1%} of its voxels are {low:.4g} or less, nearly all others lie above {a:.4g}: "
                    "padding takes up much of the range. Set intensity.window"
                )
        return None


def to_unit_range(volume: np.ndarray, limits: np.ndarray, clip: bool) -> np.ndarray:
    """Map each channel's `limits` (C, 2) to 0 and 1; values outside are clipped where `clip`."""
    low, high = (limits[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
    volume = ((volume - low) / (high - low)).astype(np.float32)
    return np.clip(volume, 0, 1) if clip else volume


def from_unit_range(volume: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Inverse of `to_unit_range`, without its clipping."""
    low, high = (limits[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
    return (volume * (high - low) + low).astype(np.float32)
