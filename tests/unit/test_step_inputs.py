"""What a recorded step reads, in memory that the step before has written to."""

import torch

from deltazip_ray.engine.step_inputs import RecordedInputs
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.paged import PagedBackend
from deltazip_ray.scheduler.batch import DRAWN, Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState

CPU = torch.device("cpu")


def chunk(slot: int, tokens: tuple[int, ...], start: int, blocks: list[int], row: int = -1) -> Chunk:
    sequence = SequenceState(GenerateRequest("r", None, (1,)), slot)
    sequence.table.extend(blocks)
    return Chunk(sequence, tokens, start, sequence.table, samples=True, drawn_row=row)


def test_rows_that_pad_a_step_are_the_bases_and_nothing_is_left_of_the_step_before() -> None:
    attention = PagedBackend(
        CacheShape(layers=1, block_size=4, heads=2, kv_heads=1, head_dim=16), torch.float32, CPU, decodes=4
    )
    attention.allocate(9)
    inputs = RecordedInputs(attention, CPU, 4, 3, 16)
    base, drawn = chunk(-1, (DRAWN,), 5, [0, 1], row=2), chunk(0, (DRAWN,), 3, [2], row=1)
    prompt, last = chunk(2, (7, 8), 4, [3, 4]), chunk(2, (9,), 0, [5])

    assert inputs.fill(Batch((base, drawn, prompt)), 4) == [1, 2]
    assert {
        name: inputs.tensors[name].tolist() for name in ("tokens", "positions", "drawn_rows", "index", "where")
    } == {
        "tokens": [DRAWN, DRAWN, 7, 8],
        "positions": [5, 3, 4, 5],
        "drawn_rows": [2, 1, -1, -1],
        "index": [0, 1, 3, 3],
        "where": [5, 11, 16, 17],
    }
    assert inputs.fill(Batch((last,)), 2) == [1]
    assert {name: inputs.tensors[name][:2].tolist() for name in ("tokens", "positions", "drawn_rows", "index")} == {
        "tokens": [9, 0],
        "positions": [0, 0],
        "drawn_rows": [-1, -1],
        "index": [3, 0],
    }
    assert inputs.tensors["where"][:2].tolist() == [20, attention.padding * 4]
    assert [inputs.tensors[name].tolist() for name in ("starts", "slots")] == [[0, 1, 1, 1], [2, -1, -1]]
    assert inputs.fill(Batch((chunk(0, (9,), 0, [5]),)), 2) == [1], "slot 0 is no base"
    assert [inputs.tensors[name].tolist() for name in ("starts", "slots")] == [[0, 1, 1, 1], [0, -1, -1]]
