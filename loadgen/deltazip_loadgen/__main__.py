"""``python -m deltazip_loadgen``."""

from deltazip_loadgen.cli import app

if __name__ == "__main__":
    app(prog_name="deltazip-loadgen")
