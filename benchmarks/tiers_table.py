"""The tables of what the tiers reach, for docs/tiers.md."""

from collections import Counter
from statistics import median
from typing import Any

Row = tuple[str, bool, str]
"""A goal, whether it is met, and what was found."""


def goals(gpu: dict[str, Any], server: dict[str, Any], policy: dict[str, Any]) -> str:
    """Goal by goal, from the results of ``tiers_gpu``, ``tiers_s3`` and ``tiers_policy``."""
    rows = [_copies(gpu), _first_token(gpu), _from_disk(gpu), _steps(gpu), _server(server), _hits(policy)]
    lines = ["| goal | | found |", "|---|---|---|"]
    lines += [f"| {goal} | {'met' if met else 'missed'} | {found} |" for goal, met, found in rows]
    commits = f"{gpu['commit'][:12]} (H200), {server['commit'][:12]} (S3), {policy['commit'][:12]} (Zipf)"
    return "\n".join([*lines, "", f"Measured at {commits}."])


def _wire(gpu: dict[str, Any]) -> float:
    """Seconds that the bytes take alone, page-locked, in one copy."""
    size: int = gpu["bytes"]
    return size / float(gpu["links"]["pinned"])


def _copies(gpu: dict[str, Any]) -> Row:
    reached, runs = gpu["slot_of_pinned"], len(gpu["slot_s"])
    found = f"{reached:.1%} of {gpu['links']['pinned'] / 1e9:.1f} GB/s, published slot and all (median of {runs})"
    return "arena → device ≥ 90 % of the pinned copy speed", reached >= 0.9, found


def _first_token(gpu: dict[str, Any]) -> Row:
    first, wire = gpu["first_tokens"], _wire(gpu)
    taken, published, runs = median(first["overlapped_s"]), median(first["published_s"]), len(first["overlapped_s"])
    found = (
        f"{taken / wire:.2f} ×: {1e3 * taken:.1f} ms against {1e3 * wire:.1f} (median of {runs}); "
        f"{published / wire:.2f} × where the version is published first"
    )
    return "arena → first token ≤ 1.3 × its bytes' time", taken <= 1.3 * wire, found


def _from_disk(gpu: dict[str, Any]) -> Row:
    taken = [sample["first_token_s"] for sample in gpu["disk"]["samples"]]
    read = [gpu["bytes"] / speed for speed in gpu["disk"]["disk_bytes_per_s"]]
    ratio = median(taken) / median(read)
    pairs = sorted(first / alone for first, alone in zip(taken, read, strict=True))
    found = (
        f"{ratio:.2f} ×: {median(taken):.2f} s against {median(read):.2f} (medians of {len(taken)}; "
        f"by pairs {pairs[0]:.2f} to {pairs[-1]:.2f})"
    )
    return "disk → first token ≤ 1.3 × the time of reading its bytes", ratio <= 1.3, found


def _steps(gpu: dict[str, Any]) -> Row:
    quiet, loading = gpu["beside"]["quiet_ms"], gpu["beside"]["loading_ms"]
    ratio = loading["p99"] / quiet["p99"]
    found = (
        f"{ratio:.2f} ×: {loading['p99']:.2f} ms of {loading['steps']} steps against {quiet['p99']:.2f} of "
        f"{quiet['steps']}; the longest {loading['max']:.1f} against {quiet['max']:.1f}"
    )
    return "p99 of warm steps during loads ≤ 1.1 ×", ratio <= 1.1, found


def _server(server: dict[str, Any]) -> Row:
    large, small = server["noise"], server["int2"]
    found = (
        f"{large['of_bare']:.0%} of {large['bare_bytes_per_s'] / 1e9:.2f} GB/s; "
        f"many small compressed blobs, decompressing included: {small['of_bare']:.0%}"
    )
    return "S3 ≥ 80 % of a bare parallel-range downloader", large["of_bare"] >= 0.8, found


def _hits(policy: dict[str, Any]) -> Row:
    ours = [row for row in policy["rows"] if row["policy"] == "cost-aware"]
    found = {row["trace"]: row["device_of_optimum"] for row in ours if row["trace"] in _ZIPF}
    told = ", ".join(f"{reached:.1%} ({trace})" for trace, reached in found.items())
    return "Zipf 1.0, the generator's default: ≥ 90 % of Belady's hits in slots", found["zipf 1.0"] >= 0.9, told


_ZIPF = ("zipf 0.8", "zipf 1.0", "zipf 1.2")


def ways(gpu: dict[str, Any]) -> str:
    """Each part of a first token by itself."""
    first, samples = gpu["first_tokens"], gpu["disk"]["samples"]
    rows = {
        "the bytes alone, page-locked, in one copy": [_wire(gpu)],
        "arena → slot, published, idle engine": gpu["slot_s"],
        "the same through the engine (`prefetch`)": first["load_s"],
        f"first token, {first['prompt_tokens']} prompt tokens, version resident": first["resident_s"],
        "arena → first token, used while it arrives": first["overlapped_s"],
        "arena → first token, published first": first["published_s"],
        "arena → slot beside 32 decoding requests": gpu["beside"]["load_s"],
        "disk → arena, verified": [sample["host_s"] for sample in samples],
        "disk → first token": [sample["first_token_s"] for sample in samples],
    }
    lines = ["| way | median | least | most | runs |", "|---|--:|--:|--:|--:|"]
    for name, found in rows.items():
        lines.append(f"| {name} | {_ms(found)} | {_ms([min(found)])} | {_ms([max(found)])} | {len(found)} |")
    answers = Counter(answer for way in first["answers"].values() for answer in way)
    equal = f"{max(answers.values())} of {answers.total()}"
    lines += ["", f"{equal} first tokens and log-probabilities are equal in all digits."]
    return "\n".join(lines)


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.1f} ms"
