"""Hooks on the layers of a model; torch has no public list of them."""


def hooks_on(module):
    """Return the number of forward and backward hooks on the module itself."""
    return {
        kind: len(hooks)
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and ("forward" in kind or "backward" in kind) and hooks
    }


def any_hooks(model):
    """True if a layer of the model has a hook."""
    return any(hooks_on(module) for module in model.modules())
