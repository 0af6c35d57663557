"""API keys: who may use which variants."""

import hashlib
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError

from deltazip_ray.errors import ConfigError, InvalidKey, NotAllowed

logger = logging.getLogger(__name__)

_ALL = "*"
_Keys = Mapping[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], list[str]]
_KEYS: TypeAdapter[_Keys] = TypeAdapter(_Keys)


@dataclass(frozen=True)
class Grant:
    """The names of variants (with any alias) and of the base that a key may use; ``*`` means all."""

    names: frozenset[str]

    def allows(self, model: str) -> bool:
        """Whether a request may have ``model``."""
        return _ALL in self.names or model.partition("@")[0] in self.names

    def check(self, model: str) -> None:
        """Raise NotAllowed unless a request may have ``model``."""
        if not self.allows(model):
            raise NotAllowed(f"this API key does not cover {model[:80]!r}: GET /v1/models lists what it covers")


_EVERYTHING = Grant(frozenset({_ALL}))


class ApiKeys:
    """The keys in a file ``{"<sha256 of a key>": ["<name>", …]}``; without a file no key is needed."""

    def __init__(self, file: Path | None) -> None:
        """Raises ConfigError when the file cannot be read."""
        self._file = file
        self._read_at: tuple[int, int] | None = None
        self._grants: dict[str, Grant] = {}
        if file is not None:
            self._read(file)

    def grant(self, authorization: str | None) -> Grant:
        """The grant of the header ``Authorization: Bearer <key>``; raises InvalidKey."""
        if self._file is None:
            return _EVERYTHING
        self._refresh(self._file)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidKey("no API key: send 'Authorization: Bearer <key>'")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        # Compare with all keys in constant time, so that the duration reveals nothing.
        found = [grant for known, grant in self._grants.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise InvalidKey("unknown API key: check it, or ask for a new one")
        return found[0]

    def _refresh(self, file: Path) -> None:
        """Read the file if it has changed; keep the known keys if that fails, as during its replacement."""
        try:
            if _stamp(file) != self._read_at:
                self._read(file)
        except (ConfigError, OSError) as error:
            logger.warning("the API keys stay as they were: %s", error)

    def _read(self, file: Path) -> None:
        try:
            stamp, keys = _stamp(file), _KEYS.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"router.api_keys_file {file} is not a readable JSON object of SHA-256 digests (64 lower-case "
                f"hexadecimal digits) with lists of names: {_first_line(error)}"
            ) from error
        self._grants = {digest: Grant(frozenset(names)) for digest, names in keys.items()}
        self._read_at = stamp


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_ino


def _first_line(error: Exception) -> str:
    """The reason, without values, which may be keys that somebody forgot to hash."""
    if isinstance(error, ValidationError):
        return str(error.errors(include_input=False, include_url=False, include_context=False)[0]["msg"])
    return str(error)
