"""``deltazip variants``: names and aliases in a store."""

from typing import Annotated

import typer

from deltazip_ray.artifact.catalog import Catalog, bases
from deltazip_ray.artifact.names import parse_ref
from deltazip_ray.artifact.store import open_store
from deltazip_ray.cli.console import EndpointUrl, Json, PathStyle, out, print_json, size, table
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ConfigError

Store = Annotated[str, typer.Argument(help="Folder or s3:// prefix of the store.")]
Name = Annotated[str, typer.Argument(help="The variant's name.")]
Base = Annotated[
    str, typer.Option("--base", help="First digits of the base's digest, where the store serves several bases.")
]

variants = typer.Typer(help="See and change what a store offers: names, versions, aliases.", no_args_is_help=True)


@variants.command("ls")
def list_variants(
    store: Store,
    base: Base = "",
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """List the variants of a store with their aliases and sizes.

    Example: deltazip variants ls s3://models/deltas
    """
    catalog = _catalog(StoreConfig.at(store, endpoint_url, path_style), base)
    found = catalog.variants()
    if as_json:
        print_json({"base": catalog.base_digest, "variants": [variant.model_dump() for variant in found]})
        return
    rows = []
    for variant in found:
        newest = catalog.manifest(variant.versions[-1])
        aliases = ", ".join(f"{alias} → {version[:12]}" for alias, version in sorted(variant.aliases.items()))
        rows.append((variant.name, aliases, str(len(variant.versions)), size(newest.bytes_artifact)))
    table(f"base {catalog.base_digest[:12]}", ("variant", "aliases", "versions", "newest in memory"), rows)


@variants.command("rm")
def remove(
    store: Store,
    name: Name,
    base: Base = "",
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Take a variant's name and aliases away; blobs, which others may share, stay in the store.

    Example: deltazip variants rm s3://models/deltas sorter
    """
    _catalog(StoreConfig.at(store, endpoint_url, path_style), base).remove(name)
    out.print(f"Removed {name}. Servers stop offering it within their catalog_refresh_s.")


@variants.command("alias")
def set_alias(
    store: Store,
    ref: Annotated[
        str, typer.Argument(metavar="NAME@VERSION", help="What the alias shall mean; NAME@ALIAS works too.")
    ],
    alias: Annotated[str, typer.Argument(help="The alias to make or move, such as prod or canary.")],
    base: Base = "",
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Make an alias, or move it to another version, in one atomic step.

    Example: deltazip variants alias ./store sorter@4f2a90c1d3e5 prod
    """
    name, selector = parse_ref(ref)
    moved = _catalog(StoreConfig.at(store, endpoint_url, path_style), base).set_alias(name, alias, selector)
    out.print(f"{name}@{alias} → {moved.aliases[alias][:12]}")


def _catalog(config: StoreConfig, base: str) -> Catalog:
    """The catalog of the one base whose digest begins with ``base``; raises ConfigError when it is not just one."""
    store = open_store(config)
    found = bases(store)
    matching = [digest for digest in found if digest.startswith(base)]
    if len(matching) == 1:
        return Catalog(store, matching[0])
    if not found:
        raise ConfigError(f"{config.url} holds no variants: publish one with `deltazip publish`")
    listed = ", ".join(digest[:12] for digest in found)
    raise ConfigError(f"choose one base with --base; {config.url} holds: {listed}")
