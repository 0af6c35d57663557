"""The demo as a small, quick run."""

QUICK = {
    "recipe": {
        "layers": 2,
        "intermediate": 256,
        "threads": 1,
        "pretrain": {"steps": 60, "batch": 16, "peak_lr": 3e-3},
        "finetune": {"steps": 20, "batch": 16, "peak_lr": 1e-3},
    },
    "calibration_samples": 16,
    "questions": 16,
    "requests": 60,
    "rate": 20.0,
    "replicas": 1,
}
"""Fields of DemoConfig: models that learn next to nothing, but answer something."""
