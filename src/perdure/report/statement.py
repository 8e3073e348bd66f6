"""Privacy statement of the report page, in plain words for a privacy officer."""

import math
from html import escape

from perdure.experiment.result_schema import ArmResult, Epsilon, Result
from perdure.report.sections import spending_table
from perdure.report.wording import SIMULATION, by_privacy, epsilon_number, phrase, small

UNITS = {
    "record": "One record is one row of the original data. All its copies, rotations and replays "
    "count as the same record. A person with several records is protected less; if each person is "
    "one client, client-level privacy covers all records of the person.",
    "client": "One client is one participant of the federation with all its records.",
}
SIZES = (
    "The number of records of each partition is public: sampling rates, numbers of steps and "
    "divisors follow from the declared number and are not hidden. If no number was declared, the "
    "real number is used, and it becomes public."
)
RELATIONS = {
    "add-remove": "Two data sets are neighbours when one has one "
    "{unit} more than the other. It is hidden whether a given {unit} took part.",
    "replace-one": "Two data sets are neighbours when one {unit} of "
    "the first is another {unit} in the "
    "second. It is hidden which of the two took part; the number of units is assumed to be public.",
}


def statement(result: Result) -> str:
    """Return the privacy statement for each arm, and for all models together."""
    private = [(arm, label) for arm, label in by_privacy(result["arms"]) if arm["epsilon"]]
    if not private:
        return (
            "<p><strong>No promise.</strong> Every model of this run was trained without "
            "differential privacy. Treat each as if it contained its training records.</p>"
        )
    arms = "".join(_arm(arm, label, arm["epsilon"]) for arm, label in private if arm["epsilon"])
    models = sum(len(arm["seeds"]) for arm, _ in private)
    return f"{_warning(result)}{_together(result, models)}{_meaning(private)}{arms}"


def guess_limit(epsilon: float, delta: float) -> float:
    """Largest probability of a right guess between two neighbouring data sets, from even odds.

    (e^epsilon + delta) / (e^epsilon + 1)

    Guarantee: exact for (epsilon, delta)-differential privacy, for every method and knowledge of
    the guesser.

    Source: Kairouz, Oh and Viswanath 2015, section 2 (total variation of the dominating pair).

    >>> round(guess_limit(1.0, 0.0), 3)
    0.731
    """
    return (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))


def _warning(result: Result) -> str:
    every = [arm["epsilon"] for arm in result["arms"]] + [result["epsilon_of_all_arms"]]
    if not any(epsilon["simulated"] for epsilon in every if epsilon):
        return ""
    return (
        f'<p class="warning"><strong>{SIMULATION.capitalize()}.</strong> '
        "The noise of this run comes from a seed that its user chose, so that the run can be "
        "repeated. Anyone who knows the seed can subtract the noise. The numbers are the promise "
        "of the same run with secret noise; this run promises nothing.</p>"
    )


def _together(result: Result, private: int) -> str:
    joint = result["epsilon_of_all_arms"]
    free = sum(len(arm["seeds"]) for arm in result["arms"] if not arm["epsilon"])
    told = _stated(joint) if joint else _unstated(private)
    return (
        '<div class="together"><h3>All models of this run '
        f"together</h3><p>{told}</p>{_unprotected(free)}</div>"
    )


def _stated(joint: Epsilon) -> str:
    return (
        f"Epsilon {escape(phrase(joint))}. Use this number if more than one of these models is "
        "shown, or if the best model is chosen by a comparison."
    )


def _unstated(private: int) -> str:
    if private == 1:
        return "Only one model was trained with privacy, so its statement below is complete."
    return (
        f"No joint epsilon was computed for the {private} models with privacy. It is at least as "
        "large as each epsilon below, so show one model only, and choose it without looking at "
        "the others."
    )


def _unprotected(free: int) -> str:
    if not free:
        return ""
    which = "One model was" if free == 1 else f"{free} models were"
    return (
        f"<p>{which} trained without privacy on the same records and have no promise (epsilon is "
        "infinite). The statement above holds only if these models are shown to nobody except "
        "people who may see the records.</p>"
    )


def _meaning(private: list[tuple[ArmResult, str]]) -> str:
    stated = [arm["epsilon"] for arm, _ in private if arm["epsilon"]]
    units = {epsilon["unit"]: UNITS.get(epsilon["unit"], "") for epsilon in stated}
    relations = {
        epsilon["relation"]: RELATIONS.get(epsilon["relation"], "").format(unit=epsilon["unit"])
        for epsilon in stated
    }
    told = [("Unit", units), ("Relation", relations)]
    rows = "".join(
        f"<dt>{kind}: {escape(name)}</dt><dd>{escape(text)}</dd>"
        for kind, words in told
        for name, text in words.items()
    )
    rows += f"<dt>Declared sizes: public</dt><dd>{escape(SIZES)}</dd>"
    return f'<h3>What is protected, in plain words</h3><dl class="facts">{rows}</dl>'


def _arm(arm: ArmResult, label: str, epsilon: Epsilon) -> str:
    terms = {
        "accountant": epsilon["accountant"],
        "sampling": epsilon["sampling"],
        "trust model": epsilon["trust"],
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in terms.items())
    return (
        f"<article><h3>{escape(label)}: epsilon "
        f"{_short(epsilon)}</h3><p>{escape(epsilon['text'])}</p>{_each_seed(arm)}"
        f"<p>{_plainly(epsilon)}</p>"
        f'<dl class="facts">{rows}</dl>{spending_table(arm, label)}</article>'
    )


def _each_seed(arm: ArmResult) -> str:
    """Return a warning that an arm's privacy statement is for each seed's model alone."""
    models = len(arm["seeds"])
    if models == 1:
        return ""
    return (
        f"<p>This arm has {models} models, one for each seed. The statement holds for each of them "
        "alone; who sees several of them, or a mean over them, needs the epsilon of all models "
        "above.</p>"
    )


def _short(epsilon: Epsilon) -> str:
    label = f' <span class="simulated">{SIMULATION}</span>' if epsilon["simulated"] else ""
    return f"{epsilon_number(epsilon['value'])}{label}"


def _plainly(epsilon: Epsilon) -> str:
    unit = escape(epsilon["unit"])
    question = f"whether one given {unit} took part"
    if epsilon["relation"] == "replace-one":
        question = f"which of two given {unit}s took part"
    limit = math.ceil(guess_limit(epsilon["value"], epsilon["delta"]) * 10_000 - 1e-9) / 100
    return (
        f"In plain words: someone who sees this model, knows all other {unit}s and guesses "
        f"{question}, starting from even odds, is right at most {limit:g} % of the time (50 % "
        f"would be pure chance). This follows from epsilon and δ = {small(epsilon['delta'])}; "
        "nothing that is later computed from the model can change it."
    )
