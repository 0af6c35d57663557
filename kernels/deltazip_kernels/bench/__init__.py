"""Speed of the kernels against the memory of the machine: ``python -m deltazip_kernels.bench --json FILE``."""
