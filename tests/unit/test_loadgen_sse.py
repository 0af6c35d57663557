"""Server-sent events survive any way of cutting the bytes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deltazip_loadgen.sse import EventDecoder

STREAM = (
    ": hello\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata:  zwei\n\n\n\nid: 7\rdata: é€😀\r\rdata\n\n"
    "data: a\r\ndata: b\r\n\r\ndata: cut"
).encode()
EVENTS = ["one", "two\n zwei", "é€😀", "", "a\nb"]


def decode(chunks: list[bytes]) -> list[str]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def test_events_of_a_whole_stream() -> None:
    assert decode([STREAM]) == EVENTS


def test_byte_by_byte() -> None:
    assert decode([bytes([byte]) for byte in STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_cut_anywhere(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert decode([STREAM[start:end] for start, end in pairwise(edges)]) == EVENTS


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_comes_back(texts: list[str], line_end: str) -> None:
    stream = "".join(f"data: {text}{line_end}{line_end}" for text in texts)
    assert decode([stream.encode()]) == texts


def test_an_event_comes_with_the_chunk_that_completes_it() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\ndata: b\n\nda") == ["a", "b"]
    assert decoder.feed(b"ta: c\n\n") == ["c"]
