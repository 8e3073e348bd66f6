"""Hooks that stand on the layers of a model; torch lists them in no public place."""


def hooks_on(module):
    """Number of hooks on the module itself of every kind that a forward or backward pass calls."""
    return {
        kind: len(hooks)
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and ("forward" in kind or "backward" in kind) and hooks
    }


def any_hooks(model):
    """Whether such a hook stands on a layer of the model."""
    return any(hooks_on(module) for module in model.modules())
