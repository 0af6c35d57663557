"""What it costs that the fine-tune writes its own calibration data, where chats of its training could be had.

    python -m benchmarks.quality.calibration --cache ~/.cache/deltazip/demo --out quality_calibration.jsonl

Compresses the demo's five fine-tunes with both. Each line of the result is one artifact, as ``allocation`` has them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.quality.allocation import benches, machine
from deltazip_deployments.demo.recipe import Recipe
from deltazip_deployments.demo.tasks import TASKS

FORMS: dict[str, dict[str, Any]] = {
    "int4 for all": {"codec": "int4"},
    "int2 for all": {"codec": "int2"},
    "--target-bits 2": {"target_bits": 2},
    "--target-ratio 12": {"target_ratio": 12},
}
SOURCES: dict[str, dict[str, Any]] = {"chats": {}, "sampled": {"calibration": None}}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cache", type=Path, required=True, help="folder for the trained models")
    arguments.add_argument("--out", type=Path, required=True, help="JSON lines")
    given = arguments.parse_args()
    with given.out.open("w") as out:
        for bench in benches(Recipe(), given.cache, [task.name for task in TASKS]):
            for source, calibration in SOURCES.items():
                for form, options in FORMS.items():
                    row, _ = bench.measure(source, form, options | calibration)
                    out.write(json.dumps(row | machine()) + "\n")
                    out.flush()


if __name__ == "__main__":
    main()
