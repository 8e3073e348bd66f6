"""Names that the packages promise: sorted, there, and documented."""

import inspect

import pytest

import perdure


def test_public_names_are_sorted_there_and_documented():
    assert list(perdure.__all__) == sorted(perdure.__all__)
    for name in perdure.__all__:
        value = getattr(perdure, name)
        assert inspect.isclass(value), name
        assert vars(value).get("__doc__"), f"{name} has no docstring of its own"
        assert not value.__doc__.startswith(f"{name}("), (
            f"the docstring of {name} is the one dataclass makes up"
        )
        assert value.__module__.startswith("perdure."), f"{name} belongs to another library"


@pytest.mark.parametrize(
    "package", ["adversarial", "explain", "federated", "report", "strategies", "testing"]
)
def test_what_a_package_offers_is_there_and_documented(package):
    module = __import__(f"perdure.{package}", fromlist=["__all__"])
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"perdure.{package}.{name} has no docstring"
            assert value.__module__.startswith("perdure."), f"{name} belongs to another library"
