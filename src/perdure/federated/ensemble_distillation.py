"""Distillation on public data: the server trains the average model to answer as all clients do."""

import copy
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from perdure.errors import ConfigError, FederationError
from perdure.federated.messages import load_record, shared, to_record
from perdure.utils.seeding import generator


class EnsembleDistillation(FedAvg):
    """FedAvg, and then steps on public inputs towards the average answers of the round's clients.

        theta  = sum_k w_k theta_k / sum_k w_k
        q(x)   = softmax(mean_k f(x, theta_k) / T)
        minimise over theta:  mean over x of  -sum_c q_c(x) log softmax(f(x, theta) / T)_c

    The inputs need no labels. Clients and server must have agreed on them before the run: inputs
    that depend on private records would be a release that no ledger counts. Clients do not see them
    in training. The server must be able to read every update. All parameters that need a gradient
    are trained, so do not use it with strategies that fix some of them, such as `PackNet`.

    Guarantee: the differential privacy of the clients' updates is kept, as post-processing.

    >>> from perdure.federated import EnsembleDistillation, Federation
    >>> aggregator = EnsembleDistillation(model, public=inputs, steps=20)
    >>> federation = Federation(clients=10, rounds=5, aggregator=aggregator)

    Args:
        model: model like those of the clients; it is copied.
        public: (n, ...) public inputs, in the shape of the records.
        steps: number of Adam's steps after each round.
        batch_size: number of inputs of one step.
        learning_rate: rate of Adam.
        temperature: divisor of the logits (T).
        seed: seed of the choice of inputs.

    Raises:
        ConfigError: if an argument is out of range.

    Source: Lin, Kong, Stich and Jaggi 2020, "Ensemble distillation for robust model fusion in
    federated learning" (FedDF), algorithm 1, for models of one architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        public: Tensor,
        steps: int = 50,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number in (("steps", steps), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError.of(f"EnsembleDistillation.{name}", number, "whole numbers from 1")
        for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ConfigError.of(f"EnsembleDistillation.{name}", value, "a number above 0")
        if public.dim() < 2 or not len(public) or not bool(torch.isfinite(public).all()):
            shape = f"inputs of shape {tuple(public.shape)}"
            allowed = "finite inputs (n, ...), at least one"
            raise ConfigError.of("EnsembleDistillation.public", shape, allowed)
        self.model = copy.deepcopy(model)
        self.public = public.detach().cpu().contiguous()
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.seed = seed
        # a stopped run may only go on with the same inputs
        self.public_digest = hashlib.sha256(self.public.numpy().tobytes()).hexdigest()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' parameters, and distil their answers into the average."""
        answers = list(replies)
        average, metrics = super().aggregate_train(server_round, answers)
        if average is None:
            return None, metrics
        records = [
            cast(ArrayRecord, reply.content["arrays"]) for reply in answers if not reply.has_error()
        ]
        self.model.eval()
        targets = self.mean_logits(records)
        load_record(self.model, average)
        self.distil(targets, server_round)
        return to_record({n: v.detach() for n, v in shared(self.model).items()}), metrics

    def mean_logits(self, records: Sequence[ArrayRecord]) -> Tensor:
        """Return the mean logits (n, C) of the clients' models for the public inputs.

        Models with NaN or infinite logits are left out.

        Raises:
            FederationError: if no model has finite logits.
        """
        total: Tensor | None = None
        finite = 0
        for record in records:
            load_record(self.model, record)
            with torch.no_grad():
                pieces = torch.split(self.public, self.batch_size)
                logits = torch.cat([self.model(piece) for piece in pieces])
            if logits.isfinite().all():
                total = logits if total is None else total + logits
                finite += 1
        if total is None:
            raise FederationError(
                "EnsembleDistillation: the models of all clients have NaN or infinite logits for "
                "the public inputs; set federation.max_update_norm, or lower the learning rate"
            )
        return total / finite

    def distil(self, targets: Tensor, server_round: int) -> None:
        """Train the model towards the targets (n, C) for the public inputs."""
        trained = [value for value in self.model.parameters() if value.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        draws = generator(self.seed, "ensemble distillation", server_round)
        goals = torch.softmax(targets / self.temperature, dim=-1)
        for _ in range(self.steps):
            rows = torch.randint(len(self.public), (self.batch_size,), generator=draws)
            logits = self.model(self.public[rows]) / self.temperature
            loss = -(goals[rows] * torch.log_softmax(logits, dim=-1)).sum(-1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
