"""The tree of errors: every error is drawn at the top of its module, takes one message and survives pickling."""

import inspect
import pickle

import pytest

from deltazip_ray import errors

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.DeltaZipError)]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_error_pickles_with_its_message(cls: type[errors.DeltaZipError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("no room: free some")))
    assert type(copy) is cls
    assert copy.message == str(copy) == "no room: free some"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_error_is_drawn_in_the_tree(cls: type[errors.DeltaZipError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__


def test_error_parents_match_the_drawing() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if hasattr(errors, name) and name:
            drawn.append((line.index(name), name))
    for i, (depth, name) in enumerate(drawn[1:], start=1):
        parent = next(n for d, n in reversed(drawn[:i]) if d < depth)
        assert getattr(errors, name).__base__.__name__ == parent
