"""Opens the store that a configuration names."""

from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.artifact.s3_store import S3Store
from deltazip_ray.config import StoreConfig

__all__ = ["ObjectStore", "open_store"]


def open_store(config: StoreConfig) -> ObjectStore:
    """The store of ``config.url``. Does not contact it; raises ConfigError for settings that cannot be right."""
    return FileStore.from_url(config.url) if config.url.startswith("file://") else S3Store(config)
