"""Where the log lines of this project go in Ray's processes, which otherwise drop all below a warning."""

import logging

_OURS = ("deltazip_deployments", "deltazip_ray", "deltazip_kernels")


def log_with_serve() -> None:
    """In a process of Serve: to the file and in the format of Serve's own lines, from its level at this time."""
    serves = logging.getLogger("ray.serve")
    for name in _OURS:
        ours = logging.getLogger(name)
        ours.handlers = serves.handlers  # the list itself, which Serve fills again when its `logging_config` changes
        ours.setLevel(serves.level)


def log_to_stderr() -> None:
    """In an actor of our own: to stderr, which Ray keeps in a file for each process."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
