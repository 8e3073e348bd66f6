"""Recorder of the rounds of a federation, from the parameters that the server gets anyway."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from perdure.doctor.probing import probe_layers
from perdure.doctor.trace import Round
from perdure.learner.learner import Learner
from perdure.utils.seeding import generator

COORDINATES = 4096
"""Number of coordinates of an update that are compared, so that many clients need little memory."""
ROWS = 128
"""Number of public rows on which the global model is measured after a round."""


@dataclass(kw_only=True, eq=False)
class RoundRecorder:
    """Updates of the clients and steps of the server, in one experience of a federation.

    Args:
        experience: index of the experience.
    """

    experience: int
    rounds: list[Round] = field(default_factory=list)
    _global: Tensor | None = None
    _updates: dict[int, Tensor] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """True between the beginning and the end of a round."""
        return self._global is not None

    def begin(self, server: Learner) -> None:
        """Keep the global parameters at the beginning of a round."""
        self._global = _sample(server)
        self._updates = {}

    def trained(self, client: Learner) -> None:
        """Keep the update of a client that has trained its block of the round."""
        if self._global is not None:
            self._updates[client.client] = _sample(client) - self._global
            declared = client.stream[client.position.experience].train.declared_size
            self._sizes[client.client] = declared

    def end(self, server: Learner) -> None:
        """Compare the updates of a round, and measure the new global model."""
        if self._global is None or not self._updates:
            self._global = None
            return
        clients = list(self._updates)
        updates = torch.stack(list(self._updates.values())).double()
        others = updates.sum(0) - updates
        cosines = torch.nn.functional.cosine_similarity(updates, others, dim=1)
        norms = updates.norm(dim=1)
        step = (_sample(server) - self._global).double().norm()
        self.rounds.append(
            Round(
                number=len(self.rounds),
                norms=dict(zip(clients, norms.tolist(), strict=True)),
                cosines=dict(zip(clients, cosines.tolist(), strict=True)),
                sizes=dict(self._sizes),
                server_step=float(step),
                loss=_public_loss(server, self.experience),
            )
        )
        self._global = None


def _sample(learner: Learner) -> Tensor:
    """Return the values of a fixed sample of the coordinates of the parameters."""
    values = [value.detach() for value in learner.params.values()]
    stride = max(1, sum(value.numel() for value in values) // COORDINATES)
    return torch.cat([value.flatten()[::stride].float().cpu() for value in values])


def _public_loss(server: Learner, experience: int) -> float | None:
    test = server.stream[experience].test
    if not len(test):
        return None
    drawn = torch.randperm(len(test), generator=generator(0, "doctor", experience))[:ROWS]
    rows = test.take(drawn.to(test.inputs.device)).to(server.device)
    outputs, _ = probe_layers(server.model, rows.inputs)
    context = server.session.context(experience)
    mask = None if context.scenario == "domain" else context.allowed
    return float(context.task.losses(outputs, rows.labels, mask).float().mean())
