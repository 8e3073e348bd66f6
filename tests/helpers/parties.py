"""One party: its records in an open experience, and its curator."""

from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.curator.held_records import HeldRecords
from perdure.curator.local_curator import LocalCurator
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import PrivateSum, Schedule


def opened_party(stream, model, *, experience=0, plan=None, seed=0, batch_size=8, private_sum=None):
    """Open an experience; return the party's records and their curator.

    Args:
        stream: its experiences up to the open one are known.
        model: at whose parameters the curator answers.
        experience: index of the one to open.
        plan: of its records; plain training for None.
        seed: of sampling and memory.
        batch_size: new records a step.
        private_sum: None without privacy.
    """
    held = HeldRecords(seed=seed, batch_size=batch_size, private_sum=private_sum)
    open_experience(held, stream, model, experience=experience, plan=plan)
    return held, LocalCurator(held)


def open_experience(held, stream, model, *, experience=0, plan=None):
    """Open an experience with its declared size in the context."""
    past = stream.experiences[: experience + 1]
    context = contexts(stream, "cpu")(experience, declared_size=past[-1].train.declared_size)
    held.open(past, plan or Plan(), context, Forward(model))


def private_sum_of(stream, privacy, *, kind=PrivateSum, trace=None):
    """Return a private sum with simulated noise and a ledger that declares every partition.

    Args:
        stream: its partitions are declared, before anything is traced.
        privacy: with a noise multiplier and a seed.
        kind: class of the private sum.
        trace: list that the points of the ledger and of noise are appended to.
    """
    points = [] if trace is None else trace
    key = NoiseKey.from_seed(privacy.seed)
    ledger = Ledger.open(None, key=key, trace=points.append)
    for experience in stream:
        ledger.declare(experience.train.partition, experience.train.declared_size)
    points.clear()
    schedule = Schedule(noise=(privacy.noise_multiplier,))
    return kind(privacy=privacy, schedule=schedule, ledger=ledger, key=key)
