"""A plan that is being made: a config, and the reason of each of its choices."""

import copy
from dataclasses import dataclass

from ldm.configs import check_config, drop, put
from ldm.data.prepare import STAGES as STAGES

REMOVED = object()  # in the place of a value that was deleted by hand


@dataclass(frozen=True)
class Machine:
    """What the config is for. `memory` is in bytes; `minutes` limit both stages together, if given."""

    memory: int
    gpu: bool
    minutes: float | None = None


class Plan:
    """A config that grows, with the reason of each choice.

    Args:
        overrides: {dotted key: (value, reason)} that win over every choice, or `REMOVED`. The
            forecasts count with them.

    Attributes:
        grids: of the levels of the UNet, in voxels.
        lowres_spacing: in mm; of a training that should come first, if any.
    """

    def __init__(self, overrides: dict[str, tuple[object, str]] | None = None):
        self.config, self.why, self.overrides = {}, {}, overrides or {}
        self.grids, self.lowres_spacing = [], None

    def set(self, key: str, value: object, why: str | None = None) -> None:
        """Choose the value of a dotted key. Several that one reason holds for have it at the first."""
        put(self.config, key, value)
        if why:
            self.why[key] = why

    def result(self) -> dict:
        """The config with the overrides, and with the reasons as `_why`."""
        config, why = copy.deepcopy(self.config), dict(self.why)
        if "intensity.window" in self.overrides:  # windows and percentiles exclude each other
            kept = config.get("intensity", {})
            config["intensity"] = {key: kept[key] for key in ("whole_numbers",) if key in kept}
        elif {"intensity.lower_percentile", "intensity.upper_percentile"} & self.overrides.keys():
            for key in ("window", "whole_numbers"):
                config.get("intensity", {}).pop(key, None)
        for key, (value, reason) in self.overrides.items():
            if value is REMOVED:
                drop(config, key)
                why.pop(key, None)
            else:
                put(config, key, copy.deepcopy(value))
                why[key] = reason
        return {"_why": why, **config}

    def checked(self) -> dict:
        """The config as the training scripts use it."""
        return check_config(self.result(), "the plan")
