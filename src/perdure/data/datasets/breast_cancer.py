"""Breast cancer Wisconsin, a table that comes with scikit-learn."""

import torch

from perdure.data.datasets.base import Dataset, from_stratified_split
from perdure.utils.checked_arguments import checked_arguments

STANDARDISED = (-10.0, 20.0)
"""Declared range of a standardised measurement: round numbers beyond the published table."""


@checked_arguments
def breast_cancer(
    *, seed: int = 0, test_share: float = 0.3, declared_size: int | None = None
) -> Dataset:
    """569 tumours, 30 measurements each, malignant (0) or benign (1); part of scikit-learn.

    Guarantee: none for the scaling. Each column is standardised with its mean and standard
    deviation over the whole published table; these 60 numbers are *declared public*. For your own
    records, declare such constants in advance or release them.

    Args:
        seed: seed of the stratified split.
        test_share: share of each class in the test part.
        declared_size: public number of training records; None for the actual number.

    Raises:
        ConfigError: if `test_share` is not between 0 and 1.

    Source: Wolberg, Mangasarian, Street 1995, "Breast cancer Wisconsin (diagnostic)", UCI.
    """
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    columns = torch.from_numpy(table.data)
    scaled = (columns - columns.mean(0)) / columns.std(0, correction=0)
    fact = (
        "columns are standardised with means and deviations of the whole published table, "
        "declared public"
    )
    labels = torch.from_numpy(table.target).long()
    return from_stratified_split(
        "breast-cancer",
        scaled.float(),
        labels,
        seed=seed,
        test_share=test_share,
        facts=(fact,),
        declared_size=declared_size,
        value_range=STANDARDISED,
        size_published=True,
    )
