"""A tiny base with fine-tunes in every codec, and what transformers makes of each."""

from dataclasses import dataclass
from pathlib import Path

from deltazip_ray.artifact.file_store import FileStore
from tests.support.oracle import Oracle
from tests.support.tiny import make_base, make_finetune
from tests.support.versions import BuiltVersion, build_version


@dataclass(frozen=True)
class Zoo:
    """A base, its versions, and an oracle for each."""

    base: Path
    store: FileStore
    """A catalog's store; the versions are published as ``variant-0``, ``variant-1`` …"""
    versions: tuple[BuiltVersion, ...]
    oracles: dict[str | None, Oracle]
    """By version; None is the base."""

    @property
    def names(self) -> tuple[str | None, ...]:
        """The base, then all versions."""
        return tuple(self.oracles)


def make_zoo(path: Path, *, tied: bool) -> Zoo:
    """Grouped queries; versions in int4, int2, 2:4, and one of mixed codecs with raw matrices and two added tokens."""
    base = make_base(path / "base", tied=tied)
    tunes = [make_finetune(base, path / f"tune{i}", seed=i, scale=0.05) for i in range(3)]
    odd = make_finetune(base, path / "odd", seed=3, scale=0.05, added=("<one>", "<two>"))
    versions = (
        build_version(base, tunes[0], "int4"),
        build_version(base, tunes[1], "int2"),
        build_version(base, tunes[2], "sparse24_int4"),
        build_version(base, odd, "int4", raw=r"1\.self_attn\.o_proj|embed_tokens", codecs={"mlp": "int2"}),
    )
    store = FileStore(path / "store")
    oracles: dict[str | None, Oracle] = {None: Oracle(base)}
    for i, version in enumerate(versions):
        oracles[version.version] = Oracle(version.write_merged(path / f"merged{i}"))
        version.publish(store, f"variant-{i}", path / f"artifact{i}")
    return Zoo(base, store, versions, oracles)
