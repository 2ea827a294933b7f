"""One temperature a peer, under which the peers' scores can be compared.

Of two peers that are right equally often, the one that is surer of itself wins more samples than it
is worth. Divided by a temperature that was fitted on held-out data, the logits of both mean what
they say. Only the choice of the teacher is made by them; what it teaches stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.calibration import COLDEST, HOTTEST, TemperatureFit
from common.distributed import World

_logger = logging.getLogger(__name__)

WHEN = ("off", "start", "epoch")
METRIC = "score_temperature"


class ScoreTemperatures:
    """The temperatures of a group of peers, fitted where the peers are evaluated.

    They are the same on all processes.

    Args:
        names: Of the peers, in order.
        when: ``start``: fitted at the first evaluation; ``epoch``: at every one.
        world: Where this process stands.

    Attributes:
        values: What each peer's logits are divided by [N], on the device; 1 until they are fitted.
            Changed in place, so that peers can hold their own element.

    Raises:
        ValueError: ``when`` is neither.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling).
    """

    def __init__(self, names: Sequence[str], when: str, world: World) -> None:
        if when not in WHEN[1:]:
            raise ValueError(f"when is {when!r}; choose from {', '.join(WHEN[1:])}")
        self.names = list(names)
        self.when = when
        self.world = world
        self.values = torch.ones(len(self.names), device=world.device)
        self._fitted = False

    @property
    def due(self) -> bool:
        """Whether the next evaluation is to fit them."""
        return self.when == "epoch" or not self._fitted

    def of(self, name: str) -> Tensor:
        """Return a peer's temperature, a scalar that follows every later fit."""
        return self.values[self.names.index(name)]

    def fit(self, fits: Sequence[TemperatureFit]) -> None:
        """Take what was found on this process's share of the data. All must call it.

        Args:
            fits: Of the peers that are here, in order.

        Raises:
            ValueError: No sample.
        """
        shares = distributed.gather_objects(
            torch.stack([fit.sums.cpu() for fit in fits]), self.world.replicas
        )
        for fit, sums in zip(fits, torch.stack(shares).sum(dim=0), strict=True):
            fit.sums = sums
        found = distributed.gather_over_team([fit.temperature() for fit in fits], self.world)
        self.values.copy_(torch.tensor(found))
        self._fitted = True
        if self.world.is_main:
            told = ", ".join(f"{name} {t:.3f}" for name, t in zip(self.names, found, strict=True))
            _logger.info("scores are compared at the temperatures %s", told)
            for name, t in zip(self.names, found, strict=True):
                if t in (COLDEST, HOTTEST):
                    _logger.warning(
                        "%s: the score temperature is at its limit, %g: it is right on every "
                        "held-out sample, or guesses; its scores are not calibrated",
                        name,
                        t,
                    )

    def metrics(self) -> dict[str, float]:
        """Return ``PEER/score_temperature``, as an evaluation's metrics; waits for the device."""
        return {
            f"{name}/{METRIC}": value
            for name, value in zip(self.names, self.values.tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs."""
        return {"values": self.values.cpu() if self._fitted else None}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up fitted temperatures; of a run that had none, they are fitted at the next turn."""
        if state is not None and state["values"] is not None:
            self.values.copy_(state["values"])
            self._fitted = True
