"""Survival: who has the event earlier, when some have not had it yet. Targets are (n, 2) float32: time and event.

`loss = "cox"` is Cox's partial likelihood (1972), with the risk sets of a batch and Breslow's ties: what a record adds
depends on the others, so it cannot go with record-level privacy. `loss = "discrete-time"` is the likelihood of one
record under a hazard for each of `task.intervals` (Singer and Willett 1993), and can.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.networks import tabular
from client.scores import c_index
from strategies.job_data import Data
from strategies.job_task import TaskChoice


class Survival:
    """One log-hazard for each record (cox), or one logit of the hazard in each public interval (discrete-time)."""

    target_type = "time"
    models = ("linear", "mlp", "resnet", "ft-transformer")
    losses = ("cox", "discrete-time")

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        self._choice = choice
        self._ends = torch.tensor(choice.intervals or [], dtype=torch.float32)
        self._starts = torch.cat([torch.zeros(min(1, len(self._ends))), self._ends[:-1]])

    @property
    def coupled(self) -> bool:
        """Whether a record's loss depends on others of its batch."""
        return not len(self._ends)

    def model(self, features: int, classes: int) -> nn.Module:
        return tabular(self._choice, features, max(1, len(self._ends)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,): with cox zero for who is censored, so that the mean is that of the events' terms over the batch."""
        time, event = targets.unbind(dim=-1)
        if self.coupled:
            return negative_partial_likelihood(outputs.squeeze(-1), time, event)
        starts, ends = self._starts.to(time.device), self._ends.to(time.device)
        # An interval is survived by whom it ends for before their time is up; who is censored within one tells nothing
        # of it, and who had the event after the last interval survived them all.
        died = event[..., None] * ((starts < time[..., None]) & (time[..., None] <= ends))
        survived = (ends < time[..., None]) | ((ends == time[..., None]) & (event[..., None] == 0))
        return -(died * functional.logsigmoid(outputs) + survived * functional.logsigmoid(-outputs)).sum(dim=-1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"loss": self.loss(outputs, targets)}

    def scores(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        time, event = targets.unbind(dim=-1)
        return {"c_index": c_index(self.risk(outputs).numpy(), time.numpy(), event.numpy())}

    def risk(self, outputs: Tensor) -> Tensor:
        """(B,): higher for who is expected to have the event earlier; with intervals, minus the expected time."""
        if self.coupled:
            return outputs.squeeze(-1)
        surviving = functional.logsigmoid(-outputs).cumsum(dim=-1).exp()
        at_start = torch.cat([torch.ones_like(surviving[..., :1]), surviving[..., :-1]], dim=-1)
        return -(at_start * (self._ends - self._starts).to(outputs.device)).sum(dim=-1)


def negative_partial_likelihood(log_hazard: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """(B,) each -> (B,): for an event log sum exp(log_hazard of all with no earlier time) - log_hazard, else zero.

    Ties are Breslow's: events at one time have the same risk set, themselves included.
    """
    order = torch.argsort(time, descending=True, stable=True)
    falling = time[order]
    # The risk set of a record ends with the last of its time.
    last = torch.searchsorted(-falling, -falling, right=True) - 1
    at_risk = torch.logcumsumexp(log_hazard[order], dim=0)[last]
    terms = torch.empty_like(at_risk).scatter(0, order, at_risk)
    return event * (terms - log_hazard)
