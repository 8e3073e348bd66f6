"""Mark of a session on its model, and checks of the marks of earlier sessions."""

import secrets
from pathlib import Path

from torch import nn

from perdure.learner.checkpoint import Store
from perdure.learner.model_history import (
    Training,
    carried,
    mark,
    refuse_trained,
    refuse_unreplaced,
    trainings_of,
)
from perdure.privacy.ledger.ledger import Ledger


class ModelMark:
    """Mark that attaches a session's training, and its privacy cost, to the model.

    If the folder has a checkpoint that will replace the weights, `put` refuses a model that was
    trained before, until the weights were replaced.

    Args:
        model: model that is trained.
        folder: folder of the run; None if there is none.
        warm_start: True to continue from a model that was trained before.

    Raises:
        ConfigError: if the model was trained before and `warm_start` is False.
    """

    def __init__(self, model: nn.Module, folder: Path | None, *, warm_start: bool) -> None:
        self._model = model
        self._folder = folder
        self._by = secrets.token_hex(16)
        self._awaits_checkpoint = folder is not None and bool(Store(folder).numbers())
        self.before = [] if self._awaits_checkpoint else trainings_of(model)
        """Trainings of the model before this session."""
        self._known = {training.by: len(training.entries) for training in self.before}
        self._uncounted: Training | None = None
        refuse_trained(self.before, warm_start=warm_start)

    def put(self, ledger: Ledger | None, *, uncounted: str = "") -> None:
        """Attach the session's privacy cost to the model (see `model_history`).

        Args:
            ledger: ledger of the session; None without privacy.
            uncounted: description of the training without a ledger; "" if nothing was trained yet.

        Raises:
            ConfigError: if another learner has trained the model since the session was prepared, or
                before, without restoring the folder's checkpoint.
        """
        own = self._uncounted
        put = ledger is None and own is not None and uncounted in ("", own.uncounted)
        if put and own is not None and carried(self._model, own):
            return  # the model carries this mark already and no other
        since = [
            each
            for each in trainings_of(self._model)
            if each.by != self._by and len(each.entries) > self._known.get(each.by, -1)
        ]
        if self._awaits_checkpoint:
            refuse_unreplaced(since, self._folder)
        refuse_trained(since, warm_start=False)
        if ledger is not None:
            counted = Training(
                by=self._by,
                sizes=ledger.sizes,
                rules=ledger.rules,
                entries=ledger.entries,
                simulated=ledger.simulated,
            )
            mark(self._model, counted)
        elif uncounted:
            self._uncounted = Training(by=self._by, uncounted=uncounted)
            mark(self._model, self._uncounted)

    def weights_replaced(self) -> None:
        """Record that a checkpoint of the folder's run has replaced the model's weights.

        Earlier trainings of the model then do not count; the folder's ledger has the checkpoint's.
        """
        self._awaits_checkpoint = False
        self._known = {each.by: len(each.entries) for each in trainings_of(self._model)}
