"""Checkpoints that are made once for all tests of this folder."""

import pytest

from tests.support.zoo import Zoo, make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """An untied head."""
    return make_zoo(tmp_path_factory.mktemp("zoo"), tied=False)


@pytest.fixture(scope="session")
def tied_zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The head tied to the embedding."""
    return make_zoo(tmp_path_factory.mktemp("tied"), tied=True)
