"""Calibration data from a Hugging Face dataset. Needs the optional package ``datasets``."""

import importlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from deltazip_ray.errors import CompressionError

SHUFFLED = 4096
"""Size of the buffer that shuffles the stream, in rows."""
READ = 16384
"""Limit of rows read."""


def dataset_rows(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the training split of ``NAME`` or ``NAME:CONFIG``, in an order that depends on the seed.

    ``NAME`` may be a folder of data files. Streams, so only the rows that are read are downloaded. Raises
    CompressionError.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise CompressionError(
            f"the dataset {name} needs the package datasets: pip install 'deltazip-ray[data]', or give a file"
        ) from error
    path, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(path, config or None, split="train", streaming=True)
        yield from islice(found.shuffle(seed=seed, buffer_size=SHUFFLED), READ)
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"cannot read the dataset {name}: {error}. Without a network give a text file or chats as .jsonl, or "
            "leave --calibration out to sample from the fine-tune"
        ) from error
