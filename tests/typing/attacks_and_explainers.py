"""Mistakes of users with attacks and explainers that a type checker must report."""

from typing import reveal_type

import torch

from perdure.adversarial import CW as MISSING  # E[attr-defined]: "CW"
from perdure.adversarial import FGSM, PGD
from perdure.adversarial import find as find_attack
from perdure.explain import LIME, ExactShapley, Explainer, KernelSHAP
from perdure.explain import Anchors as Absent  # E[attr-defined]: "Anchors"
from perdure.explain import find as find_explainer

pgd = PGD(epsilon=0.1, steps=5, bounds=None)
PGD(steps=5)  # E[call-arg]: "epsilon"
PGD(epsilon=0.1, norm="l3")  # E[arg-type]: "norm"
FGSM(epsilon=0.1, steps=5)  # E[call-arg]: "steps"
MISSING(epsilon=0.1)
reveal_type(find_attack("pgd"))  # N: type[perdure.adversarial.base.Attack]

explainer: Explainer = KernelSHAP(samples=100)
KernelSHAP(sample=100)  # E[call-arg]: "sample"
LIME(noise_scale=torch.ones(3))  # E[arg-type]: "noise_scale"
ExactShapley(samples=100)  # E[call-arg]: "samples"
Absent()
slopes = LIME().explain(lambda rows: rows, torch.ones(1, 2))
reveal_type(slopes)  # N: perdure.explain.lime.LocalModel
explainer.explain(lambda rows: rows, torch.ones(1, 2))  # E[call-arg]: "background"
reveal_type(find_explainer("lime"))  # N: type[perdure.explain.base.Explainer]
