"""Code that Triton compiles for the GPU, and nothing else: it follows Triton's types, not Python's."""
