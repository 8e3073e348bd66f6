"""Next characters of tiny Shakespeare by a low-rank adapted transformer, five speakers in turn.

The base is a GPT-2 of Hugging Face, randomly initialised and small (2 blocks of 64 numbers). It
learns the lines of all other speakers, which count as public, without privacy; there is one base
for all seeds. Then its weights are frozen, and low-rank adapters on all its linear layers learn the
five speakers with the most lines, one after another: alone, federated over ten clients, and under
record-level differential privacy. A record is a sequence of 64 characters, and its loss is the sum
over them. The row "base" is the frozen base on the same test sequences.

Settings are round numbers, changed once after a look at seed 0: one epoch for the base instead of
two, and a rate of 0.01 instead of 0.003. Noise is simulated from the seed, so that the numbers can
be had again.

    python benchmarks/next_token.py --seeds 2 --json benchmarks/results/next_token.json
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from rich.progress import Progress
from rows import Row, options, show, spread, store
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from perdure import Experience, Learner, Privacy, Stream
from perdure.data import Dataset, by_domain, iid, shakespeare
from perdure.federated import Federation, fit_federated
from perdure.models import Wrapped, low_rank, wrap
from perdure.strategies import Naive

Setting = Literal["alone", "federated", "private"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
SPEAKERS = 5
CLIENTS = 10
LENGTH = 64
BASE_EPOCHS = 1
BASE_RATE = 3e-3
BASE_BATCH = 64
LAYERS = ("c_attn", "c_proj", "c_fc")
RANK = 4
EPOCHS = 4
RATE = 1e-2
BATCH = 32
ROUNDS = 2
CLIENT_BATCH = 8
PRIVATE_BATCH = 128
PRIVATE_EPOCHS = 10
CLIP_NORM = 10.0
EPSILON = 8.0
DELTA = 1e-4
COLUMNS = (
    "setting",
    "epsilon",
    "seeds",
    "bits_per_character",
    "standard_error",
    "after_learning",
    "forgetting",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one seed: bits per character (T, T) by speaker and time, epsilon and noise."""

    matrix: Tensor
    epsilon: float | None = None
    noise_multiplier: float | None = None
    seconds: float = 0.0


def chosen(data: Dataset, *, private: bool) -> Dataset:
    """Return the sequences of the five speakers with the most lines, or of all others."""
    train, test = (
        part.take((part.attributes["domain"] < SPEAKERS) == private)
        for part in (data.train, data.test)
    )
    return replace(data, train=train, test=test)


def transformer(vocabulary: int, seed: int) -> GPT2LMHeadModel:
    """Make a small GPT-2 without dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="eager",  # type: ignore[call-arg]  # missing in its stubs
        )
    )


def trained_base(public: Dataset, seed: int) -> GPT2LMHeadModel:
    """Train a base on the public sequences."""
    classes = tuple(range(public.num_classes))
    only = Experience(index=0, train=public.train, test=public.test, classes=classes)
    stream = Stream(
        name="public",
        scenario="domain",
        experiences=(only,),
        num_classes=public.num_classes,
        input_shape=public.input_shape,
    )
    base = transformer(public.num_classes, seed)
    Learner(
        model=wrap(base, output="logits"),
        strategy=Naive(),
        optimizer=partial(torch.optim.AdamW, lr=BASE_RATE),
        epochs=BASE_EPOCHS,
        batch_size=BASE_BATCH,
        seed=seed,
    ).fit(stream)
    return base


def adapted(base: GPT2LMHeadModel, seed: int) -> Wrapped:
    """Copy the frozen base, with adapters on its linear layers."""
    # bare weights: the history of the base, which is public, need not come along
    fresh = transformer(base.config.vocab_size, seed)
    fresh.load_state_dict(base.state_dict())
    return wrap(low_rank(fresh, modules=LAYERS, rank=RANK, seed=seed), output="logits")


def learner_for(model: nn.Module, setting: Setting, seed: int) -> Learner:
    """Make a learner that trains the adapters."""
    batch = {"alone": BATCH, "federated": CLIENT_BATCH, "private": PRIVATE_BATCH}
    privacy = Privacy(epsilon=EPSILON, delta=DELTA, clip_norm=CLIP_NORM, seed=seed)
    return Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=RATE),
        seed=seed,
        privacy=privacy if setting == "private" else None,
        epochs=PRIVATE_EPOCHS if setting == "private" else EPOCHS,
        batch_size=batch[setting],
    )


def run(base: GPT2LMHeadModel, stream: Stream, setting: Setting, seed: int) -> Outcome:
    """Learn the speakers one after another."""
    start = time.perf_counter()
    if setting == "federated":
        matrix = fit_federated(
            lambda client: learner_for(adapted(base, seed), setting, seed),
            iid(stream, clients=CLIENTS, min_size=CLIENT_BATCH, seed=seed),
            Federation(clients=CLIENTS, rounds=ROUNDS, seed=seed),
        )
        return Outcome(matrix=matrix, seconds=time.perf_counter() - start)
    learner = learner_for(adapted(base, seed), setting, seed)
    matrix = learner.fit(stream)
    seconds = time.perf_counter() - start
    if learner.private_sum is None:
        return Outcome(matrix=matrix, seconds=seconds)
    return Outcome(
        matrix=matrix,
        epsilon=learner.private_sum.ledger.worst(DELTA)[1],
        noise_multiplier=learner.private_sum.noise_multiplier,
        seconds=seconds,
    )


def untrained(base: GPT2LMHeadModel, stream: Stream, seed: int) -> Outcome:
    """Compute the bits per character of the base on each speaker."""
    learner = learner_for(adapted(base, seed), "alone", seed)
    learner.prepare(stream)
    return Outcome(matrix=torch.tensor([learner.evaluate(stream)] * len(stream)))


def forgetting(matrix: Tensor) -> float:
    """Compute the mean rise of the bits on earlier speakers, from their lowest value to the end."""
    return float((matrix[-1, :-1] - matrix[:, :-1].min(0).values).mean())


def row(setting: str, outcomes: Sequence[Outcome]) -> Row:
    """Build one row to store: means over the seeds, with the standard error of the bits."""
    bits, error = spread([float(outcome.matrix[-1].mean()) for outcome in outcomes])
    return {
        "benchmark": "next_token",
        "setting": setting,
        "strategy": "none" if setting == "base" else "naive",
        "speakers": SPEAKERS,
        "clients": CLIENTS if setting == "federated" else None,
        "epsilon": outcomes[0].epsilon,
        "delta": DELTA if setting == "private" else None,
        "unit": "record of 64 characters" if setting == "private" else None,
        "noise_multiplier": outcomes[0].noise_multiplier,
        "seeds": len(outcomes),
        "bits_per_character": bits,
        "standard_error": error,
        "after_learning": spread([float(each.matrix.diag().mean()) for each in outcomes])[0],
        "forgetting": spread([forgetting(each.matrix) for each in outcomes])[0],
        "seconds": spread([outcome.seconds for outcome in outcomes])[0],
        "matrix": outcomes[0].matrix.tolist(),
    }


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=2)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads (default %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = shakespeare(args.data, length=LENGTH)
    stream = by_domain(chosen(data, private=True), order=range(SPEAKERS))
    with Progress() as progress:
        task = progress.add_task("base", total=1 + args.seeds * len(args.setting))
        base = trained_base(chosen(data, private=False), seed=0)
        progress.advance(task)
        outcomes = {"base": [untrained(base, stream, seed=0)], **{s: [] for s in args.setting}}
        for seed in range(args.seeds):
            for setting in args.setting:
                progress.update(task, description=f"{setting}, seed {seed}")
                outcomes[setting].append(run(base, stream, setting, seed))
                progress.advance(task)
    rows = [row(name, found) for name, found in outcomes.items()]
    show("next characters of five speakers in turn", rows, COLUMNS, digits=3)
    store(args.json, rows)


if __name__ == "__main__":
    main()
