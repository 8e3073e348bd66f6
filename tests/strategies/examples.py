"""One example of every strategy, by the name of its file; a new file in strategies/ is tested once it is here."""

from perdure import strategies

EXAMPLES = {
    "ewc": {"strength": 50.0},
    "joint": {},
    "lwf": {"strength": 0.5},
    "naive": {},
    "replay": {"memory_size": 16},
}


def example(name):
    assert name in EXAMPLES, f"strategies/{name}.py has no example; add one to EXAMPLES in {__file__}"
    return strategies.find(name)(**EXAMPLES[name])
