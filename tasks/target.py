"""What `prune.target` asks of a model: the size that a plan must have, and how to say it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.values import parse_target

if TYPE_CHECKING:
    from saap.models.groups import Groups
    from saap.pruning.target import Size

Measured = Iterable[tuple[str, float, float]]  # as `saap.DecodeTime` takes it


@dataclass(frozen=True)
class Aim:
    """size: of a plan, in parameters, bytes, or time a token beside the dense model's; wanted: what it is to be."""

    what: str
    size: "Size"
    wanted: float

    def say(self, size: float, smallest: bool = False) -> str:
        """A size as a target says it; of the smallest one rounded so that it can be asked for."""
        if self.what == "speed":
            return f"{math.floor(100 / size) / 100 if smallest else 1 / size:.2f}x"
        scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= 10 * s or s == 1e3)
        unit = unit if self.what == "bytes" else {"GB": "B", "MB": "M", "KB": "K"}[unit]
        return f"{(math.ceil if smallest else math.floor)(10 * size / scale) / 10:g}{unit}"


def aim_of(params: Mapping[str, Any], model: Any, groups: "Groups", measured: Measured | None = None) -> Aim:
    """The aim of a prune stage with these params. model: the dense one, also on the meta device."""
    import saap

    what, amount = parse_target(params["target"])
    if what == "speed":
        assert measured is not None
        return Aim(what, saap.DecodeTime(groups, measured), 1 / amount)
    form, bias = params.get("form"), params["compensation"] == "bias"
    left = saap.Footprint(model, groups, params["dtype"], groupwise=form, output_bias=bias)
    return Aim(what, left.weight_bytes if what == "bytes" else left.parameters, amount)
