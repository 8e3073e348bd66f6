"""Statistics that can be released: sums, means, Gram matrices, histograms, quantiles, top-k.

The table lists their sensitivity and mechanism.

Neighbouring data sets differ by one record, added or removed. Under privacy every release is
charged on disk before its noise is drawn, to the records of the current experience, each of which
is used once (no sampling). Without privacy the result is exact.

    release                               one record changes            mechanism
    curator.release(query, clip_norm=C)   the sum by C in L2 norm        Gaussian, s = m C
    curator.release(Gram(), clip_norm=C)  (gram, cross, totals) by C     symmetric Gaussian, s = m C
    mean(curator, query, clip_norm=C)     the mean by C / declared size  Gaussian, s = m C / size
    histogram(curator, of, bins=B)        one count by 1                 discrete Gaussian, s = m
    quantile(curator, of, q, candidates)  a score difference by 1        exponential, e = 2 / m
    top_k(curator, of, bins=B, k=k)       one count by 1                 k x exponential, e = 2 / m

m is the noise multiplier of a step times `Privacy.release_noise`, s a standard deviation and e an
epsilon. Each sum and each histogram costs 1 / (2 m^2) of zero-concentrated privacy. A selection has
bounded range, so it costs at most as much: e^2 / 8. The ledger charges selections as e-DP and does
not use the bounded range: few selections then cost less than as many sums, many selections cost
more.

A strategy declares its releases in its `PrivacyCost`: sums, means and Gram matrices are `releases`,
histograms are `histograms`, a quantile is one of the `selections` and a top-k is k of them. If a
budget was granted, releases that were not declared are refused.

Under privacy the result of a function for a record depends on that record only, because each record
is evaluated alone, in a batch of one under `torch.func.vmap`. Write the function with masks and
`where`, without `.item()` and without random numbers. Errors may not depend on a record either:
without privacy a bin outside the range or a NaN is refused; with privacy such a record is in no
bin, or above all candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.contract.curator import Curator, Of, Query
from perdure.privacy.noise.discrete import Frequency, Quantile
from perdure.types import Params


def mean(curator: Curator, query: Query, *, clip_norm: float, purpose: str) -> Params:
    """Release a mean: the noisy sum of clip(query(record), clip_norm) over the declared size.

    Guarantee: one Gaussian release. The divisor is the declared number of records, which is public
    and does not depend on the records.

    Args:
        curator: curator of the current experience.
        query: query with one row per record, as named tensors or as one tensor, whose mean gets
            the name `value`.
        clip_norm: bound on the L2 norm of one record's row.
        purpose: name of the release in the ledger.
    """
    total = curator.release(query, clip_norm=clip_norm, purpose=purpose)
    return {name: value / curator.declared_size for name, value in total.items()}


def histogram(curator: Curator, of: Of, *, bins: int, purpose: str) -> Tensor:
    """Release the number of records in each bin, (bins,) int64.

    With noise, a count may be below 0; setting it to 0 costs no privacy.

    Guarantee: one discrete Gaussian release of sensitivity 1, because a record is in one bin at
    most.

    Args:
        curator: curator of the current experience.
        of: function batch -> (n,) bin of each record, a whole number from 0 to bins - 1.
        bins: public number of bins.
        purpose: name of the release in the ledger.

    Raises:
        ConfigError: if `bins` is below 1.
        DataError: if `of` returns another shape or type; without privacy also if a record is in no
            bin.
    """
    return curator.count(of, bins=bins, purpose=purpose)


def quantile(
    curator: Curator, of: Of, *, q: float, candidates: Tensor | Sequence[float], purpose: str
) -> float:
    """Release one of the candidates, near the q-quantile of the records' numbers.

    P(c) is proportional to exp(e score(c)), with the score of
    `perdure.privacy.noise.discrete.Quantile`. Without privacy the result is the candidate with the
    highest score, and the first of several. A candidate whose rank differs by r from the best rank
    is exp(e r / (2 max(q, 1 - q))) times less likely than the best.

    Guarantee: one selection, which is e-DP.

    Args:
        curator: curator of the current experience.
        of: function batch -> (n,) one number per record.
        q: number above 0 and below 1; 0.5 for the median.
        candidates: public numbers in increasing order.
        purpose: name of the release in the ledger.

    Raises:
        ConfigError: if q is out of range, or candidates are not increasing.
        DataError: if `of` returns another shape; without privacy also if it returns NaN.
    """
    utility = Quantile(q=q, candidates=torch.as_tensor(candidates, dtype=torch.float64))
    (place,) = curator.select(of, utility, purpose=purpose).tolist()
    return float(utility.candidates[place])


def top_k(curator: Curator, of: Of, *, bins: int, k: int, purpose: str) -> Tensor:
    """Release the k bins with most records, (k,) int64, in descending order.

    Gumbel noise is added to every count, and the k highest are chosen. This equals k selections one
    after another. The counts are not released.

    Guarantee: k selections, each e-DP, because one record increases one count by 1.

    Args:
        curator: curator of the current experience.
        of: function batch -> (n,) bin of each record, a whole number from 0 to bins - 1.
        bins: public number of bins.
        k: number of bins to choose.
        purpose: name of the release in the ledger.

    Raises:
        ConfigError: if `bins` is below 1, or k is not from 1 to `bins`.
        DataError: if `of` returns another shape or type; without privacy also if a record is in no
            bin.
    """
    return curator.select(of, Frequency(bins=bins, k=k), purpose=purpose)
