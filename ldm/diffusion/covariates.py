"""Numbers and categories of `participants.tsv` that a model is conditioned on, such as age and sex."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldm import UserError
from ldm.models.embedding import encoded_size


def shares_of(name: str, text: str) -> list[float]:
    """The share in `--structure-size name=text`, or the two ends of a range of shares. Raises UserError: it
    is neither."""
    try:
        shares = [float(one) for one in text.split(":")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise UserError(
            f"--structure-size {name}={text}: expected a share from 0, the smallest, to 1, the largest, or a "
            "range such as 0.2:0.8. For sizes in ml use --condition."
        )
    return shares


@dataclass(frozen=True)
class Covariates:
    """The covariates of a model, and how they enter its network.

    Encoded, a number is one input, 0 and 1 at the ends of its range, and a category is one input for each
    that there is; one more input of each covariate says whether it is unknown.

    Args:
        columns: of the table; for each the range [low, high] of a number, or the categories, a list of texts.
        into: `embedding`, added to the time embedding; `cross_attention`, as a context of one token;
            `channels`, constant channels beside the latents (Pinaya et al., 2022); `mean_latent`, by what is
            expected of the latents, see `deviations`; or several of them.
        unknown: whether values may be unknown. Weights from elsewhere may have no inputs for that.
        rows: the values of training volumes, None where unknown, from which a sample draws what it is not
            given.
    """

    columns: dict[str, Sequence]
    into: Sequence[str] = ("embedding",)
    unknown: bool = True
    rows: Sequence[Sequence] = ()

    def is_number(self, name: str) -> bool:
        """Whether a covariate is a number."""
        return not isinstance(self.columns[name][0], str)

    @property
    def size(self) -> int:
        """How many numbers encode the covariates of a volume."""
        return encoded_size(self.columns, self.unknown)

    @property
    def example(self) -> dict:
        """Values of a training volume; of weights from elsewhere the lower ends and the first categories."""
        first = self.rows[0] if self.rows else [known[0] for known in self.columns.values()]
        return dict(zip(self.columns, first, strict=True))

    def names_of_inputs(self) -> list[str]:
        """What each of these numbers says."""
        names = []
        for name, known in self.columns.items():
            if self.is_number(name):
                names.append(f"{name}, 0 at {known[0]:g} and 1 at {known[1]:g}")
            else:
                names += [f"{name} is {one}" for one in known]
            names += [f"{name} is unknown"] * self.unknown
        return names

    def encode(self, values: dict) -> torch.Tensor:
        """Values by name, None or left out where unknown -> (size,) float32.

        Raises:
            UserError: a value is unknown, which the model has no input for.
        """
        numbers = []
        for name, known in self.columns.items():
            value = values.get(name)
            if value is None and not self.unknown:
                raise UserError(f"{name}: this model needs a value. Give one by --condition {name}=VALUE.")
            if self.is_number(name):
                numbers.append(0.0 if value is None else (value - known[0]) / (known[1] - known[0]))
            else:
                numbers += [float(one == value) for one in known]
            numbers += [float(value is None)] * self.unknown
        return torch.tensor(numbers)

    @functools.cached_property
    def centres(self) -> torch.Tensor:
        """The mean of each encoded number over the training volumes where it is known, (size,)."""
        rows = torch.stack([self.encode(dict(zip(self.columns, row, strict=True))) for row in self.rows])
        known = 1 - rows @ self._flags
        return (rows * known).sum(0) / known.sum(0).clamp_min(1)

    @functools.cached_property
    def _flags(self) -> torch.Tensor:
        """(size, size): from encoded values to 1 where a number belongs to a covariate that is unknown, and
        where it is such a flag itself."""
        flags = torch.zeros(self.size, self.size)
        first = 0
        for name, known in self.columns.items():
            last = first + (1 if self.is_number(name) else len(known))
            if self.unknown:
                flags[last, first : last + 1] = 1
            first = last + self.unknown
        return flags

    def deviations(self, vectors: torch.Tensor) -> torch.Tensor:
        """How encoded covariates (B, size) differ from the mean of the training set; 0 where unknown. On
        these the latents of the training set are regressed (`ldm.training.latents.Latents.regression`)."""
        flags, centres = self._flags.to(vectors.device), self.centres.to(vectors.device)
        is_flag = flags.diagonal()
        return (vectors - centres) * (1 - vectors @ flags).clamp_min(0) * (1 - is_flag)

    def parse(self, name: str, text: str) -> float | tuple[float, float] | str | None:
        """The value in `--condition name=text`: a number, or the two ends of a range, `20:80`; a category;
        None of `unknown`.

        Raises:
            UserError: it is none of these.
        """
        known = self.columns[name]
        if text == "unknown" and self.unknown:
            return None
        if not self.is_number(name):
            if text not in known:
                raise UserError(f"--condition {name}={text}: expected one of {', '.join(known)}.")
            return text
        low, colon, high = text.partition(":")
        try:
            ends = float(low), float(high if colon else low)
        except ValueError:
            ends = 1.0, 0.0
        if not ends[0] <= ends[1] or not all(map(math.isfinite, ends)):
            raise UserError(
                f"--condition {name}={text}: expected a number, or a range such as {known[0]:g}:{known[1]:g}."
            )
        return ends if colon else ends[0]

    def at_share(self, name: str, text: str) -> float | tuple[float, float]:
        """The size in `--structure-size name=text`: a share of its range, 0 the least and 1 the greatest of
        the training volumes, or a range of shares, `0.2:0.8`.

        Raises:
            UserError: it is neither.
        """
        low, high = self.columns[name]
        ends = [
            min(max(float(f"{low + share * (high - low):.6g}"), low), high)  # as records write it
            for share in shares_of(name, text)
        ]
        return ends[0] if len(ends) == 1 else tuple(ends)

    def outside(self, values: dict) -> list[str]:
        """Which numbers lie beyond what the model was trained on, in words."""
        found = []
        for name, value in values.items():
            if name in self.columns and self.is_number(name) and value is not None:
                low, high = self.columns[name]
                ends = value if isinstance(value, tuple) else (value, value)
                if ends[0] < low or ends[1] > high:
                    found.append(f"{name} lies beyond {low:g} to {high:g}, which the model was trained on")
        return found

    def complete(self, values: dict, generator: torch.Generator) -> dict:
        """Values for one sample: of a range a uniform draw; what is not given is that of a training volume,
        all of the same.

        Raises:
            UserError: something is not given, and the model does not say what it was trained on.
        """
        missing = [name for name in self.columns if name not in values]
        if missing and not self.rows:
            raise UserError(
                f"{', '.join(missing)}: the weights do not say what they were trained on. Give a value by "
                f"--condition {missing[0]}=VALUE."
            )
        place = int(torch.randint(max(1, len(self.rows)), (), generator=generator))
        drawn = dict(zip(self.columns, self.rows[place], strict=True)) if self.rows else {}
        complete = {}
        for name in self.columns:
            share = float(torch.rand((), generator=generator))
            value = values.get(name, drawn.get(name))
            if isinstance(value, tuple):
                drawn_value = float(f"{value[0] + share * (value[1] - value[0]):.6g}")  # as records write it
                value = min(max(drawn_value, value[0]), value[1])
            complete[name] = value
        return complete
