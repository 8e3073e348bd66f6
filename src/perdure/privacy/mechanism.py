"""Common base class of private mechanisms: settings, ledger, key, log, and new ledger entries."""

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
    """Base class of mechanisms that charge a ledger before they draw noise from a key.

    Args:
        privacy: privacy settings of the user.
        schedule: calibrated noise of each experience.
        ledger: ledger that is charged.
        key: key for noise and for the secret random numbers of sampling.
        draws: log of the sums for which noise was drawn; None for a log in memory.
        answers: stored released answers; None to keep them in memory.
        independence: how the gradients of records are known to be independent (see
            `perdure.privacy.guard`); "" if not known.
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
        """Switch to experience `index`; steps that were charged before can no longer be drawn."""
        self.experience = index
        self.noise_multiplier = self.schedule.noise_in(index)
        self._blocks: dict[str, ReservedSteps] = {}

    def fingerprint(self, data: Tensors, place: str = "") -> str:
        """Keyed fingerprint of private records, which reveals nothing without the key.

        Args:
            data: the records.
            place: name of the use; fingerprints for different uses cannot be compared.
        """
        return self._key.mac(digest(data) + place.encode())

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """Return (n,) secret random numbers in [0, 1), one fixed number per record.

        They decide if memory keeps a record, or in which step of an epoch the record is.
        """
        return self._key.tags(ids, purpose=purpose)

    def close(self) -> None:
        """Close the file of the log of draws; it is opened again when it is needed."""
        self._draws.release()

    @property
    def draws_head(self) -> DrawsHead:
        """Length and last MAC of the log of draws; a checkpoint with them reveals an older log."""
        return self._draws.head

    # ------------------------------------------------------------------ inside

    def _charge(self, entry: Entry) -> Entry:
        """Charge an entry to the ledger; charge it once more if unlogged noise may exist for it.

        An entry that is already in the ledger, and whose draws are all in the log of draws, costs
        nothing more.
        """
        self.ledger.chain.hold()
        while self.ledger.has(entry) and self._draws.seen(entry.digest):
            entry = entry.later()
        # Write the log first, because an entry that is not in the log counts as seen.
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
            # the query of a release runs on each record alone
            independence=self.independence
            and ("by construction" if purpose.startswith("release:") else self.independence),
        )
