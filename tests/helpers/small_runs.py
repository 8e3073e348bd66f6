"""A small config with private arms, attack and explanations, and its run."""

from perdure.experiment.config import parse
from perdure.experiment.run import run

SMALL = """
name = "small"
[data]
experiences = 2
[model]
hidden = [6]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
[privacy]
noise_multiplier = 1.0
delta = 0.0005
sampling_rate = 0.25
[explain]
method = "kernel_shap"
records = 1
[attack]
name = "pgd"
epsilon = 0.1
steps = 1
[[arms]]
strategy = "replay"
memory_size = 20
[[arms]]
strategy = "ewc"
strength = 1.0
private = true
[[arms]]
strategy = "replay"
memory_size = 20
private = true
"""
ATTACK = '[attack]\nname = "pgd"\nepsilon = 0.1\nsteps = 1\n'
EXPLAIN = '[explain]\nmethod = "kernel_shap"\nrecords = 1\n'


def ran(folder, text, **options):
    """Return the result of a config and the reported progress."""
    told = []
    result = run(
        parse(text), text, folder, lambda arm, share, _: told.append((arm, share)), **options
    )
    return result, told
