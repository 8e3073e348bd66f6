"""Hooks that stand on the layers of a model; torch lists them in no public place."""


def hooks_on(module):
    """Number of hooks of every kind on the module itself."""
    return {
        kind: len(hooks)
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and hooks
    }


def any_hooks(model):
    """Whether a hook of any kind stands on a layer of the model."""
    return any(hooks_on(module) for module in model.modules())
