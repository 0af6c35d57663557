"""Tasks of lm-eval in files, over data of our own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATED = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  max_gen_toks: 4
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the task ``name`` of output type ``kind``, one of the texts above, and its data to ``folder``."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data, cache=folder / "cache") + kind)
