"""Ledgers of up to five partitions of 12,000 records, and entries to charge them with."""

from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import NoiseKey

DELTA = 1e-5
N = 12_000
STEPS = 469
NOISE = 1.1
Q = 256 / N
KEY = NoiseKey.from_seed(0, "ledger")


def entry(scope=None, **changes):
    fields = {
        "purpose": "gradient",
        "mechanism": "gaussian",
        "noise_multiplier": NOISE,
        "clip_norm": 1.0,
        "first_step": 0,
        "steps": STEPS,
        "sampling": "poisson",
        "scope": scope or {"e1": Q},
        "data": "d",
        "start": "s",
        "simulated": True,
    }
    return Entry(**(fields | changes))


def opened(path=None, partitions=5, key=KEY, **options):
    ledger = Ledger.open(path, key=key, **options)
    for i in range(1, partitions + 1):
        ledger.declare(f"e{i}", N)
    return ledger


def filled(path, entries=3, **options):
    ledger = opened(path, 2, **options)
    simulated = options.get("key", KEY).simulated
    for i in range(entries):
        ledger.charge(entry(first_step=i, steps=1, simulated=simulated))
    return ledger
