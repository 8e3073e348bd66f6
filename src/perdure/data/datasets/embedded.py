"""Digits and breast cancer: data sets that come with scikit-learn."""

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.records import Records
from perdure.errors import ConfigError


def digits(*, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, inputs (1, 8, 8) in [0, 1]; part of scikit-learn.

    Args:
        seed: of the stratified split.
        test_share: share of each class that goes to the test part.

    Raises:
        ConfigError: when `test_share` is not between 0 and 1.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI.
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    images = torch.from_numpy(table.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(table.target).long()
    return _stratified("digits", images, labels, seed, test_share, facts=())


def breast_cancer(*, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """569 tumours, 30 measurements each, malignant (0) or benign (1); part of scikit-learn.

    Guarantee: none for the scaling. Each column is standardised with its mean and standard
    deviation over the whole published table; these 60 numbers are *declared public*. For records of
    your own, declare such constants in advance or release them.

    Args:
        seed: of the stratified split.
        test_share: share of each class that goes to the test part.

    Raises:
        ConfigError: when `test_share` is not between 0 and 1.

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
    return _stratified("breast-cancer", scaled.float(), labels, seed, test_share, facts=(fact,))


def _stratified(
    name: str,
    inputs: Tensor,
    labels: Tensor,
    seed: int,
    test_share: float,
    *,
    facts: tuple[str, ...],
) -> Dataset:
    """Build a data set by a seeded split that takes the same share of every class.

    Ids index the source.
    """
    if not 0 < test_share < 1:
        raise ConfigError.of("test_share", test_share, "a number between 0 and 1, both excluded")
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        rows = (labels == label).nonzero().squeeze(1)
        in_test[
            rows[torch.randperm(len(rows), generator=generator)[: round(test_share * len(rows))]]
        ] = True
    source = Records(inputs=inputs, labels=labels, partition=name)
    test = source.take(in_test)
    return Dataset(
        name=name,
        train=source.take(~in_test),
        test=Records(
            inputs=test.inputs, labels=test.labels, ids=test.ids, partition=f"{name}-test"
        ),
        num_classes=num_classes,
        input_shape=tuple(inputs.shape[1:]),
        public_facts=facts,
    )
