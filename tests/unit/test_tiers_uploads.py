"""How a blob's bytes get into a slot: what lies together is copied together, in chunks, within the bound."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deltazip_kernels import pack, packed_layout
from deltazip_ray.artifact.blob import read_blob, write_blob
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import BlobEntry, TensorEntry
from deltazip_ray.engine.slot_layout import aligned, fill, room
from deltazip_ray.engine.uploads import AHEAD, Copier, Upload, Uploads
from deltazip_ray.layers.writes import Writes
from deltazip_ray.residency.pace import Pace

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Recorder(Upload):
    """Remembers the sizes of what was copied in one piece."""

    def __init__(self) -> None:
        super().__init__(Copier(CPU, Pace(None)))
        self.sizes: list[int] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.sizes.append(len(source))
        super().copy(target, source)
        self.join()


def blob_tensors(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The tensors of a blob with three int2 matrices and a norm, as views of the blob's bytes."""
    names = [f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"]
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, TensorEntry] = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 4, (rows, columns), generator=generator, dtype=torch.uint8)
        scales = torch.rand(rows, -(-columns // 128), generator=generator)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack("int2", codes, scales).items()}
        entries[name] = TensorEntry(codec="int2", shape=(rows, columns), bytes_finetuned=2 * rows * columns)
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = torch.rand(columns).bfloat16()
    entries[norm] = TensorEntry(codec="raw", shape=(columns,), bytes_finetuned=2 * columns)
    data = write_blob(tensors)
    return read_blob(data, BlobEntry(block="layers.0", digest=sha256_hex(data), size=len(data), tensors=entries))


def test_a_blobs_tensors_are_copied_in_few_pieces() -> None:
    tensors = blob_tensors(512, 1024)
    norm = tensors.pop("model.layers.0.input_layernorm.weight")
    other = tensors.pop("model.layers.0.self_attn.q_proj.weight.scales")
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    upload = Recorder()
    copies, end = fill(memory, 256, tensors, upload)
    assert len(tensors) == 5
    assert len(upload.sizes) == 2, "what is left out lies before and between them"
    assert norm.data_ptr() < min(t.data_ptr() for t in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].dtype == tensor.dtype
    assert end == 256 + 3 * room("int2", (512, 1024), torch.bfloat16) - other.nbytes
    assert not memory[:256].any()
    assert not memory[end:].any()


def test_odd_sizes_are_aligned_each_for_itself() -> None:
    whole = torch.arange(1, 121, dtype=torch.uint8)
    tensors = {"a": whole[:5], "b": whole[5:20].view(3, 5), "c": whole[20:]}
    memory = torch.zeros(1024, dtype=torch.uint8)
    copies, end = fill(memory, 0, tensors, Recorder())
    assert end == 3 * 256
    for key, tensor in tensors.items():
        assert torch.equal(copies[key], tensor)
        assert (copies[key].data_ptr() - memory.data_ptr()) % 256 == 0
    assert int(memory.count_nonzero()) == 120


def test_neighbours_of_different_memories_are_not_joined() -> None:
    a, b = torch.full((256,), 1, dtype=torch.uint8), torch.full((256,), 2, dtype=torch.uint8)
    upload = Recorder()
    copies, _ = fill(torch.zeros(512, dtype=torch.uint8), 0, {"a": a, "b": b}, upload)
    assert upload.sizes == [256, 256]
    assert torch.equal(copies["a"], a)
    assert torch.equal(copies["b"], b)


@pytest.mark.parametrize("size", [1, 7, 64, 65])
def test_chunks_make_the_whole(size: int) -> None:
    source = torch.randint(0, 256, (65,), dtype=torch.uint8)[:size]
    target = torch.zeros_like(source)
    with Uploads(CPU, chunk=8).beside_steps() as upload:
        upload.copy(target, source)
    assert torch.equal(target, source)


def test_a_load_that_fails_leaves_copies_out_and_waits_for_the_one_that_runs() -> None:
    began, go_on = threading.Event(), threading.Event()

    class Gate(Pace):
        def take(self, size: int) -> None:
            began.set()
            go_on.wait(10)

    uploads = Uploads(CPU)
    uploads.copier = Copier(CPU, Gate(None))
    targets = [torch.zeros(8, dtype=torch.uint8) for _ in range(3)]
    ones = torch.ones(8, dtype=torch.uint8)

    def load() -> None:
        with uploads.beside_steps() as upload:
            for target in targets:
                upload.copy(target, ones)
            began.wait(10)
            raise ValueError("a later blob has no header")

    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        began.wait(10)
        with pytest.raises(TimeoutError):
            loading.result(0.05)  # the first copy still writes to the slot
        go_on.set()
        with pytest.raises(ValueError, match="no header"):
            loading.result(10)
    assert [int(target.sum()) for target in targets] == [8, 0, 0]


def test_a_load_whose_copy_fails_waits_for_those_behind_it() -> None:
    """Until then they write to its slot."""
    uploads = Uploads(CPU)
    target, ones = torch.zeros(1 << 20, dtype=torch.uint8), torch.ones(1 << 20, dtype=torch.uint8)
    uploads.copier = Copier(CPU, Pace(20.0 * (1 << 20)), chunk=1 << 18)
    with pytest.raises(RuntimeError), uploads.beside_steps() as upload:  # noqa: PT012 - the copies fail at the end
        upload.copy(torch.zeros(7, dtype=torch.uint8), ones)
        upload.copy(target, ones)
        upload.copy(target, 2 * ones)
    assert bool((target == 2).all())


def test_beside_steps_a_load_is_few_copies_ahead_of_the_wire() -> None:
    """Else its work on later blobs would keep the interpreter from copier and steps."""
    go_on, asked = threading.Event(), []

    class Gate(Pace):
        def take(self, size: int) -> None:
            go_on.wait(10)

    uploads = Uploads(CPU)
    uploads.copier = Copier(CPU, Gate(None))
    source = torch.ones(8, dtype=torch.uint8)

    def load() -> None:
        with uploads.beside_steps(gently=True) as upload:
            for _ in range(9):
                upload.copy(torch.zeros_like(source), source)
                asked.append(1)

    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        with pytest.raises(TimeoutError):
            loading.result(0.05)
        assert len(asked) == AHEAD
        go_on.set()
        loading.result(10)
    assert len(asked) == 9


def test_writes_are_sent_together_and_the_last_one_to_a_place_stays() -> None:
    wide = torch.zeros(3, 10, dtype=torch.bfloat16)
    counts, base = torch.zeros(4, dtype=torch.int32), torch.full((4,), 7.0, dtype=torch.bfloat16)
    writes = Writes()
    writes.put(wide[1, 2:6], torch.arange(4, dtype=torch.float32))
    writes.put(wide[2, 6:], base)
    writes.put(counts[3], [5])
    writes.put(counts[1:3], [1, 2])
    writes.put(counts[3], [0])
    assert not wide.any()
    assert not counts.any()
    writes.send()
    assert wide.tolist() == [[0] * 10, [0, 0, 0, 1, 2, 3, 0, 0, 0, 0], [0] * 6 + [7] * 4]
    assert counts.tolist() == [0, 1, 2, 0]


def test_room_is_that_of_the_layout() -> None:
    layout = packed_layout("int3", (48, 300))
    sizes = [torch.empty(shape, dtype=dtype).nbytes for shape, dtype in layout.values()]
    assert room("int3", (48, 300), torch.bfloat16) == sum(map(aligned, sizes)), json.dumps(sizes)


def test_a_pace_is_kept_over_many_takers() -> None:
    clock = Clock()
    pace = Pace(1000.0, clock, clock.sleep)
    for _ in range(50):
        pace.take(100)
    assert clock.now - 100 == pytest.approx(4.9), "the first one did not wait"
    clock.now += 60
    began = clock.now
    for _ in range(4):
        pace.take(100)
    assert clock.now - began == pytest.approx(0.2), "a pause is worth no more than a short burst"


def test_without_a_bound_nobody_waits() -> None:
    clock = Clock()
    Pace(None, clock, clock.sleep).take(1 << 40)
    assert clock.slept == []
