"""Handles errors of libraries that process published files, which may raise anything."""

from collections.abc import Iterator
from contextlib import contextmanager

from deltazip_ray.errors import DeltaZipError


@contextmanager
def blamed_on_files(kind: type[DeltaZipError], message: str) -> Iterator[None]:
    """Turn whatever the block raises into a ``kind`` with ``message`` and the reason, except our own errors.

    ``tokenizers`` raises plain ``Exception``, and panics of its Rust code do not even inherit from that. A chat
    template is a program and can raise anything.
    """
    try:
        yield
    except DeltaZipError:
        raise
    except Exception as error:
        raise kind(f"{message}: {type(error).__name__}: {_printable(error)}") from error
    except BaseException as error:
        # PanicException of pyo3, which cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: {_printable(error)}") from error


def _printable(error: BaseException) -> str:
    """The message, shortened, and without characters that UTF-8 cannot encode."""
    return str(error)[:500].encode(errors="backslashreplace").decode()
