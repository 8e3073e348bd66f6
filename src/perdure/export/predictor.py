"""Predictor of a trained learner as one torch module, with all tensors that predictions need."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import ConfigError, ExportError
from perdure.learner.averaging import put_values
from perdure.learner.learner import Learner
from perdure.types import SCENARIOS, Params
from perdure.utils.atomic_files import save_tensors
from perdure.utils.modules import end_training

WEIGHTS = "model.safetensors"
"""File with the weights of the bare model."""
STATE = "predictor.safetensors"
"""File with the tensors that the predictor reads beside the weights."""
OF_STATE = "state."
"""Prefix of the names of the strategy's own tensors in the file `STATE`."""


class _OncePerInput(Forward):
    """Forward pass that caches logits and features, because every task predicts the same input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._logits: tuple[Tensor, Tensor] | None = None
        self._features: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C) logits."""
        if self._logits is None or self._logits[0] is not x:
            self._logits = (x, super().__call__(x))
        return self._logits[1]

    def features(self, x: Tensor) -> Tensor:
        """(n, f) features, which are the input of the head."""
        if self._features is None or self._features[0] is not x:
            self._features = (x, super().features(x))
        return self._features[1]


class Predictor(nn.Module):
    """Torch module that predicts as a trained learner: inputs (n, ...) to outputs (n, ..., C).

    The model is the sub-module `model`; the tensors of the strategy's state are buffers. On
    task-incremental streams `forward` also takes the task (n,) of every record.

    Args:
        model: trained model, on the CPU and in evaluation mode; it is not copied.
        strategy: strategy whose `predict` computes the outputs.
        state: state of the strategy after training.
        contexts: one context for every task of a task-incremental stream; else a single one.
    """

    def __init__(
        self, model: nn.Module, strategy: Strategy, state: State, contexts: Sequence[Context]
    ) -> None:
        super().__init__()
        self.model = model.to("cpu")
        end_training(self.model)
        self.strategy = strategy
        self.contexts = tuple(
            replace(each, task_classes=each.task_classes.cpu(), seen=each.seen.cpu())
            for each in contexts
        )
        # The default of `predict` reads no state: a Fisher matrix need not travel.
        read = dict(state) if strategy.uses("predict") else {}
        self._names = {name: f"state_{i}" for i, name in enumerate(read)}
        self._numbers: dict[str, Tensor] = {}
        for name, value in read.items():
            kept = value.detach().cpu().clone()
            self.register_buffer(self._names[name], kept)
            if not kept.dim():
                self._numbers[name] = kept

    @property
    def by_task(self) -> bool:
        """True if the outputs depend on the task of a record."""
        return self.contexts[0].scenario == "task"

    @property
    def needs_more_than_masks(self) -> bool:
        """True if the strategy predicts with more than the model and a mask of classes."""
        return self.strategy.uses("predict")

    @property
    def tensors(self) -> Params:
        """Tensors of the strategy's state that predictions need, by name."""
        return {name: self.get_buffer(own) for name, own in self._names.items()}

    def without(self, buffers: Sequence[str]) -> "Predictor":
        """Return the predictor with some buffers emptied, on which no output depends."""
        lighter = copy.copy(self)
        lighter._buffers = {
            own: value if value is None or own not in buffers else value.new_empty(0)
            for own, value in self._buffers.items()
        }
        return lighter

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the outputs (n, ..., C) for inputs (n, ...).

        Args:
            x: (n, ...) inputs.
            task: (n,) int64 task of every record; on task-incremental streams only.
        """
        state = self._state()
        run = _OncePerInput(self.model)
        answers = [self.strategy.predict(run, x, context, state) for context in self.contexts]
        if task is None:
            return answers[0]
        return torch.stack(answers, 1)[torch.arange(x.shape[0], device=x.device), task]

    def _state(self) -> State:
        """Return the strategy's state for `predict`.

        Single numbers are new constants, so that a traced strategy may branch on them (PackNet).
        """
        tensors = {
            name: torch.tensor(self._numbers[name].item(), dtype=self._numbers[name].dtype)
            if name in self._numbers
            else value
            for name, value in self.tensors.items()
        }
        return State(tensors, dict.fromkeys(tensors, "local"))


def predictor_of(learner: Learner) -> Predictor:
    """Return a copy of a learner's predictor, as after the last experience that it has learnt.

    Args:
        learner: learner that was fitted, or of a finished run.
    """
    session = learner.session
    position = session.position
    after = max(0, position.experience - (not position.begun))
    stream = session.stream
    numbers = [after]
    if stream.scenario == "task":
        numbers = [stage.latest(after) for stage in stream.stages]
    model = copy.deepcopy(session.model)
    put_values(dict(model.named_parameters()), session.average.values)
    return Predictor(
        model,
        session.strategy,
        session.state,
        [session.context(number) for number in numbers],
    )


def write_predictor(predictor: Predictor, folder: Path) -> None:
    """Write the model's weights, and the other tensors that predictions need, to two files."""
    save_tensors(folder / WEIGHTS, predictor.model.state_dict())
    contexts = predictor.contexts
    facts = {
        "scenario": torch.tensor(SCENARIOS.index(contexts[0].scenario)),
        "classes": contexts[0].task_classes,
        "seen": torch.stack([context.seen for context in contexts]),
        "after": torch.tensor([context.experience for context in contexts]),
    }
    state = {f"{OF_STATE}{name}": value for name, value in predictor.tensors.items()}
    save_tensors(folder / STATE, facts | state)


def read_predictor(folder: Path | str, *, model: nn.Module, strategy: Strategy) -> Predictor:
    """Read a predictor from the two safetensors files of an export.

    Args:
        folder: folder of the export.
        model: module of the exported architecture; its weights are replaced.
        strategy: strategy with the same settings as the exported one; the model card lists them.

    Raises:
        ExportError: if a file cannot be read.
        ConfigError: if the weights do not fit the model.
    """
    weights = _tensors_of(Path(folder) / WEIGHTS)
    stored = _tensors_of(Path(folder) / STATE)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise ConfigError.of(
            "model", type(model).__name__, f"the class and sizes of the exported model ({found})"
        ) from None
    own = {
        name.removeprefix(OF_STATE): value
        for name, value in stored.items()
        if name.startswith(OF_STATE)
    }
    contexts = [
        Context(
            scenario=SCENARIOS[int(stored["scenario"])],
            experience=int(experience),
            task_classes=stored["classes"],
            seen=seen,
        )
        for seen, experience in zip(stored["seen"], stored["after"], strict=True)
    ]
    return Predictor(model, strategy, State(own, dict.fromkeys(own, "local")), contexts)


def _tensors_of(path: Path) -> Params:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read ({error}); export the model again") from None
