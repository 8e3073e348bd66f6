"""The order of findings, and those that another finding explains."""

from dataclasses import replace

from perdure.doctor import Finding, Remedy, in_order


def finding(rule, cause, experience=None, explained_by=()):
    return Finding(
        rule=rule,
        cause=cause,
        evidence="",
        measured=1.0,
        threshold=0.0,
        source="",
        remedy=Remedy(advice=""),
        experience=experience,
        explained_by=explained_by,
    )


def test_findings_are_in_the_order_of_repair():
    late = finding("a", "fit", 0)
    early = finding("b", "data", 0)
    assert in_order([late, early]) == [early, late]


def test_a_finding_that_another_explains_is_left_out():
    cause = finding("b", "activation", 1)
    explained = finding("a", "fit", 1, ("b",))
    assert in_order([explained, cause]) == [cause]
    elsewhere = finding("a", "fit", 2, ("b",))
    assert in_order([elsewhere, cause]) == [cause, elsewhere]
    before = finding("a", "wiring", None, ("b",))
    assert in_order([before, cause]) == [cause]


def test_a_finding_names_its_origin_and_counts_from_one():
    before, ended = finding("a", "fit"), finding("a", "fit", 1)
    assert (before.found, ended.found) == ("before training", "experience 2")
    assert str(replace(ended, step=40)).startswith("a (experience 2, step 40): ")


def test_of_findings_in_a_circle_the_first_is_kept():
    a = finding("a", "initialisation", 0, ("b",))
    b = finding("b", "initialisation", 0, ("c",))
    c = finding("c", "learning rate", 0, ("a",))
    assert in_order([b, c, a]) == [c]
    assert in_order([a, c]) == [a]
    pair = finding("e", "initialisation", 0, ("f",)), finding("f", "activation", 0, ("e",))
    assert in_order(pair[::-1]) == [pair[0]]
