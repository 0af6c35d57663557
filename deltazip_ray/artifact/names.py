"""Well-formed names. Names from clients are checked here before they become part of a path or a key."""

import re
from typing import NamedTuple

from deltazip_ray.errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION_PREFIX = re.compile(r"[0-9a-f]{12,64}")
LATEST = "latest"


class VariantRef(NamedTuple):
    """What a client asked for: ``name``, ``name@alias`` or ``name@version`` (12 hex digits or more)."""

    name: str
    selector: str


def is_name(name: str) -> bool:
    """Whether ``name`` may name a variant or alias."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str, what: str = "variant") -> str:
    """Return ``name`` when it may name a variant or alias, else raise InvalidName."""
    if not is_name(name):
        raise InvalidName(
            f"{name[:80]!r} cannot name the {what}: use 1 to 64 letters, digits, '.', '_' or '-', "
            "with a letter or digit at both ends and no '..'"
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` when it can be one, else raise InvalidName."""
    if is_version(check_name(alias, "alias")):
        raise InvalidName(f"{alias!r} looks like the first digits of a version: use an alias with other letters")
    return alias


def is_digest(text: str) -> bool:
    """Whether ``text`` is a sha256 as we write it: 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(digest: str) -> str:
    """Return ``digest`` when it is 64 lower-case hex digits, else raise InvalidName."""
    if not is_digest(digest):
        raise InvalidName(f"{digest[:80]!r} is not a sha256 in hex")
    return digest


def is_version(selector: str) -> bool:
    """Whether a selector names a version by its digest's first digits rather than an alias."""
    return _VERSION_PREFIX.fullmatch(selector) is not None


def parse_ref(model: str) -> VariantRef:
    """Split what a client put into ``model``; raises InvalidName."""
    name, at, selector = model.partition("@")
    return VariantRef(check_name(name), check_name(selector, "alias") if at else LATEST)
