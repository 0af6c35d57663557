"""The one place that expects anything of code that runs on files somebody published."""

from collections.abc import Iterator
from contextlib import contextmanager

from deltazip_ray.errors import DeltaZipError


@contextmanager
def blamed_on_files(kind: type[DeltaZipError], message: str) -> Iterator[None]:
    """Whatever the block raises becomes ``kind``, told as ``message`` and the reason; our own errors stay as they are.

    ``tokenizers`` raises bare ``Exception``, and panics of its Rust code are not even that; a chat template is a
    program, which fails as it likes.
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
    """Text that fits into any answer, without what UTF-8 cannot write."""
    return str(error)[:500].encode(errors="backslashreplace").decode()
