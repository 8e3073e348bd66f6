"""`perdure ledger show` and `project`: the charges of every partition, and the cost of more
steps.
"""

import json
import shutil
from dataclasses import asdict

import pytest

from helpers.command_line import assert_refused
from helpers.ledger_cli import ARMS, CONFIG, KEY, shown
from perdure.experiment.config import parse
from perdure.experiment.run import run
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting import charges as charges_module
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import read as read_ledger
from perdure.report.ledger_tables import exposures
from perdure.report.wording import epsilon_number

LABEL = "simulation: not a private release"


def as_json(answer):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(shown(answer), parse_constant=refuse)


@pytest.fixture
def unfinished(tmp_path):
    """Return a run that was stopped in the second private arm."""

    def stop(point, learner):
        if learner.owner.startswith("replay-private") and point == "evaluated":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(parse(CONFIG), CONFIG, tmp_path / "stopped", callbacks=[stop])
    return tmp_path / "stopped"


def contents(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# --------------------------------------------------------------------------- show


def test_show_prints_charges_of_every_partition(perdure, alone):
    out = shown(perdure("show", alone))
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines[: lines.index("replay-private/client-0")])) <= 120
    first = lines.index("ewc-private/client-0")
    second = lines.index("replay-private/client-0")
    ewc = lines[first + 1 : second - 1]
    replay = lines[second + 1 : second + 3]
    sizes = [part.account.sizes for part in read_ledger(alone / "ledger.jsonl").parts]
    for index in (0, 1):
        gradient, fisher = (line.split() for line in ewc[2 * index : 2 * index + 2])
        assert gradient[:2] == [f"experience-{index}", str(sizes[0][f"experience-{index}"])]
        assert " ".join(gradient[2:]).startswith(
            "4 x gradient (gaussian) at q 0.25, sigma 1.5, C 1 "
        )
        assert " ".join(fisher) == "1 x release:fisher (gaussian) at sigma 6, C 1"
    assert "8 x gradient (gaussian) at q 0.25, sigma 1.5, C 1" in replay[0]
    assert "4 x gradient (gaussian) at q 0.25, sigma 1.5, C 1" in replay[1]
    assert [line.split()[-1] == "worst" for line in (*ewc[::2], *replay)].count(True) == (
        2 if "worst" in ewc[0] else 1
    )


def test_show_prints_the_epsilon_that_the_result_stores(perdure, either):
    out = shown(perdure("show", either))
    result = result_of(either)
    private = [arm["epsilon"] for arm in result["arms"] if arm["private"]]
    worst = max(private, key=lambda epsilon: epsilon["value"])
    assert (
        f"epsilon {epsilon_number(worst['value'])} (record, add/remove, delta 0.0005, PLD, "
        "Poisson sampling" in out
    )
    assert (
        "all arms together, for whoever sees more than one: "
        f"{result['epsilon_of_all_arms']['text']}\n" in out
    )
    assert "trained without privacy, so in no ledger and with no promise: naive-plain\n" in out
    assert "chains and keyed heads verified" in out
    assert (LABEL in out) == ("federated" in str(either))
    assert ("anyone can make such heads" in out) == ("federated" in str(either))
    assert "not finished" not in out


def test_show_prints_the_stored_epsilon_of_each_arm(perdure, either):
    for arm in result_of(either)["arms"]:
        name = f"{arm['strategy']}-private"
        if arm["private"]:
            facts = as_json(perdure("show", either, "--arm", name, "--json"))
            assert {
                k: v for k, v in facts["statement"].items() if k not in ("text", "sampling")
            } == {k: v for k, v in arm["epsilon"].items() if k not in ("text", "sampling")}
            assert max(row["epsilon_pld"] for row in facts["partitions"]) == arm["epsilon"]["value"]
            assert facts["all_arms_together"] is None


def test_show_json_holds_every_charge_of_every_partition(perdure, either):
    facts = as_json(perdure("show", either, "--json"))
    account = read_ledger(either / "ledger.jsonl")
    assert [f"{row['owner']}/{row['partition']}" for row in facts["partitions"]] == list(
        account.partitions
    )
    spent = {}
    for name, row in zip(account.partitions, facts["partitions"], strict=True):
        charges = [
            Charge(u["sampling_rate"], u["noise_multiplier"], u["participations"], u["accounted"])
            for u in row["uses"]
        ]
        assert charges_module.merged(charges) == charges_module.merged(account.charges(name))
        assert row["declared_size"] == account.sizes[name]
        assert row["epsilon_pld"] == accounting.epsilon(charges, delta=0.0005)
        assert (
            row["epsilon_rdp"]
            == accounting.epsilon(charges, delta=0.0005, accountant="rdp")
            > row["epsilon_pld"]
        )
        assert {(u["mechanism"], u["clip_norm"]) for u in row["uses"]} == {("gaussian", 1.0)}
        spent[name] = row["epsilon_pld"]
    worst = [name for name, row in zip(spent, facts["partitions"], strict=True) if row["worst"]]
    assert worst == [name for name, epsilon in spent.items() if epsilon == max(spent.values())]
    assert facts["statement"]["value"] == max(spent.values())
    assert (
        facts["finished"]
        and facts["without_privacy"] == ["naive-plain"]
        and facts["delta"] == 0.0005
    )
    assert all(ledger["head_verified"] for ledger in facts["ledgers"])
    assert facts["all_arms_together"] == result_of(either)["epsilon_of_all_arms"]


def test_show_takes_delta_from_the_option_the_run_or_a_default(perdure, alone, tmp_path):
    own, asked = (
        as_json(perdure("show", alone, "--json", *more)) for more in ((), ("--delta", 1e-6))
    )
    assert (own["delta"], asked["delta"]) == (0.0005, 1e-6)
    assert asked["statement"]["value"] > own["statement"]["value"]
    shutil.copy(alone / "ledger.jsonl", tmp_path / "sent.jsonl")
    sent = as_json(perdure("show", tmp_path / "sent.jsonl", "--json"))
    # a ledger says itself which delta its run was asked for
    assert sent["delta"] == 0.0005
    Ledger.open(tmp_path / "older.jsonl", key=KEY).declare("a", 12)
    assert as_json(perdure("show", tmp_path / "older.jsonl", "--json"))["delta"] == 1e-5
    assert_refused(perdure("show", alone, "--delta", 1), "delta = 1.0 is not allowed")


def test_show_filters_ledgers_by_arm_and_owner(perdure, federated):
    def owners(*more):
        facts = as_json(perdure("show", federated, "--json", *more))
        return sorted({row["owner"] for row in facts["partitions"]})

    every = [f"{arm}/client-{client}" for arm in ARMS for client in (0, 1)]
    assert owners() == every
    assert owners("--arm", "ewc-private") == every[:2]
    assert owners("--owner", every[1], "--owner", every[2]) == every[1:3]
    assert owners("--arm", "ewc-private", "--owner", every[1]) == every[1:2]
    out = shown(perdure("show", federated, "--owner", every[1]))
    assert "shown: 1 of 4 ledgers; the others are not in these numbers" in out
    assert "all arms together" not in out and every[0] not in out
    assert_refused(
        perdure("show", federated, "--arm", "lwf-private"), "arm = 'lwf-private'", "ewc-private"
    )
    assert_refused(
        perdure("show", federated, "--owner", "client-0"), "owner = 'client-0'", every[0]
    )


def test_show_prints_the_charges_of_an_unfinished_run(perdure, unfinished, alone):
    out = shown(perdure("show", unfinished))
    assert "the run is not finished: this is what it was charged so far" in out
    assert "chains and keyed heads verified" in out
    facts = as_json(perdure("show", unfinished, "--json"))
    assert [row["uses"][0]["steps"] for row in facts["partitions"][:3]] == [4, 4, 4]
    assert facts["partitions"][3]["uses"] == [] and facts["partitions"][3]["epsilon_pld"] == 0
    assert not facts["finished"]
    assert "nothing yet" in out
    assert shown(perdure("verify", unfinished)).count("\n") == 3


def test_show_accepts_the_path_of_an_arm_a_client_or_a_file(perdure, federated):
    client = federated / "arms" / "ewc-private" / "clients" / "001"
    for path in (client, client / "ledger.jsonl"):
        facts = as_json(perdure("show", path, "--json"))
        assert [row["owner"] for row in facts["partitions"]] == ["ewc-private/client-1"] * 2
        assert facts["delta"] == 0.0005 and facts["ledgers"][0]["head_verified"]
    facts = as_json(perdure("show", client.parent.parent, "--json"))
    assert [part["owner"] for part in facts["ledgers"]] == [
        "ewc-private/client-0",
        "ewc-private/client-1",
    ]


def test_show_lists_all_clients_with_the_same_owner(perdure, tmp_path):
    for client in (0, 1):
        ledger = Ledger.open(
            tmp_path / "clients" / f"{client:03d}" / "ledger.jsonl", key=KEY, owner="curator"
        )
        ledger.declare(f"client-{client}/experience-0", 12)
    for words in ((), ("--owner", "curator")):
        facts = as_json(perdure("show", tmp_path, "--json", *words))
        assert [row["partition"] for row in facts["partitions"]] == [
            "client-0/experience-0",
            "client-1/experience-0",
        ]


def test_show_and_verify_refuse_a_folder_without_a_ledger(perdure, tmp_path):
    for command in ("show", "verify"):
        for path in (tmp_path, tmp_path / "no"):
            assert_refused(
                perdure(command, path), f"{path} has no ledger; give the folder of a run"
            )


def test_show_head_project_and_verify_change_no_file(perdure, mine):
    (mine / "arms" / "ewc-private" / "private" / "key").unlink()
    before = contents(mine)
    for words in (
        ("show",),
        ("head",),
        ("project", "--noise-multiplier", 1, "--sampling-rate", 0.5, "--steps", 3),
    ):
        shown(perdure(words[0], mine, *words[1:]))
    assert perdure("verify", mine)[0] == 3
    assert contents(mine) == before


# --------------------------------------------------------------------------- show: other accounts


def entry(**changes):
    facts = {
        "purpose": "gradient",
        "mechanism": "gaussian",
        "noise_multiplier": 2.0,
        "clip_norm": 0.5,
        "first_step": 0,
        "steps": 10,
        "sampling": "poisson",
        "scope": {"a": 0.25},
        "data": "",
        "start": "",
        "simulated": True,
    }
    return Entry(**facts | changes)


def test_show_prints_a_dash_if_rdp_has_no_bound(perdure, tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=KEY, relation="replace-one")
    for name in "abc":
        ledger.declare(name, 12)
    for name, steps in (("a", 10), ("b", 20), ("c", 1)):
        ledger.charge(entry(relation="replace-one", scope={name: 0.25}, steps=steps))
    out = shown(perdure("show", tmp_path))
    assert [line.split()[-2:] for line in out.splitlines() if line[:3] in ("  a", "  b")] == [
        ["–", "worst"]
    ] * 2
    assert "(record, replace-one, delta 1e-5, PLD, Poisson sampling" in out
    facts = as_json(perdure("show", tmp_path, "--json"))
    assert [(row["epsilon_rdp"], row["worst"]) for row in facts["partitions"]] == [
        (None, True),
        (None, True),
        (None, False),
    ]
    assert facts["statement"]["value"] > max(row["epsilon_pld"] for row in facts["partitions"])


def test_show_prints_infinite_epsilon_for_a_raw_release(perdure, tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=KEY)
    ledger.declare("a", 12)
    ledger.charge(
        entry(
            mechanism="none", noise_multiplier=0.0, sampling="none", scope={"a": 1.0}, purpose="raw"
        )
    )
    out = shown(perdure("show", tmp_path))
    assert "10 x raw (none) at sigma 0, C 0.5" in out and "∞" in out and "epsilon infinite (" in out
    facts = as_json(perdure("show", tmp_path, "--json"))
    assert facts["partitions"][0]["epsilon_pld"] is None and facts["statement"]["value"] is None
    assert "infinite" in facts["statement"]["text"]


def test_show_prints_one_line_per_partition_and_escapes_names(perdure, tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=KEY, owner="\x1b[31mred")
    names = [f"client-3/experience-{i}" for i in range(40)]
    for name in names:
        ledger.declare(name, 12_000)
    ledger.charge(entry(scope=dict.fromkeys(names, 256 / 12_000), steps=300))
    ledger.charge(entry(scope=dict.fromkeys(names, 256 / 12_000), steps=200, first_step=300))
    out = shown(perdure("show", tmp_path))
    assert "\x1b" not in out and "\\x1b[31mred" in out
    lines = [line for line in out.splitlines() if line.startswith("  client-3/experience-")]
    assert len(lines) == 40
    for line in lines:
        assert "12000  500 x gradient (gaussian) at q 0.02133, sigma 2, C 0.5" in line


def test_show_adds_up_only_charges_with_equal_settings(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=KEY)
    ledger.declare("a", 12)
    for first, changes in enumerate(
        ({}, {}, {"clip_norm": 1.0}, {"noise_multiplier": 3.0}, {"scope": {"a": 0.5}})
    ):
        ledger.charge(entry(first_step=first, **changes))
    (exposed,) = exposures(read_ledger(tmp_path / "ledger.jsonl"), 1e-5)
    assert [use.steps for use in exposed.uses] == [20, 10, 10, 10]
    assert len({str(asdict(use)) for use in exposed.uses}) == 4


def test_show_counts_only_steps_that_may_use_a_record(perdure, tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=KEY)
    ledger.declare("a", 12)
    for first in (0, 10):
        changes = {
            "mechanism": "banded-gaussian",
            "sampling": "none",
            "scope": {"a": 1.0},
            "participations": 3,
        }
        ledger.charge(entry(first_step=first, **changes))
    (told,) = [
        line for line in shown(perdure("show", tmp_path)).splitlines() if line.startswith("  a ")
    ]
    assert "20 x gradient (banded-gaussian, a record in 6 of them) at sigma 2, C" in told
    (row,) = as_json(perdure("show", tmp_path, "--json"))["partitions"]
    assert row["epsilon_pld"] == accounting.epsilon([Charge(1.0, 2.0, 6)], delta=1e-5)


# --------------------------------------------------------------------------- project

MORE = ("--noise-multiplier", 1.1, "--sampling-rate", 0.1, "--steps", 50)


def test_project_adds_a_planned_charge_to_the_spent_charges(perdure, alone):
    account = read_ledger(alone / "ledger.jsonl")
    charge = Charge(0.1, 1.1, 50, "grid-gaussian")
    out = shown(perdure("project", alone, *MORE))
    rows = [line.split() for line in out.splitlines() if line.startswith("  experience-")]
    assert len(rows) == len(account.partitions) == 4
    for name, (own, before, after) in zip(account.partitions, rows, strict=True):
        assert name.endswith(own)
        assert before == epsilon_number(account.epsilon([name], delta=0.0005))
        assert after == epsilon_number(
            accounting.epsilon([*account.charges(name), charge], delta=0.0005)
        )
        assert float(after) > float(before)
    assert "after 50 more steps at sampling rate 0.1 and noise multiplier 1.1" in out
    assert "record, add-remove, delta 0.0005, PLD; nothing was written" in out


def test_project_accepts_a_full_or_a_shared_partition_name(perdure, alone):
    def count(*names):
        words = [word for name in names for word in ("--partition", name)]
        return shown(perdure("project", alone, *MORE, *words)).count("  experience-")

    assert count("ewc-private/client-0/experience-1") == 1
    assert count("experience-1") == 2
    assert count("experience-1", "ewc-private/client-0/experience-0") == 3
    assert_refused(
        perdure("project", alone, *MORE, "--partition", "nobody"),
        "partition = 'nobody'",
        "ledger show",
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--sampling-rate", 0), ("--steps", -1), ("--noise-multiplier", "inf")]
)
def test_project_refuses_invalid_charges(perdure, alone, option, value):
    words = list(MORE)
    words[words.index(option) + 1] = value
    assert_refused(perdure("project", alone, *words), option.removeprefix("--").replace("-", "_"))


def test_the_help_text_of_ledger_lists_its_commands(perdure):
    out = " ".join(shown(perdure("--help")).replace("│", " ").split())
    for sentence in (
        "show Show the charges of every partition",
        "verify Check every hash chain",
        "Nothing is written.",
    ):
        assert sentence in out
