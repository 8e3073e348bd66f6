"""Table `[start]` of a config: an earlier run whose parameters the models start from."""

from dataclasses import dataclass

from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class StartConfig(CheckedFields):
    """Earlier run whose parameters the model of every arm starts from.

    Args:
        run: folder of the run, which is finished.
        arm: name of its arm; left out where it has one arm.
        seed: seed of its model; left out where it has one seed.
        new_head: keep the new head, for other classes, and copy the rest.
        public: declare that the records of the earlier run, and of all runs before it, are public,
            so that a private arm may start from a run without privacy; the privacy statement says
            so.
    """

    run: str
    arm: str | None = None
    seed: int | None = None
    new_head: bool = False
    public: bool = False
