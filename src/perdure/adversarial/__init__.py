"""Attacks that raise each record's own loss, as a step of training and as an evaluation."""

from perdure.adversarial.base import Attack, Losses, Norm
from perdure.adversarial.fgsm import FGSM
from perdure.adversarial.pgd import PGD
from perdure.adversarial.robust_accuracy import robust_accuracy

__all__ = ["FGSM", "PGD", "Attack", "Losses", "Norm", "robust_accuracy"]
