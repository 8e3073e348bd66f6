"""Mark that a session leaves on its model, and checks of marks that it finds."""

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
    """The training by one session, beside those that its model went through before.

    A checkpoint of the folder is about to replace all that the model has learnt. Until it does,
    `put` refuses a model that was trained before.

    Args:
        model: that is trained.
        folder: of the run; None where nothing is kept.
        warm_start: go on from a model that was trained before.

    Raises:
        ConfigError: for a trained model, where that was not asked for.
    """

    def __init__(self, model: nn.Module, folder: Path | None, *, warm_start: bool) -> None:
        self._model = model
        self._folder = folder
        self._by = secrets.token_hex(16)
        self._awaits_checkpoint = folder is not None and bool(Store(folder).numbers())
        self.before = [] if self._awaits_checkpoint else trainings_of(model)
        """Trainings that the model goes on from."""
        self._known = {training.by: len(training.entries) for training in self.before}
        self._uncounted: Training | None = None
        refuse_trained(self.before, warm_start=warm_start)

    def put(self, ledger: Ledger | None, *, uncounted: str = "") -> None:
        """Attach the session's spending to the model (see `model_history`).

        Args:
            ledger: of the session; None without privacy.
            uncounted: what it has learnt without a ledger; "" where it has learnt nothing yet.

        Raises:
            ConfigError: where another learner has trained the model since the session was prepared,
                or before, and the folder's checkpoint was not restored.
        """
        own = self._uncounted
        put = ledger is None and own is not None and uncounted in ("", own.uncounted)
        if put and own is not None and carried(self._model, own):
            return  # it carries nothing else, and the same would be put in its place
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
        """Note that a checkpoint of the folder's run has taken the place of the model's weights.

        Their earlier history is replaced too; the folder's ledger has the checkpoint's.
        """
        self._awaits_checkpoint = False
        self._known = {each.by: len(each.entries) for each in trainings_of(self._model)}
