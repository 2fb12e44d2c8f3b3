"""What the tests of the fast computations share."""

import pytest


@pytest.fixture
def spy(monkeypatch):
    """Record the arguments of a function each time it is called: spy(module, name) -> list."""

    def watch(module, name):
        calls, function = [], getattr(module, name)

        def watched(*args, **kwargs):
            calls.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def distance(mine, expected):
    """Compute the norm of the error beside that of the expected result."""
    return ((mine.double() - expected.double()).norm() / expected.double().norm()).item()
