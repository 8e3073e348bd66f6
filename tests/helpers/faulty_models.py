"""Models and losses with a planted fault that the guard must refuse."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from perdure.data import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.privacy.clipping import tape
from perdure.privacy.clipping.clip import Clip, clip_factors
from perdure.privacy.opacus import samplers
from perdure.privacy.private_sum import PrivateSum
from perdure.strategies.ewc import EWC
from perdure.strategies.naive import Naive


def nothing(monkeypatch):
    """Leave the parts as they are."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A planted fault.

    Args:
        model: from a stream to a model; None for the toy one.
        honest_model: the same without the fault.
        strategy, honest_strategy: likewise.
        kind: of private sum.
        plant: changes real parts for one test.
        changes: fields of the learner.
        privacy: fields of its privacy.
        stream: where the model needs other records than the toy ones.
        neighbour: from the stream to the one without the record; None to leave it out.
        outputs: more that the run shows; None for none.
        honest_outputs: likewise.
    """

    model: Callable | None = None
    honest_model: Callable | None = None
    strategy: object = field(default_factory=Naive)
    honest_strategy: object = None
    kind: type = PrivateSum
    plant: Callable = nothing
    changes: dict = field(default_factory=dict)
    privacy: dict = field(default_factory=dict)
    stream: Callable | None = None
    neighbour: Callable | None = None
    outputs: Callable | None = None
    honest_outputs: Callable | None = None


# --------------------------------------------------------------------------- models and losses


class Mixing(nn.Module):
    """A linear model of inputs changed by `mix`."""

    def __init__(self, mix=None):
        super().__init__()
        self.mix = mix or nn.Identity()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.mix(x))


def less_mean_below_zero(x):
    return x - x.clamp(max=0).mean(0)


def over_largest(x):
    return x / x.abs().max().clamp(min=1)


def coupled_above_twenty(x):
    return x - x.mean(0) if len(x) > 20 else x


def by_sum_of_batch(x):
    return x if float(x.detach().sum()) > 0 else 2 * x


def mixing(mix):
    return {"model": lambda stream: Mixing(mix), "honest_model": lambda stream: Mixing()}


LENGTH = 6
WORDS = 12
WORD_DOMAIN = InputDomain(
    shape=(LENGTH,), dtype=torch.int64, vocabulary=WORDS, padding=0, sequence_axes=(0,)
)


class Reading(nn.Module):
    """A mean of word embeddings: over all positions, or up to the longest sequence of the batch."""

    def __init__(self, cut=False, max_norm=None):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 5, max_norm=max_norm)
        self.head = nn.Linear(5, 4)
        self.cut = cut

    def forward(self, x):
        if self.cut:
            longest = int((x != 0).sum(1).max())
            x = x[:, : max(1, longest)]
        return self.head(self.embed(x).mean(1))


def words():
    """Return a stream of two experiences with sentences of different lengths."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WORDS, (24, LENGTH), generator=rng)
    lengths = 1 + torch.arange(24) % LENGTH
    inputs = torch.where(torch.arange(LENGTH) < lengths[:, None], tokens, 0)

    def part(index, test=False):
        classes = torch.tensor([2 * index, 2 * index + 1])
        rows = slice(12 * index, 12 * index + 12)
        ids = 12 * index + torch.arange(12) + (1000 if test else 0)
        return Records(
            inputs=inputs[rows],
            labels=classes[torch.arange(12) % 2],
            ids=ids,
            partition=f"part-{index}" + ("-test" if test else ""),
            domain=WORD_DOMAIN,
        )

    parts = [
        Experience(
            index=i, stage=i, classes=(2 * i, 2 * i + 1), train=part(i), test=part(i, test=True)
        )
        for i in range(2)
    ]
    return Stream(
        name="words",
        scenario="class",
        experiences=tuple(parts),
        num_classes=4,
        input_shape=(LENGTH,),
        assigned_by_record=True,
    )


class Normalised(nn.Sequential):
    def __init__(self, norm):
        super().__init__(nn.Linear(5, 4), norm, nn.Linear(4, 4))


class ByRealisedSize(Naive):
    """A loss divided by the actual number of rows."""

    def losses(self, forward, batch, context, state):
        return super().losses(forward, batch, context, state) / len(batch)


class WeightedMean(Naive):
    """Class weights over the sum of the batch's weights, as `reduction="mean"` has it."""

    def losses(self, forward, batch, context, state):
        weights = 1.0 + batch.labels.float()
        return super().losses(forward, batch, context, state) * weights / weights.sum()


class Present(Naive):
    """A loss that masks by the classes present in the batch, as ER-ACE was published."""

    def losses(self, forward, batch, context, state):
        present = torch.zeros(context.seen.shape, dtype=torch.bool)
        present[batch.labels] = True
        logits = torch.where(present, forward(batch.inputs), torch.full((), -1e9))
        return F.cross_entropy(logits, batch.labels, reduction="none")


class Buffered(nn.Module):
    """A model that counts inputs in a buffer."""

    def __init__(self, writes=True):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.writes = writes
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x):
        if self.writes:
            self.seen.add_(x.detach().sum(0))
        return self.body(x)


class IntoParameter(Naive):
    """A loss that adds the batch mean to a parameter, unseen by the version counter."""

    def losses(self, forward, batch, context, state):
        weight = next(forward.module.parameters())
        weight.data[0, 0] += batch.inputs.detach().mean()
        return super().losses(forward, batch, context, state)


class IntoState(EWC):
    """A loss that adds a sum over the batch to the strategy's state."""

    def losses(self, forward, batch, context, state):
        value = next(iter(state.values()))
        value.flatten()[:1].add_(batch.inputs.detach().sum())
        return super().losses(forward, batch, context, state)


def plant_per_layer(monkeypatch):
    def factors(clip, squares):
        return {layer: clip_factors(square, clip.norm) for layer, square in squares.items()}

    monkeypatch.setattr(Clip, "factors", factors)


class Grouped(nn.Sequential):
    """A grouped convolution, which Opacus's samplers handle, before an in-place activation."""

    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 4, 2),
            nn.ReLU(),
            nn.Conv1d(4, 4, 3, groups=2, padding="same"),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


def plant_old_hook(monkeypatch):
    """Use the gradient at the output tensor, whose place in the graph moves with an in-place
    activation.
    """
    outputs = {}
    edge_of = tape.get_gradient_edge
    went_back = samplers.went_back

    def remembered(left):
        edge = edge_of(left)
        outputs[edge.node] = left
        return edge

    def moved(total, calls):
        late = [replace(call, edge=edge_of(outputs[call.edge.node])) for call in calls]
        return went_back(total, late)

    monkeypatch.setattr(tape, "get_gradient_edge", remembered)
    monkeypatch.setattr(samplers, "went_back", moved)


GUARD = {
    "batch mean of min(x, 0)": Fault(**mixing(less_mean_below_zero)),
    "division by the largest |x|": Fault(**mixing(over_largest)),
    "coupling only above 20 rows": Fault(
        **mixing(coupled_above_twenty), privacy={"sampling_rate": 1.0}
    ),
    "control flow on the batch's sum": Fault(**mixing(by_sum_of_batch)),
    "truncation to the longest sequence": Fault(
        model=lambda stream: Reading(cut=True), honest_model=lambda stream: Reading(), stream=words
    ),
    "an embedding with max_norm": Fault(
        model=lambda stream: Reading(max_norm=0.5),
        honest_model=lambda stream: Reading(),
        stream=words,
    ),
    "BatchNorm": Fault(
        model=lambda stream: Normalised(nn.BatchNorm1d(4)),
        honest_model=lambda stream: Normalised(nn.GroupNorm(2, 4)),
    ),
    "a loss over the realised batch size": Fault(
        strategy=ByRealisedSize(), honest_strategy=Naive()
    ),
    "a class-weighted mean": Fault(strategy=WeightedMean(), honest_strategy=Naive()),
    "a mask of the classes present": Fault(strategy=Present(), honest_strategy=Naive()),
    "a forward pass that writes into a buffer": Fault(
        model=lambda stream: Buffered(), honest_model=lambda stream: Buffered(writes=False)
    ),
    "a loss that writes into a parameter": Fault(strategy=IntoParameter(), honest_strategy=Naive()),
    "a loss that writes into the state": Fault(
        strategy=IntoState(strength=1.0), honest_strategy=EWC(strength=1.0)
    ),
    "clipping by layers without sqrt(L)": Fault(
        plant=plant_per_layer, privacy={"clipping": "per-layer"}
    ),
    "an activation in place that is read too late": Fault(
        plant=plant_old_hook,
        model=lambda stream: Grouped(),
        honest_model=lambda stream: Grouped(),
    ),
}
