"""Common base of all private answers: settings, ledger, key, log, and the making of an entry."""

from collections.abc import Mapping

from torch import Tensor

from perdure.privacy.answers import Answers
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry, MechanismName, Stated
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.draw_lines import DrawsHead
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.reserved_steps import ReservedSteps, Schedule
from perdure.privacy.settings import Privacy
from perdure.types import Tensors
from perdure.utils.hashing import digest


class Mechanism:
    """A ledger that is charged before noise is drawn from a key.

    Args:
        privacy: what was asked.
        schedule: what was calibrated.
        ledger: where it is charged.
        key: of noise and coins.
        draws: log of the sums that noise was drawn for; None keeps one in memory.
        answers: what was released; None keeps it in memory.
        independence: by what the gradients of records are known to be independent (see
            `perdure.privacy.guard`); "" where nothing is known.
    """

    def __init__(
        self,
        *,
        privacy: Privacy,
        schedule: Schedule,
        ledger: Ledger,
        key: NoiseKey,
        draws: DrawLog | None = None,
        answers: Answers | None = None,
        independence: Stated = "",
    ) -> None:
        self.independence: Stated = independence
        self.privacy = privacy
        self.schedule = schedule
        self.ledger = ledger
        self._key = key
        self._draws = DrawLog(None, key) if draws is None else draws
        self._answers = Answers(None, key) if answers is None else answers
        self.open(0)

    def open(self, index: int) -> None:
        """Go to experience `index`; earlier reservations pay for nothing more."""
        self.experience = index
        self.noise_multiplier = self.schedule.noise_in(index)
        self._blocks: dict[str, ReservedSteps] = {}

    def fingerprint(self, data: Tensors, place: str = "") -> str:
        """Keyed fingerprint of private records; without the key it says nothing about them.

        Args:
            data: the records.
            place: where it is used; fingerprints of two places tell nothing of each other.
        """
        return self._key.mac(digest(data) + place.encode())

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """(n,) each record's own secret number in [0, 1).

        It decides whether memory keeps the record, or its place.
        """
        return self._key.tags(ids, purpose=purpose)

    def close(self) -> None:
        """Give up the files of the log, which are opened again where they are needed."""
        self._draws.release()

    @property
    def draws_head(self) -> DrawsHead:
        """Head of the log of draws, for a checkpoint."""
        return self._draws.head

    # ------------------------------------------------------------------ inside

    def _charge(self, entry: Entry) -> Entry:
        """Charge the entry, again where its noise may have been drawn and the log does not tell.

        An entry that is in the ledger already and whose draws are known costs nothing more.
        """
        self.ledger.chain.hold()
        while self.ledger.has(entry) and self._draws.seen(entry.digest):
            entry = entry.later()
        # The log first: an entry that it does not know counts as seen.
        self._draws.open(entry.digest)
        self.ledger.charge(entry)
        return entry

    def _entry(
        self,
        purpose: str,
        mechanism: MechanismName,
        multiplier: float,
        clip_norm: float,
        scope: Mapping[str, float],
        steps: range,
        start: str,
        data: str,
        grid: Grid | None = None,
        participations: int | None = None,
    ) -> Entry:
        sampled = mechanism == "gaussian" and not purpose.startswith("release:")
        return Entry(
            purpose=purpose,
            mechanism=mechanism,
            noise_multiplier=multiplier,
            clip_norm=clip_norm,
            first_step=steps.start,
            steps=len(steps),
            sampling="poisson" if sampled else "none",
            scope=dict(scope),
            grid=grid.facts() if grid else None,
            participations=participations,
            data=data,
            start=start,
            simulated=self._key.simulated,
            # the rows of a release are asked of each record alone
            independence=self.independence
            and ("by construction" if purpose.startswith("release:") else self.independence),
        )
