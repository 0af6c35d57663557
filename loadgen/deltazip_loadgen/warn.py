"""What makes a replay's numbers mean something else than they seem to."""

from collections.abc import Iterator, Sequence

from deltazip_loadgen.record import Record

LATE_S = 0.05


def warnings(records: Sequence[Record], max_concurrency: int | None) -> Iterator[str]:
    """Sentences for the reader of the report, each with what to do."""
    late = [record.lag_s for record in records if record.lag_s > LATE_S]
    if max_concurrency is not None:
        yield (
            f"at most {max_concurrency} requests were under way at once, so this was not an open-loop replay: "
            f"{len(late)} requests waited more than {LATE_S * 1000:.0f} ms in the client "
            "(times from the intended start include that wait)"
        )
    elif late:
        yield (
            f"{len(late)} of {len(records)} requests were sent more than {LATE_S * 1000:.0f} ms late "
            f"(up to {max(late):.2f} s): this client, not the server, delayed them; "
            "use a faster or idle machine, or a lower --speed"
        )
    if records and all(record.outcome == "connect" for record in records):
        yield f"no connection was made ({records[0].error}): is the server up, and is --url right?"
    uncounted = sum(record.ok and record.output_tokens is None for record in records)
    if uncounted:
        yield (
            f"{uncounted} answers came without usage, so their tokens and TPOT are missing: "
            "the server must honour stream_options.include_usage"
        )
    complete = [record for record in records if record.ok]
    if complete and all(record.tier is None for record in complete):
        yield "the server sent no x-deltazip-tier header, so cold and warm requests cannot be told apart"
