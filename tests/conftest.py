"""Fixtures for all tests."""

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, triton's own among them: so before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ("tests.support.s3",)
