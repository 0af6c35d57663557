"""The trace format: round trips, strictness, line numbers."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltazip_loadgen import TraceFile, TraceHeader, TraceRequest, write_trace
from deltazip_loadgen.errors import TraceInvalid

HEADER = '{"format": "deltazip-trace/1"}'
GOOD: dict[str, Any] = {"at_s": 1, "model": "m", "endpoint": "completion", "prompt": "p", "max_tokens": 4}

requests = st.builds(
    TraceRequest,
    at_s=st.floats(0, 1e6).map(lambda at_s: round(at_s, 6)),
    model=st.text(min_size=1),
    endpoint=st.just("chat"),
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}),
        min_size=1,
        max_size=3,
    ),
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 2),
    seed=st.none() | st.integers(0, 2**31),
    tags=st.dictionaries(st.text(), st.text(), max_size=2),
    expected=st.none() | st.text(),
)


@given(st.lists(requests, max_size=5))
def test_what_is_written_is_read(made: list[TraceRequest]) -> None:
    made.sort(key=lambda request: request.at_s)
    header = TraceHeader(seed=3, generator={"rate": 2.0, "models": ["a"]}, requests=len(made))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        write_trace(path, header, made)
        trace = TraceFile(path)
        assert trace.header == header
        assert list(trace) == made
        assert list(trace) == made, "a second pass reads the same"
        assert len(path.read_bytes().splitlines()) == 1 + len(made), "one line a request, whatever its text holds"


def lines_to(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def changed(**fields: object) -> str:
    return json.dumps({name: value for name, value in (GOOD | fields).items() if value is not ...})


BAD_LINES = [
    ("not json", "Invalid JSON"),
    ("", "Invalid JSON"),
    ("[]", "object"),
    (changed(max_tokens=0), "max_tokens"),
    (changed(max_tokens="4"), "max_tokens: Input should be a valid integer"),
    (changed(max_tokens=...), "max_tokens: Field required"),
    (changed(at_s=-1), "at_s"),
    ('{"at_s": NaN}', "at_s"),
    (changed(at_s=True), "at_s"),
    (changed(model=""), "model"),
    (changed(temperature=-0.1), "temperature"),
    (changed(max_token=5), "max_token: Extra inputs are not permitted"),
    (changed(endpoint="embeddings"), "endpoint"),
    (changed(endpoint="chat"), "a chat request needs `messages`"),
    (changed(prompt=...), "a completion request needs `prompt`"),
    (changed(messages=[{"role": "user", "content": "x"}]), "a completion request needs `prompt` and no `messages`"),
    (changed(endpoint="chat", prompt=..., messages=[]), "messages"),
    (changed(endpoint="chat", prompt=..., messages=[{"role": "root", "content": "x"}]), "messages.0.role"),
    (changed(tags={"a": 1}), "tags.a"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = lines_to(tmp_path / "t.jsonl", HEADER, changed(), line, changed())
    requests = iter(TraceFile(path))
    assert next(requests).model == "m", "lines before the bad one are read, one at a time"
    with pytest.raises(TraceInvalid) as caught:
        next(requests)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)


def test_a_number_may_be_written_as_an_integer(tmp_path: Path) -> None:
    (request,) = TraceFile(lines_to(tmp_path / "t", HEADER, changed(at_s=2)))
    assert request.at_s == 2.0


def test_requests_out_of_order_are_refused(tmp_path: Path) -> None:
    path = lines_to(tmp_path / "t", HEADER, changed(at_s=2), changed(at_s=2), changed(at_s=1.5))
    with pytest.raises(TraceInvalid, match=r":4: at_s 1\.5 is earlier than the line before it \(2\.0\); sort"):
        list(TraceFile(path))


def test_a_cut_off_trace_is_noticed(tmp_path: Path) -> None:
    header = '{"format": "deltazip-trace/1", "requests": 3}'
    path = lines_to(tmp_path / "t", header, changed(), changed())
    with pytest.raises(TraceInvalid, match="holds 2 requests where its header says 3"):
        list(TraceFile(path))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (changed(), "format|Extra"),
        ('{"format": "deltazip-trace/2"}', "deltazip-trace/1"),
        ('{"format": "deltazip-trace/1", "sede": 1}', "sede"),
        ('{"format": "deltazip-trace/1", "seed": "1"}', "seed"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: str, reason: str) -> None:
    with pytest.raises(TraceInvalid, match=rf":1 \(header\): .*({reason})"):
        TraceFile(lines_to(tmp_path / "t", header, changed()))


def test_an_empty_or_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="is empty; the first line must be a header"):
        TraceFile(lines_to(tmp_path / "t"))
    with pytest.raises(TraceInvalid, match="No such file"):
        TraceFile(tmp_path / "absent")


def test_a_failed_write_leaves_no_trace(tmp_path: Path) -> None:
    def broken() -> Iterator[TraceRequest]:
        yield TraceRequest.model_validate(GOOD)
        raise KeyError("generator")

    path = tmp_path / "t"
    with pytest.raises(KeyError):
        write_trace(path, TraceHeader(), broken())
    assert not path.exists()
