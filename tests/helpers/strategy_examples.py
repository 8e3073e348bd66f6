"""One example of every strategy, by the name of its file; a new file in strategies/ is tested once
it is here.
"""

import torch

from perdure import strategies

EXAMPLES = {
    "agem": {"memory_size": 16},
    "bic": {"memory_size": 16},
    "coda_prompt": {"strength": 0.1},
    "cwr_star": {},
    "der": {"memory_size": 16, "beta": 0.5},
    "er_ace": {"memory_size": 16},
    "gdumb": {"memory_size": 16},
    "gem": {"memory_size": 16},
    "generative_replay": {"temperature": 2.0},
    "icarl": {"memory_size": 16},
    "ewc": {"strength": 50.0},
    "feature_distillation": {"strength": 0.5},
    "joint": {},
    "l2": {"strength": 0.05},
    "l2p": {"strength": 0.5},
    "lora": {"strength": 0.5},
    "lucir": {"memory_size": 16},
    "lwf": {"strength": 0.5},
    "mas": {"strength": 0.1},
    "mir": {"memory_size": 16, "candidates": 12},
    "naive": {},
    "ncm": {},
    "ogd": {"directions": 4},
    "packnet": {"pruned_share": 0.5, "dense_steps": 4},
    "ranpac": {"ridge": 0.01, "bias": 0.5, "projection": 12},
    "replay": {"memory_size": 16},
    "rwalk": {"strength": 0.5, "window": 2},
    "si": {"strength": 0.5},
    "slda": {"shrinkage": 0.01},
}


def example(name):
    assert name in EXAMPLES, (
        f"strategies/{name}.py has no example; add one to EXAMPLES in {__file__}"
    )
    return strategies.find(name)(**EXAMPLES[name])


def model_of(name, stream, otherwise):
    """The small model that the strategy needs, else what `otherwise` makes of the stream."""
    own = example(name).small_model(input_shape=stream.input_shape, num_classes=stream.num_classes)
    return otherwise(stream) if own is None else own


def private():
    """Names of those that may run under privacy: no loss of theirs couples records."""
    return [name for name in EXAMPLES if not example(name).couples_records]


def moved(model):
    """The model with every parameter off its start, so that what begins at 0 counts."""
    place = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=place))
    return model
