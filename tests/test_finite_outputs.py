"""NaN and infinite outputs are refused wherever the largest output is used."""

import math

import pytest
import torch

from perdure.adversarial import FGSM, robust_accuracy
from perdure.auditing.membership import logit_confidence
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.explain import LIME, KernelSHAP
from perdure.metrics import accuracy
from perdure.utils.finite_outputs import finite_outputs

ROWS = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
TEXT = r"NaN or infinite for 1 of \d records, first record \d; allowed: finite numbers"


def predict(value):
    """Return logits whose last row has one value in its second column."""

    def answer(rows):
        last = (rows == ROWS[-1]).all(1) | (rows.shape[0] == 1)
        spoilt = torch.stack([rows[:, 0], torch.full_like(rows[:, 1], value)], 1)
        return torch.where(last[:, None], spoilt, rows)

    return answer


USES = {
    "accuracy": lambda f: accuracy(f, ROWS, LABELS, 4),
    "robust accuracy": lambda f: robust_accuracy(
        f, ROWS, LABELS, FGSM(epsilon=0.0), generator=None
    ),
    "membership": lambda f: logit_confidence(f, Records(inputs=ROWS, labels=LABELS)),
    "explained output": lambda f: KernelSHAP().explain(f, ROWS, ROWS[:1]),
    "explained score": lambda f: LIME().explain(f, ROWS, targets=LABELS),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("use", USES)
def test_nan_and_infinite_model_outputs_are_refused(use, value):
    with pytest.raises(ConfigError, match=TEXT) as caught:
        USES[use](predict(value))
    assert "\n" not in str(caught.value)


def test_the_error_names_the_first_bad_record_over_all_batches():
    with pytest.raises(ConfigError, match="for 1 of 2 records, first record 5;"):
        accuracy(predict(math.nan), ROWS, LABELS, 4)


def test_an_attack_that_makes_outputs_nan_raises_an_error():
    def overflow(rows):
        return torch.where(rows > 0.5, math.nan, rows)

    rows = torch.full((2, 2), 0.45)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        robust_accuracy(
            overflow, rows, torch.zeros(2, dtype=torch.int64), FGSM(epsilon=0.2), generator=None
        )


def test_finite_outputs_accepts_minus_infinity_for_a_class():
    outputs = torch.tensor([[-math.inf, 1.0], [0.0, -math.inf]])
    assert finite_outputs(outputs) is outputs
    with pytest.raises(ConfigError, match="for 1 of 2 records, first record 1;"):
        finite_outputs(torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]))


def test_finite_outputs_checks_every_position_of_a_sequence():
    outputs = torch.zeros(3, 4, 5)
    finite_outputs(outputs)
    outputs[1, 2, 3] = math.nan
    with pytest.raises(ConfigError, match="for 1 of 3 records, first record 1;"):
        finite_outputs(outputs)
