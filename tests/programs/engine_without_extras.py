"""A program: the engine at work with none of the heavy libraries, as on a machine that has torch
and little else.

It makes the imports below fail, trains the named strategies on blobs with and without privacy,
trains one against PGD, explains a prediction, and prints a line for each. `tests/test_imports.py`
runs it; it needs the rest of `perdure`'s dependencies: dp-accounting and cryptography for privacy,
safetensors for what is kept on disk.
"""

import sys
from functools import partial

ABSENT = ("flwr", "avalanche", "opacus", "ray", "matplotlib", "sklearn", "torchvision")
# None there makes an import fail as if nothing were installed
sys.modules.update(dict.fromkeys(ABSENT))

import torch  # noqa: E402

from perdure import Learner, Privacy, Records  # noqa: E402
from perdure.adversarial import PGD, robust_accuracy  # noqa: E402
from perdure.data.datasets.base import Dataset  # noqa: E402
from perdure.data.scenarios import split  # noqa: E402
from perdure.explain import KernelSHAP  # noqa: E402
from perdure.models.classifiers import mlp  # noqa: E402
from perdure.strategies import find  # noqa: E402


def blobs(seed, per_class=60):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(per_class)
    inputs = 0.8 * torch.eye(4, 6)[labels] + 0.1 * torch.rand(len(labels), 6, generator=generator)
    return Records(inputs=inputs, labels=labels, ids=torch.arange(len(labels)) + 10_000 * seed)


def train(stream, name, privacy=None, adversary=None):
    strategy = find(name).example()
    shapes = {"input_shape": stream.input_shape, "num_classes": stream.num_classes}
    own = strategy.small_model(**shapes)
    model = mlp(**shapes, hidden=(16,), seed=0) if own is None else own
    learner = Learner(
        model=model,
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        iterations=40,
        batch_size=30,
        privacy=privacy,
        adversary=adversary,
    )
    return learner, learner.fit(stream)


def main():
    torch.set_num_threads(1)
    data = Dataset(name="blobs", train=blobs(0), test=blobs(1, 20), num_classes=4, input_shape=(6,))
    stream = split(data, scenario="class", experiences=2)
    for name in sys.argv[1:]:
        simulated = Privacy(noise_multiplier=1.0, release_noise=1.0, delta=1e-3, seed=0)
        for privacy in (None,) if find(name).couples_records else (None, simulated):
            learner, matrix = train(stream, name, privacy=privacy)
            assert matrix[0, 0] > 80, (name, privacy, matrix)
            print(
                "trained",
                name,
                learner.private_sum.ledger.statement(delta=1e-3) if privacy else "without privacy",
            )
    attack = PGD(epsilon=0.1)
    learner, matrix = train(stream, "joint", adversary=attack)
    seen = stream[1].test
    robust = robust_accuracy(
        learner.model, seen.inputs, seen.labels, attack, generator=torch.Generator()
    )
    assert robust > 80, robust
    print("trained against PGD", robust)
    background = torch.zeros(1, 6)
    rows = data.test.inputs[:3]
    targets = torch.zeros(3, dtype=torch.long)
    shares = KernelSHAP().explain(learner.model, rows, background, targets=targets)
    output = learner.model(rows)[:, 0] - learner.model(background)[:, 0]
    torch.testing.assert_close(shares.values.sum(1), output.detach(), atol=1e-4, rtol=0)
    print("explained", len(rows))
    loaded = {module for module in sys.modules if module.partition(".")[0] in ABSENT}
    assert loaded == set(ABSENT), "a part of what is absent was loaded all the same"


if __name__ == "__main__":
    main()
