"""Extensions of another distribution: found by entry point and by module:name, in Python and from a
config.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import perdure
from helpers.distributions import distribution

MODULE = '''
    """One extension of each kind, as somebody else's package brings them."""

    from dataclasses import dataclass
    from typing import ClassVar

    import torch

    from perdure import Strategy
    from perdure.adversarial import Attack
    from perdure.data.datasets import Dataset, from_stratified_split
    from perdure.explain import Attribution, Explainer
    from perdure.loggers import Logger
    from perdure.privacy.clipping import ClippingRule, PrecomputedRows
    from perdure.tasks import Regression
    from perdure.tasks.losses import Loss


    @dataclass(frozen=True, kw_only=True)
    class Shrink(Strategy):
        """Pull all parameters towards 0."""

        strength: float

        def penalty(self, params, state):
            return self.strength * sum(value.square().sum() for value in params.values())


    @dataclass(frozen=True, kw_only=True)
    class Darken(Attack):
        """Make every pixel darker, whatever the loss."""

        share: float = 1.0

        def perturb(self, losses, inputs, *, generator=None):
            limits = self._limits(inputs)
            return self._feasible(inputs, inputs - self.share * self.epsilon, limits)


    @dataclass(frozen=True, kw_only=True)
    class Occlusion(Explainer):
        """Fall of the output when one feature takes the value of the background."""

        scale: float = 1.0

        def explain(self, predict, inputs, background, *, targets=None, generator=None):
            rows = torch.arange(len(inputs))
            targets = predict(inputs).argmax(1) if targets is None else targets
            whole = predict(inputs)[rows, targets]
            values = torch.zeros(len(inputs), inputs[0].numel())
            for feature in range(values.shape[1]):
                changed = inputs.clone().flatten(1)
                changed[:, feature] = background.flatten(1)[0, feature]
                without = predict(changed.view_as(inputs))[rows, targets]
                values[:, feature] = self.scale * (whole - without)
            return Attribution(values=values.view_as(inputs), base=whole, targets=targets)


    @dataclass(frozen=True, kw_only=True)
    class Silent(Logger):
        """Write nothing."""

        def open(self, run):
            raise AssertionError("nothing is written")

        def __call__(self, point, learner):
            pass


    def stripes(seed: int = 0) -> Dataset:
        """Pictures of (1, 4, 4) in [0, 1] in which the row of the class is bright."""
        labels = torch.arange(4).repeat(30)
        noise = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        pictures = 0.3 * noise + 0.7 * torch.eye(4)[labels].view(120, 1, 4, 1)
        return from_stratified_split("stripes", pictures, labels, seed=seed, test_share=0.2)


    @dataclass(frozen=True, kw_only=True)
    class Levels(Regression):
        """Regression under another name."""


    @dataclass(frozen=True, kw_only=True)
    class Missed(Loss):
        """Probability of all other classes."""

        share: float = 1.0
        name: ClassVar[str] = "missed"

        def losses(self, logits, labels, allowed):
            p = torch.softmax(logits, dim=1)
            return self.share * (1 - p.gather(1, labels[:, None]).squeeze(1))


    class Gain(torch.nn.Module):
        """Scale every feature."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight


    class GainRule(ClippingRule):
        """Gradient of the scale: input times gradient of the output."""

        layers = (Gain,)
        parameters = frozenset({"weight"})

        def gradients(self, layer, calls):
            return PrecomputedRows({"weight": sum(x * back for x, back in map(_flowed, calls))})


    def _flowed(call):
        return call.flowed()
'''
RULES = """
from perdure.privacy.clipping.rules.registry import clipping_rules
from somebody.extensions import Gain
print(type(clipping_rules()[Gain]).__name__)
"""
KINDS = {
    # group: (package with `find` and `names`, name of the entry point, object in MODULE)
    "perdure.strategies": ("perdure.strategies", "shrink", "Shrink"),
    "perdure.attacks": ("perdure.adversarial", "darken", "Darken"),
    "perdure.explainers": ("perdure.explain", "occlusion", "Occlusion"),
    "perdure.datasets": ("perdure.data.datasets", "stripes", "stripes"),
    "perdure.tasks": ("perdure.tasks", "levels", "Levels"),
    "perdure.losses": ("perdure.tasks.losses", "missed", "Missed"),
    "perdure.loggers": ("perdure.loggers", "silent", "Silent"),
}
FINDING = """
import importlib, json, sys
found = {}
for package, name, target in json.loads(sys.argv[1]):
    module = importlib.import_module(package)
    assert name in module.names(), (name, module.names())
    assert "somebody.extensions" not in sys.modules or found
    by_entry_point = module.find(name)
    assert module.find(f"somebody.extensions:{target}") is by_entry_point
    found[package] = f"{by_entry_point.__module__}:{by_entry_point.__qualname__}"
print(json.dumps(found))
"""
CONFIG = """
name = "outside"
[data]
name = "stripes"
experiences = 2
[model]
hidden = [4]
[training]
epochs = 1
[training.loss]
name = "missed"
share = 2.0
[training.adversary]
name = "somebody.extensions:Darken"
epsilon = 0.1
[attack]
name = "darken"
epsilon = 0.2
share = 0.5
[explain]
method = "occlusion"
records = 2
scale = 2.0
[[loggers]]
name = "silent"
[[arms]]
strategy = "shrink"
strength = 0.001
[[arms]]
strategy = "somebody.extensions:Shrink"
strength = 0.002
"""
RUNNING = """
import json, sys
from pathlib import Path
from perdure.experiment.config import parse
from perdure.experiment.run import run
text = sys.stdin.read()
print(json.dumps(run(parse(text), text, Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the distribution, as site-packages has after an installation."""
    modules = {"somebody/__init__.py": "", "somebody/extensions.py": MODULE}
    groups = {
        group: {name: f"somebody.extensions:{target}"} for group, (_, name, target) in KINDS.items()
    }
    groups["perdure.clipping_rules"] = {"gain": "somebody.extensions:GainRule"}
    return distribution(tmp_path_factory.mktemp("site"), "somebody-extensions", modules, groups)


def python(installed, *words, text=""):
    """Run Python where the distribution is installed, and return the printed text."""
    path = [str(installed), str(Path(perdure.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_outside_extensions_are_found_by_entry_point_and_module(installed):
    found = json.loads(python(installed, "-c", FINDING, json.dumps(list(KINDS.values()))))
    assert found == {
        package: f"somebody.extensions:{target}" for package, _, target in KINDS.values()
    }


@pytest.mark.slow
def test_an_outside_clipping_rule_is_found_by_its_layer_type(installed):
    """Rules are found by the type of a layer, so they are never named."""
    assert python(installed, "-c", RULES).strip() == "GainRule"


@pytest.mark.deep(reason="full replay: a whole run with foreign extensions")
@pytest.mark.slow
def test_a_config_can_use_extensions_from_another_package(installed, tmp_path):
    result = json.loads(python(installed, "-c", RUNNING, str(tmp_path / "run"), text=CONFIG))
    assert [arm["strategy"] for arm in result["arms"]] == ["shrink", "somebody.extensions:Shrink"]
    assert [arm["options"] for arm in result["arms"]] == [
        "Shrink(strength=0.001)",
        "Shrink(strength=0.002)",
    ]
    assert result["stream"]["classes"] == [[0, 1], [2, 3]]
    objectives = ["rescaled_cross_entropy", "margin"]
    expected = {"name": "darken", "epsilon": 0.2, "norm": "linf", "objectives": objectives}
    assert result["attack"] == expected
    assert result["explanations"]["method"] == "occlusion"
    folders = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert folders == {"shrink-plain", "somebody.extensions.Shrink-plain"}
