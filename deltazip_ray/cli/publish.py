"""``deltazip publish``: let a store offer an artifact under a name."""

from typing import Annotated

import typer

from deltazip_ray.artifact.names import LATEST
from deltazip_ray.cli.console import EndpointUrl, Json, PathStyle, byte_progress, out, print_json, size
from deltazip_ray.config import StoreConfig


def publish(
    artifact: Annotated[str, typer.Argument(help="Folder or s3:// prefix that `deltazip compress` wrote.")],
    store: Annotated[str, typer.Argument(help="Folder or s3:// prefix that the servers read.")],
    name: Annotated[str, typer.Option(help="What clients will put in `model`.")],
    alias: Annotated[
        list[str] | None, typer.Option(help=f"Alias to move to this version; repeat for several. Default: {LATEST}.")
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(metavar="BOUNDS", help="Publish only if its record says, say, kl<0.05,sort:exact_match>0.9."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Copy blobs that the store has already, too: it may hold damaged ones.")
    ] = False,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Copy an artifact to a store and name it; running servers offer it within seconds.

    Without --alias the version becomes the variant's `latest`. With --alias canary alone, only clients that ask for
    NAME@canary get it.

    Example: deltazip publish ./sorter-delta s3://models/deltas --name sorter
    """
    from deltazip_ray.artifact.artifact import open_artifact
    from deltazip_ray.artifact.catalog import Catalog
    from deltazip_ray.artifact.requirements import check_quality
    from deltazip_ray.artifact.store import open_store

    manifest, source = open_artifact(StoreConfig.at(artifact, endpoint_url, path_style))
    check_quality(manifest.quality, require)
    target = StoreConfig.at(store, endpoint_url, path_style)
    catalog = Catalog(open_store(target), manifest.base.digest)
    aliases = alias or [LATEST]
    with byte_progress(f"Publishing {name}", manifest.bytes_stored) as advance:
        catalog.publish(source, manifest, name, aliases, progress=advance, repair=repair)
    if as_json:
        print_json({"name": name, "aliases": aliases, "version": manifest.version(), "store": target.url})
        return
    named = ", ".join(f"{name}@{each}" for each in aliases)
    out.print(f"Published {named}: version {manifest.version()[:12]}, {size(manifest.bytes_stored)} stored.")
    out.print(f"Servers find it with store.url: {target.url}", soft_wrap=True)
