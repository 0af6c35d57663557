"""The grouped delta product: packed layouts, torch references, kernels."""
