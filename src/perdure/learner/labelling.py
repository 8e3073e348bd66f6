"""Few labels: records of a public pool to label next, and pseudo-labels for confident ones.

Selection by a model is a query about the records of the pool: the chosen ids depend on them. So the
pool must be public; under privacy this is declared, and training records are refused.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Records
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.evaluation import (
    outputs_for,
    predictor,
    refuse_learnt_records,
    trained_last,
)
from perdure.learner.learner import Learner
from perdure.learner.party import Party
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.chunking import by_pieces
from perdure.utils.modules import evaluating
from perdure.utils.seeding import derive, drawing_from, generator

Method = Literal["random", "entropy", "margin", "bald", "coreset"]
DROPOUTS = 20
"""Number of passes with dropout for `bald`."""


def select_records(
    learner: Learner,
    pool: Records,
    count: int,
    *,
    method: Method = "entropy",
    labelled: Records | None = None,
    experience: int | None = None,
    public: bool = False,
    seed: int = 0,
) -> Tensor:
    """Choose the records of a public pool whose labels would help most.

        entropy:  largest  H(p) = -sum_c p_c log p_c
        margin:   smallest p_(1) - p_(2), the two largest probabilities
        bald:     largest  H(mean_t p_t) - mean_t H(p_t), over passes t with dropout
        coreset:  greedy k-centre: the record farthest, in features, from all centres so far

    >>> ids = select_records(learner, pool, 20, method="margin")
    >>> chosen = pool.take(torch.isin(pool.ids, ids))

    Guarantee: none for the pool, which must be public. The labels of the pool are not read. A
    private learner's parameters are released, so selection by them costs nothing. The choice of a
    learner without privacy depends on its training records as they are.

    Args:
        learner: learner that was trained, or prepared.
        pool: (n, ...) records to choose from, with ids of their own; their labels may be any.
        count: number of records.
        method: measure of the use of a label; "random" to compare with.
        labelled: public records that have labels, the first centres of `coreset`; None for none,
            then the first centre is the record nearest to the mean.
        experience: index of the pool's experience in a task-incremental stream; None in others.
        public: declare that the pool is public; needed for a private learner.
        seed: seed of "random" and of dropout.

    Returns:
        (count,) int64 ids, the most useful first.

    Raises:
        ConfigError: if `count` is not from 1 to the size of the pool, or the model has no dropout
            for `bald`.
        PrivacyError: if the learner is private, and the pool has training records, or is not
            declared public.

    Source: Settles 2009, "Active learning literature survey" (entropy, margin); Gal, Islam,
    Ghahramani 2017, "Deep Bayesian active learning with image data" (bald); Sener and Savarese
    2018, "Active learning for convolutional neural networks: a core-set approach", algorithm 1.
    """
    party = learner.session
    _refuse_pool(party, pool, "select_records", public=public)
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not whole or not 1 <= count <= len(pool):
        raise ConfigError.of("count", count, f"1 to {len(pool)}, the records of the pool")
    if method == "random":
        order = torch.randperm(len(pool), generator=generator(seed, "select records"))
    elif method == "coreset":
        order = _centres(party, pool, labelled, count)
    elif method == "bald":
        order = _disagreement(party, pool, experience, seed).argsort(descending=True, stable=True)
    elif method == "entropy":
        probabilities = outputs_for(party, pool.inputs, experience).softmax(-1)
        order = entropy(probabilities).argsort(descending=True, stable=True)
    elif method == "margin":
        two = outputs_for(party, pool.inputs, experience).softmax(-1).topk(2).values
        order = (two[:, 0] - two[:, 1]).argsort(stable=True)
    else:
        raise ConfigError.of("method", method, "random, entropy, margin, bald or coreset")
    return pool.ids[order[:count].to(pool.ids.device)]


def pseudo_labels(
    learner: Learner,
    pool: Records,
    *,
    threshold: float = 0.95,
    labelled: Records | None = None,
    experience: int | None = None,
    public: bool = False,
) -> Records:
    """Return the records of a public pool that a model is sure of, with its predictions as labels.

    A record is kept if its largest probability is at least `threshold`.

    >>> more = pseudo_labels(learner, pool, threshold=0.95, labelled=few)

    Guarantee: none for the pool, which must be public. A private learner's parameters are released,
    so its predictions cost nothing beyond its own epsilon; a later learner's ledger does not
    contain that epsilon. Labels of a learner without privacy are marked (`Records.coupled_by`), and
    a private learner refuses them.

    Args:
        learner: learner that was trained, or prepared.
        pool: records without labels; the labels that they have are not read.
        threshold: smallest probability, above 0 and at most 1.
        labelled: records with labels that come first in the result; None for none.
        experience: index of the pool's experience in a task-incremental stream; None in others.
        public: declare that the pool is public; needed for a private learner.

    Returns:
        Records, of which only those of `labelled` have labels that a person gave. They keep the
        marks and the earlier releases (`Records.spent`) of both parts.

    Raises:
        ConfigError: if the threshold is not allowed, or an id is in both parts.
        PrivacyError: if the learner is private, and the pool has training records, or is not
            declared public.

    Source: Lee 2013, "Pseudo-label"; the threshold of Sohn et al. 2020, "FixMatch", equation 4.
    """
    party = learner.session
    _refuse_pool(party, pool, "pseudo_labels", public=public)
    if not 0 < threshold <= 1:
        raise ConfigError.of("threshold", threshold, "a number above 0 and at most 1")
    sure, predicted = outputs_for(party, pool.inputs, experience).softmax(-1).max(-1)
    kept = (sure >= threshold).to(pool.inputs.device)
    chosen = replace(
        pool, labels=predicted.to(pool.labels), coupled_by=_coupled_by(party, pool, labelled)
    ).take(kept)
    if labelled is None:
        return chosen
    if bool(torch.isin(labelled.ids, chosen.ids).any()):
        raise ConfigError.of("labelled", "records of the pool", "records with other ids")
    return replace(
        labelled,
        inputs=torch.cat([labelled.inputs, chosen.inputs]),
        labels=torch.cat([labelled.labels, chosen.labels]),
        ids=torch.cat([labelled.ids, chosen.ids]),
        attributes={},
        weights=None,
        declared_size=0,
        ids_by_position=labelled.ids_by_position or chosen.ids_by_position,
        drawn_by_position=labelled.drawn_by_position or chosen.drawn_by_position,
        coupled_by=chosen.coupled_by,
        placed_by="",
        public_facts=tuple(dict.fromkeys((*labelled.public_facts, *chosen.public_facts))),
        spent=tuple(dict.fromkeys((*labelled.spent, *chosen.spent))),
    )


def _coupled_by(party: Party, pool: Records, labelled: Records | None) -> str:
    """Return the names of all functions that looked at the records of the result or its model."""
    made = [each.coupled_by for each in (labelled, pool) if each is not None]
    if party.privacy is None:
        # each label is an output, without noise, of a model that may know private records
        made.append("pseudo_labels(...)")
    return " and ".join(dict.fromkeys(filter(None, made)))


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy (...,) in nats of probabilities (..., C)."""
    found: Tensor = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    return found


def _refuse_pool(party: Party, pool: Records, name: str, *, public: bool) -> None:
    refuse_other_tasks(pool.task, (SingleLabel,), name, "it needs a probability for each class")
    refuse_learnt_records(party, pool, "records of the pool")
    if party.privacy is not None and not public:
        raise PrivacyError(
            f"{name} with a private learner answers a query about the pool, which no ledger entry "
            "covers if its records are private; give public=True for a public pool, or release "
            "what you need of private records (curator.count, curator.select)"
        )


def _disagreement(party: Party, pool: Records, experience: int | None, seed: int) -> Tensor:
    """Return the mutual information (n,) of prediction and dropout mask."""
    dropouts = [
        part for part in party.model.modules() if isinstance(part, nn.modules.dropout._DropoutNd)
    ]
    if not any(part.p > 0 for part in dropouts):
        raise ConfigError.of("method", "bald", "a model with dropout, such as mlp(dropout=0.2)")
    mean = outputs_for(party, pool.inputs, experience).softmax(-1) * 0
    mean_entropy = mean.sum(-1)
    after = trained_last(party)
    inputs = pool.inputs.to(party.device)
    with torch.no_grad(), evaluating(party.model):
        answer = predictor(party, after if experience is None else experience, after=after)
        for part in dropouts:
            part.train()
        for number in range(DROPOUTS):
            with drawing_from(derive(seed, "bald", number), party.device):
                probabilities = by_pieces(answer, inputs).softmax(-1)
            mean += probabilities / DROPOUTS
            mean_entropy += entropy(probabilities) / DROPOUTS
    return entropy(mean) - mean_entropy


def _centres(party: Party, pool: Records, labelled: Records | None, count: int) -> Tensor:
    """Return the positions (count,) of greedy k-centres in the features of the model."""
    if labelled is not None:
        refuse_learnt_records(party, labelled, "labelled records")
    forward = Forward(party.model)
    with torch.no_grad(), evaluating(party.model):
        rows, *known = (
            by_pieces(forward.features, each.inputs.to(party.device)).flatten(1)
            for each in (pool, *([labelled] if labelled is not None else []))
        )
    if known:
        distance = torch.stack(
            [_to_nearest(rows, part) for part in torch.split(known[0], 512)]
        ).amin(0)
        chosen = []
    else:
        chosen = [int(torch.cdist(rows, rows.mean(0, keepdim=True)).argmin())]
        distance = _to_nearest(rows, rows[chosen])
    while len(chosen) < count:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, _to_nearest(rows, rows[chosen[-1:]]))
    return torch.tensor(chosen)


def _to_nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Return the distance (n,) of each row (n, f) to the nearest centre (m, f)."""
    return torch.cdist(rows, centres).amin(1)
