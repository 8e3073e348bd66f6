"""Which extensions a type checker does not know.

    python tests/helpers/typed_list.py    one line for each package that lacks some (make lint)

An extension works as soon as its file is there. It is known to type checkers and editors once its
class is imported in the package's `__init__` and listed in `__all__`; that it is not is reported
and is no error.
"""

import importlib

PACKAGES = (
    "perdure.strategies",
    "perdure.adversarial",
    "perdure.explain",
    "perdure.tasks",
    "perdure.tasks.losses",
)


def missing_from_typed_list() -> dict[str, list[str]]:
    """Return for each package the classes in its own files that `__all__` does not list."""
    missing = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        classes = [module.find(name) for name in module.names()]
        missing[package] = [
            found.__name__
            for found in classes
            if found.__module__.startswith(f"{package}.") and found.__name__ not in module.__all__
        ]
    return missing


def main() -> None:
    """Print what is missing."""
    for package, names in missing_from_typed_list().items():
        if names:
            listed = ", ".join(names)
            print(f"{package}: type checkers do not know {listed}; add to its __init__.py")


if __name__ == "__main__":
    main()
