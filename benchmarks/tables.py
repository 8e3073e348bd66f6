"""Write the tables of docs/benchmarks.md from the stored rows.

A table stands on the page between two comments, so that it can be read without this program:

    <!-- rows: loop -->
    ...
    <!-- end -->

    python benchmarks/tables.py            write the tables of the page again
    python benchmarks/tables.py --check    say which of them differ from the rows, and exit with 1
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable

from table_kinds import ACCURACY, RESULTS, ROOT, Claims, Counts, Growth, Listing, Pivot

PAGE = ROOT / "docs/benchmarks.md"
MARKED = re.compile(r"(<!-- rows: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

SCENARIOS = ("task", "domain", "class")
METHODS = ("plain", "perdure", "opacus_ghost", "opacus_hooks")

TABLES: dict[str, Listing] = {
    "split_mnist": Pivot(
        file="split_mnist",
        only={"protocol": "vandeven"},
        columns={"strategy": "{strategy}"},
        line=("strategy",),
        across=("scenario", SCENARIOS),
        each=ACCURACY,
        last={"published, class": "{published}"},
    ),
    "split_mnist_hsu": Pivot(
        file="split_mnist",
        only={"protocol": "hsu"},
        columns={"strategy": "{strategy}"},
        line=("strategy",),
        across=("scenario", SCENARIOS),
        each=ACCURACY + ", {published}",
    ),
    "permuted_mnist": Listing(
        file="permuted_mnist",
        columns={"strategy": "`{options}`", "accuracy": ACCURACY, "forgetting": "{forgetting:.1f}"},
    ),
    "claims": Claims(
        file="claims",
        columns={
            "claim": "{sentence}",
            "paper": "{paper}",
            "seeds": "{seeds}",
            "measure": "{measure}",
            "compared": "{method} with {against}",
            "better by": "{difference:.1f} ({standard_error:.1f})",
            "shown": "{shown}",
        },
    ),
    "split_cifar10": Listing(
        file="split_cifar10",
        columns={"strategy": "{strategy}", "stored records": "{buffer}", "accuracy": ACCURACY},
    ),
    "loop": Listing(
        file="loop",
        columns={
            "strategy": "{strategy}",
            "perdure over bare loop": "{ratio:.3f}",
            "lowest": "{lowest:.3f}",
            "highest": "{highest:.3f}",
            "ms a step": "{milliseconds_per_step:.2f}",
        },
    ),
    "adversarial": Listing(
        file="adversarial",
        columns={
            "compared": "{compared}",
            "ratio": "{ratio:.2f}",
            "lowest": "{lowest:.2f}",
            "highest": "{highest:.2f}",
        },
    ),
    "robust_mnist": Listing(
        file="robust_mnist",
        columns={
            "method": "`{method}`",
            "seed": "{seed}",
            "epochs": "{epochs}",
            "clean": "{clean:.1f}",
            "PGD-50": "{pgd_50:.1f}",
            "AutoAttack": "{auto_attack:.1f}",
            "verified error": "{verified_error:.1f}",
            "training, CPU minutes": "{training_minutes:.1f}",
        },
    ),
    "robust_continual": Listing(
        file="robust_continual",
        columns={
            "method": "{method}",
            "epsilon": "{epsilon:g}",
            "accuracy": "{accuracy:.1f}",
            "robust accuracy": "{robust_accuracy:.1f} ({standard_error:.1f})",
            "robust forgetting": "{robust_forgetting:.1f}",
        },
    ),
    "watching": Listing(
        file="watching",
        columns={
            "watched by": "{watched}",
            "own share, %": "{own_percent:.2f}",
            "over silent steps": "{ratio:.3f}",
            "lowest": "{lowest:.3f}",
            "highest": "{highest:.3f}",
            "ms a step": "{milliseconds_per_step:.2f}",
        },
    ),
    "versus_avalanche": Pivot(
        file="versus_avalanche",
        columns={"strategy": "{strategy}"},
        line=("strategy",),
        across=("avalanche_data", ("images", "tensors")),
        each="{times_faster:.1f}",
    ),
    "dp_step": Pivot(
        file="dp_step",
        columns={"model": "{model}", "batch": "{batch}"},
        line=("model", "batch"),
        across=("method", METHODS[1:]),
        each="{wall_ratio:.2f} ({time_ratio:.2f}), {memory_ratio:.2f}",
    ),
    "private_models": Pivot(
        file="private_models",
        columns={"model": "{model}", "batch": "{batch}"},
        line=("model", "batch"),
        across=("method", ("perdure", "vmap", "opacus_hooks", "opacus_functorch", "opacus_ghost")),
        each="{time_ratio:.2f}",
    ),
    "growth_steps": Listing(
        file="growth",
        only={"row": ("ewc", "si", "mas", "rwalk")},
        columns={
            "strategy": "{row}",
            "ms a step": "{milliseconds_per_step:.0f}",
            "over Naive": "{naive_ratio:.2f}",
            "over a bare loop": "{bare_ratio:.2f}",
        },
    ),
    "growth": Growth(
        file="growth",
        columns={
            "what grows": "{row}",
            "sizes": "{sizes}",
            "ms each": "{milliseconds}",
            "of one": "{unit}",
            "exponent": "{exponent:.2f}",
            "at most": "{most:g}",
        },
    ),
    "ledger": Growth(
        file="ledger",
        columns={
            "operation": "{row}",
            "entries": "{sizes}",
            "ms each": "{milliseconds}",
            "exponent": "{exponent:.2f}",
            "at most": "{most:g}",
        },
    ),
    "growth_pieces": Listing(
        file="growth_pieces",
        only={"row": ("pieces", "pieces, replay", "pieces, replay by quotas")},
        columns={
            "strategy": "{row}",
            "pieces": "{pieces}",
            "seconds": "{seconds:.1f}",
            "in 5 experiences": "{seconds_in_experiences:.1f}",
            "ratio": "{ratio:.2f}",
        },
    ),
    "strategies": Listing(
        file="strategies",
        columns={
            "strategy": "{strategy}",
            "experience": "{experience}",
            "over Naive": "{ratio:.2f}",
            "passes": "{passes:.2f}",
            "ms": "{milliseconds:.2f}",
        },
    ),
    "rounds": Listing(
        file="rounds",
        only={"row": ("mlp", "cnn", "mlp_long")},
        columns={
            "model": "{row}",
            "ms a round": "{perdure_ms:.1f}",
            "over a bare loop": "{times_bare:.2f}",
            "over pfl-research": "{times_pfl:.2f}",
        },
    ),
    "rounds_clients": Listing(
        file="rounds",
        only={"row": ("clients", "idle")},
        columns={
            "row": "{row}",
            "clients": "{clients}",
            "ms a round": "{perdure_ms:.1f}",
            "clients that consolidate": "{consolidated}",
            "ms for consolidation": "{consolidation_ms:.1f}",
            "copies of the model an idle client keeps": "{copies:.2f}",
        },
    ),
    "engines": Listing(
        file="engines",
        columns={
            "clients": "{row}",
            "ms in process": "{inprocess_ms:.0f}",
            "ms on Ray": "{ray_ms:.0f}",
            "times faster": "{times:.1f}",
        },
    ),
    "scale": Listing(
        file="scale",
        columns={
            "clients are": "{mode}",
            "clients": "{clients}",
            "met": "{met}",
            "in memory at most": "{alive}",
            "rounds": "{rounds}",
            "peak memory, GB": "{gigabytes:.2f}",
            "seconds": "{seconds:.0f}",
        },
    ),
    "fixed_costs": Listing(
        file="fixed_costs",
        columns={
            "cost": "{what}",
            "ms at first": "{first_milliseconds:.2f}{without_milliseconds:.2f}{milliseconds:.0f}",
            "ms again": "{again_milliseconds:.2f}{with_milliseconds:.2f}",
            "ms after one more entry": "{one_entry_more_milliseconds:.0f}",
            "loss distributions, first and again": "{loss_distributions}, "
            "{loss_distributions_again}",
        },
    ),
    "importance": Listing(
        file="importance",
        columns={
            "row": "{row}",
            "ratio": "{ratio:.2f}",
            "target": "{target:g}",
            "peak, MiB": "{peak_mib:.0f}",
        },
    ),
    "explanation_drift": Listing(
        file="explanation_drift",
        columns={
            "scenario": "{scenario}",
            "strategy": "{strategy}",
            "accuracy": "{average_accuracy:.1f} ({average_accuracy_error:.1f})",
            "forgetting": "{forgetting:.1f} ({forgetting_error:.1f})",
            "rank correlation": "{reason_correlation:.2f} ({reason_correlation_error:.2f})",
            "same top": "{reason_overlap:.2f} ({reason_overlap_error:.2f})",
        },
    ),
    "noise": Pivot(
        file="noise",
        columns={"numbers": "{numbers}"},
        line=("numbers",),
        across=("method", ("exact, compiled", "exact, NumPy", "words", "torch.randn")),
        each="{nanoseconds_a_number:.1f}",
    ),
    "dp_mnist": Listing(
        file="dp_mnist",
        columns={
            "epsilon": "{epsilon:g}",
            "accuracy": "{accuracy:.2f} ({standard_error:.2f})",
            "published": "{published}",
        },
    ),
    "dp_continual": Pivot(
        file="dp_continual",
        columns={"strategy": "`{options}`"},
        line=("strategy",),
        across=("epsilon", (1.0, 3.0, 8.0)),
        each=ACCURACY,
    ),
    "next_token": Listing(
        file="next_token",
        columns={
            "adapters": "{setting}",
            "bits per character": "{bits_per_character:.3f} ({standard_error:.3f})",
            "just after learning": "{after_learning:.3f}",
            "forgetting": "{forgetting:.3f}",
            "epsilon": "{epsilon:.2f}",
            "noise multiplier": "{noise_multiplier:.2f}",
        },
    ),
    "analytic_mnist": Listing(
        file="analytic_mnist",
        columns={
            "strategy": "`{options}`",
            "epsilon": "{epsilon:g}",
            "accuracy": ACCURACY,
            "forgetting": "{forgetting:.1f}",
        },
    ),
    "federated_robust": Pivot(
        file="federated_robust",
        columns={"aggregator": "{aggregator}", "alpha": "{alpha:g}"},
        line=("aggregator", "alpha"),
        across=("attack", ("none", "sign flip", "model replacement", "label flip")),
        each="{accuracy:.1f} ({standard_error:.1f})",
    ),
    "federated_continual": Pivot(
        file="federated_continual",
        columns={"data": "{dataset}", "strategy": "{strategy}", "epsilon": "{epsilon:g}"},
        line=("dataset", "strategy", "epsilon"),
        across=("alpha", (0.5, 0.1, 0.05)),
        each=ACCURACY + ", {worst_client:.0f}, {forgetting:.0f}",
        last={"MB": "{megabytes:.0f}", "seconds": "{seconds:.1f}", "refused": "{refused}"},
    ),
    "kills": Listing(
        file="kills",
        columns={
            "noise": "{series}",
            "kills": "{kills}",
            "draws": "{draws}",
            "drawn again": "{redrawn}",
            "drawn again for another sum": "{redrawn_differently}",
            "charged too little": "{undercharged}",
            "charged too much": "{overcharged}",
        },
    ),
    "challenges": Listing(
        file="challenges",
        columns={
            "challenge": "{title}",
            "measure": "{measure}",
            "healthy": "{healthy:,.1f}",
            "with the fault": "{faulty:,.1f}",
            "with the remedy": "{remedied:,.1f}",
            "won back": "{recovered:.0%}",
            "named": "{named} of {seeds}",
            "remedy": "`{remedy}`",
        },
    ),
    "tune_digits": Listing(
        file="tune_digits",
        columns={
            "stream": "{stream}",
            "sampler": "{sampler}",
            "trials": "{trials}",
            "default": "{default:.1f}",
            "tuned": "{tuned:.1f}",
            "gain": "{gain:+.1f} ({standard_error:.1f})",
            "better": "{better} of {seeds}",
        },
    ),
    "doctor_faults": Counts(
        file="doctor",
        only={"group": ("fault", "other fault")},
        columns={"rightly named": "{group}"},
        counted={
            "doctor": "named",
            "before training": "examined_named",
            "SageMaker": "sagemaker_named",
            "AutoTrainer": "autotrainer_named",
        },
    ),
    "doctor_healthy": Counts(
        file="doctor",
        only={"group": ("held out", "calibration")},
        columns={"with a false alarm": "{group}"},
        counted={"doctor": "findings", "SageMaker": "sagemaker", "AutoTrainer": "autotrainer"},
    ),
    "healing": Counts(
        file="healing",
        only={"hurts": True},
        columns={"fault": "{fault}"},
        counted={"healed by the doctor": "doctor_healed", "by chance": "random_healed"},
    ),
    "explain": Listing(
        file="explain",
        columns={
            "data": "{data}",
            "peer": "{peer}",
            "instances": "{instances}",
            "features": "{features}",
            "outputs": "{outputs}",
            "samples": "{samples}",
            "seconds": "{seconds:.2f}",
            "peer's time over ours": "{ratio:.1f}",
            "lowest": "{lowest:.1f}",
            "error": "{error:.4f}",
            "peer's error": "{peer_error:.4f}",
        },
    ),
    "entered": Listing(
        file="entered",
        columns={
            "state": "{label}",
            "entered by": "{entered_by}",
            "files": "{files}",
            "functions": "{functions}",
        },
    ),
}
"""Tables by their names on the page."""


def table(name: str) -> str:
    """Return the Markdown of a table, with a line about the machine that measured its rows."""
    spec = TABLES[name]
    lines = spec.lines()
    rule = ["---"] * len(lines[0])
    text = "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
    return f"{text}\n{origin(spec)}\n"


def origin(spec: Listing) -> str:
    """Describe command, processor and versions of a table's rows, as one sentence in italics."""
    head = json.loads((RESULTS / f"{spec.file}.json").read_text())
    command = re.sub(r" --json \S+", "", head["command"])
    processor = head["machine"]["processor"]
    torch = head["versions"]["torch"]
    return f"*`{command}`, {processor}, {head['machine']['cores']} cores, torch {torch}.*"


def written(text: str) -> str:
    """Return the page with every table made from the present rows."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", text)


def stale(text: str) -> list[str]:
    """Return the names of the page's tables that differ from the rows."""
    return [name for _, name, body, _ in MARKED.findall(text) if body != table(name)]


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the tables, or check them with `--check`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(None if arguments is None else list(arguments))
    text = PAGE.read_text()
    if options.check:
        differing = stale(text)
        print(f"differ from the stored rows: {', '.join(differing) or 'none'}")
        return 1 if differing else 0
    PAGE.write_text(written(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
