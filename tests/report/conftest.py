"""A realistic finished run, generated: four strategies with and without privacy on five
experiences.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perdure.experiment.seeds import AVERAGED
from perdure.metrics import summarise
from perdure.report import write_report

T = 5
# Share of accuracy that an experience keeps per later experience, and the growth of epsilon, both
# made up.
KEPT = {"naive": 0.0, "ewc": 0.12, "lwf": 0.55, "replay": 0.93}
EPSILONS = {
    "naive": [7.98, 7.98, 7.98, 7.98, 7.98],
    "ewc": [7.99, 7.99, 7.99, 7.99, 7.99],
    "lwf": [7.98, 7.98, 7.98, 7.98, 7.98],
    "replay": [5.1023, 6.2117, 6.9134, 7.4881, 7.9801],
}
OPTIONS = {
    "naive": "Naive()",
    "ewc": "EWC(strength=100.0)",
    "lwf": "LwF(temperature=2.0)",
    "replay": "Replay(capacity=200)",
}


def epsilon(value: float, text: str) -> dict[str, Any]:
    return {
        "value": value,
        "delta": 1e-5,
        "unit": "record",
        "relation": "add-remove",
        "accountant": "PLD",
        "sampling": "poisson",
        "trust": "each client trusts itself; the server sees released sums only",
        "simulated": True,
        "text": text,
    }


def accuracies(strategy: str, private: bool, generator: torch.Generator) -> Tensor:
    learnt = 98 - 16 * private - 4 * torch.rand(T, generator=generator, dtype=torch.float64)
    age = (torch.arange(T)[:, None] - torch.arange(T)[None]).double()
    matrix = learnt * (KEPT[strategy] - 0.05 * private * (KEPT[strategy] > 0)) ** age.clamp_min(0)
    return torch.where(age < 0, 0.0, matrix).clamp(0, 100)


def arm(strategy: str, private: bool, generator: torch.Generator) -> dict[str, Any]:
    matrix = accuracies(strategy, private, generator)
    summary = summarise(matrix, torch.full((T,), 10.0))
    spent = EPSILONS[strategy][-1]
    text = (
        "Adding or removing any one record changes the odds of any conclusion by at most a factor "
        f"of e^{spent:.2f}, except with probability 1e-5."
    )
    name = f"{strategy}-{'private' if private else 'plain'}"
    numbers = {
        "accuracy_matrix": matrix.tolist(),
        "average_accuracy": summary.average_accuracy,
        "learning_accuracy": summary.learning_accuracy,
        "forgetting": summary.forgetting,
        "backward_transfer": summary.backward_transfer,
        "forward_transfer": summary.forward_transfer,
        "area_under_accuracy": summary.area_under_accuracy,
        "worst_experience_accuracy": summary.worst_experience_accuracy,
        "calibration_error": [0.05] * T,
        "state_bytes": 0,
        "robust_accuracy": 0.6 * summary.average_accuracy,
        "epsilon": epsilon(spent, text) if private else None,
        "epsilon_over_time": EPSILONS[strategy] if private else None,
        "spending": _spending(strategy) if private else [],
        "seconds": 11.4 + 3.1 * private,
    }
    trial = {"seed": 1, "trial": name, "failure": None, "progress": []} | numbers
    return numbers | {
        "name": name,
        "strategy": strategy,
        "options": OPTIONS[strategy],
        "private": private,
        "standard_error": dict.fromkeys(AVERAGED),
        "failures": [],
        "seeds": [trial],
    }


def _spending(strategy: str) -> list[dict[str, Any]]:
    gradient = {"purpose": "gradient", "steps": 500, "noise_multiplier": 1.1, "sampling_rate": 0.2}
    fisher = {
        "purpose": "Fisher diagonal",
        "steps": 5,
        "noise_multiplier": 4.0,
        "sampling_rate": 1.0,
    }
    return [gradient, fisher] if strategy == "ewc" else [gradient]


@pytest.fixture(scope="session")
def _result() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "schema": 2,
        "name": "demo",
        "seeds": [1],
        "task": {
            "name": "single-label",
            "metric": "accuracy",
            "unit": "%",
            "higher_is_better": True,
        },
        "stream": {
            "name": "digits",
            "scenario": "class",
            "experiences": T,
            "classes": [[2 * i, 2 * i + 1] for i in range(T)],
        },
        "model": {"name": "MLP", "hidden": [64, 64], "classes": 10},
        "federation": {
            "clients": 10,
            "rounds": 3,
            "alpha": 0.5,
            "declared_sizes": torch.randint(16, 60, (10, T), generator=generator).tolist(),
        },
        "environment": {
            "python": "3.11.7",
            "torch": "2.15.0",
            "perdure": "0.1.0",
            "platform": "Linux",
        },
        "attack": {"name": "PGD", "epsilon": 0.1, "steps": 10, "norm": "linf"},
        "arms": [
            arm(strategy, private, generator) for strategy in KEPT for private in (False, True)
        ],
        "epsilon_of_all_arms": epsilon(
            17.3412, "It covers all four models with privacy, released together."
        ),
        "explanations": {
            "file": "explanations.safetensors",
            "method": "kernel_shap",
            "arm": "replay",
            "moments": ["after experience 1", "after experience 5"],
        },
    }


@pytest.fixture
def result(_result: dict[str, Any]) -> dict[str, Any]:
    """Return a separate result for each test to change."""
    return copy.deepcopy(_result)


@pytest.fixture
def run(tmp_path: Path, result: dict[str, Any]) -> Path:
    """The result as a run on disk, with explanation tensors and a configuration."""
    folder = tmp_path / "demo"
    folder.mkdir()
    write(folder, result)
    (folder / "config.toml").write_text(
        'name = "demo"\nseed = 1\n\n[stream]\ndataset = "digits"\nexperiences = 5\n'
    )
    save_file(explanations(), folder / "explanations.safetensors")
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, _result: dict[str, Any]) -> Path:
    """Return the run with its page, for tests that only read."""
    folder = tmp_path_factory.mktemp("written")
    write(folder, _result)
    save_file(explanations(), folder / "explanations.safetensors")
    write_report(folder)
    return folder


def write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result))


def explanations() -> dict[str, Tensor]:
    """Return digits 0 and 1 with attributions that fade, because a report shows real inputs."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels[:2] / 16, dtype=torch.float32).view(2, 1, 8, 8)
    signs = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    values = torch.stack([inputs * signs, 0.4 * inputs * signs.flip(-1)])
    return {"inputs": inputs, "labels": torch.tensor(labels[:2]), "values": values}
