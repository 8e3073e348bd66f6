"""Curator that records every query of a strategy, and passes it on to the real curator.

Requests that hooks may not make are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from perdure.contract.curator import Curator
from perdure.contract.plan import PrivacyCost
from perdure.curator.hook_curator import MEMBERS
from perdure.errors import ConformanceError
from perdure.types import Params

Kind = Literal["releases", "memory_releases", "histograms", "selections", "references"]
"""Kind of a query to the curator, by its name in `PrivacyCost`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """One query to a curator.

    Args:
        kind: kind of the query.
        rows: function of records that the query evaluates.
        clip_norm: bound on one record's row, if there is one.
        purpose: name of the query in the ledger.
        times: number of choices, for a selection.
        of: earlier experience, for a reference gradient.
        place: experience and step of the query.
    """

    kind: Kind
    rows: Callable[..., Any]
    purpose: str
    place: tuple[int, int]
    clip_norm: float | None = None
    times: int = 1
    of: int | None = None


class RecordingCurator:
    """Curator for hooks that records all queries before it asks the real curator.

    Args:
        real: the real curator, in the form that hooks see.
        clip_norm: None to look like the real curator; a number to look private with this clip norm.
        asked: list to which queries are added; None for a new list.
        step: function that returns the number of the current step in the open experience.
    """

    def __init__(
        self,
        real: Curator,
        clip_norm: float | None = None,
        asked: list[Question] | None = None,
        step: Callable[[], int] = lambda: -1,
    ) -> None:
        self._real = real
        self._step = step
        self._clip_norm = clip_norm
        self.asked: list[Question] = [] if asked is None else asked

    @property
    def curator(self) -> Curator:
        """Return this object, typed as a curator."""
        return cast(Curator, self)

    def release(
        self, query: Callable[..., Any], *, clip_norm: float, purpose: str, over: Any = "experience"
    ) -> Params:
        """Record a release, and ask the real curator for it."""
        kind: Kind = "memory_releases" if over == "memory" else "releases"
        self.asked.append(
            Question(kind=kind, rows=query, purpose=purpose, place=self._place, clip_norm=clip_norm)
        )
        return self._real.release(query, clip_norm=clip_norm, purpose=purpose, over=over)

    def count(self, of: Callable[..., Tensor], *, bins: int, purpose: str) -> Tensor:
        """Record a histogram, and ask the real curator for it."""
        self.asked.append(Question(kind="histograms", rows=of, purpose=purpose, place=self._place))
        return self._real.count(of, bins=bins, purpose=purpose)

    def select(self, of: Callable[..., Tensor], utility: Any, *, purpose: str) -> Tensor:
        """Record a selection, and ask the real curator for it."""
        self.asked.append(
            Question(
                kind="selections", rows=of, purpose=purpose, place=self._place, times=utility.k
            )
        )
        return self._real.select(of, utility, purpose=purpose)

    def reference(
        self, losses: Callable[..., Tensor], params: Params, *, of: int | None = None
    ) -> Params:
        """Record a reference gradient, and ask the real curator for it."""
        self.asked.append(
            Question(kind="references", rows=losses, purpose="reference", place=self._place, of=of)
        )
        return self._real.reference(losses, params, of=of)

    def __getattr__(self, name: str) -> Any:
        if self._clip_norm is not None and name in ("private", "clip_norm"):
            return True if name == "private" else self._clip_norm
        if name in MEMBERS:
            return getattr(self._real, name)
        raise ConformanceError(
            f"the strategy reads curator.{name}, which no charge in the ledger covers; allowed: "
            f"{', '.join(MEMBERS)}; ask "
            "curator.release(query, ...) instead"
        )

    def count_of(self, kind: Kind, experience: int) -> int:
        """Number of queries of this kind in an experience."""
        return sum(q.times for q in self.asked if q.kind == kind and q.place[0] == experience)

    @property
    def _place(self) -> tuple[int, int]:
        return self._real.context.experience, self._step()


ONCE: tuple[Kind, ...] = ("releases", "memory_releases", "histograms", "selections")


def declared(cost: PrivacyCost, kind: Kind) -> int:
    """Return the number of queries of a kind that a strategy declares in its `privacy_cost`."""
    return int(getattr(cost, kind))
