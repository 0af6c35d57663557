"""``python -m benchmarks.tiers_policy --json FILE``: which requests find their version where, against Belady's optimum.

200 versions, 32 slots, a host with room for 64. The slot table and the blob table of the product are driven, one
request after the other, by seeded traces; only the bytes are small. The optimum knows the whole trace and keeps what
is wanted soonest (Belady 1966); for the host it is that of a single tier of as many places as slots and host have.
Requests are independent draws, so that nobody who cannot see the future does better than to keep the versions that are
drawn most often (Coffman and Denning 1973, the policy A0): the informed policy does that, and is told the weights.
"""

import argparse
import asyncio
import bisect
import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deltazip_ray.artifact.manifest import BlobEntry, TensorEntry
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.blob_table import BlobTable
from deltazip_ray.residency.fetch_pool import FetchPool
from deltazip_ray.residency.popularity import HALF_LIFE, Popularity
from deltazip_ray.residency.quarantine import BlobKey, Quarantine
from deltazip_ray.residency.slot_entries import AskSlot
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier

VERSIONS, SLOTS, HOST, REQUESTS = 200, 32, 64, 20_000
_TENSORS = {"model.layers.0.mlp.up_proj.weight": TensorEntry(codec="raw", shape=(1,), bytes_finetuned=2)}

Trace = Sequence[int]
Ranks = Sequence[Sequence[int]]
"""The versions in the order of their weights, the heaviest first, at each request."""


def zipf(exponent: float, seed: int, moving: int | None = None) -> tuple[Trace, Ranks]:
    """Independent draws, version ``i`` with weight ``(i + 1) ** -exponent``.

    ``moving``: after so many requests a tenth of the versions swap their popularity, again and again.
    """
    rng = random.Random(seed)
    bounds = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(VERSIONS)))
    names, trace, ranks = list(range(VERSIONS)), [], []
    for number in range(REQUESTS):
        if moving and number and number % moving == 0:
            some = rng.sample(range(VERSIONS), VERSIONS // 10)
            names = names.copy()
            for place, name in zip(some, [names[place] for place in some[1:] + some[:1]], strict=True):
                names[place] = name
        trace.append(names[bisect.bisect(bounds, rng.random() * bounds[-1])])
        ranks.append(names)
    return trace, ranks


TRACES: dict[str, Callable[[int], tuple[Trace, Ranks]]] = {
    "zipf 0.8": lambda seed: zipf(0.8, seed),
    "zipf 1.0": lambda seed: zipf(1.0, seed),
    "zipf 1.2": lambda seed: zipf(1.2, seed),
    "zipf 1.0, moving": lambda seed: zipf(1.0, seed, moving=2000),
    "uniform": lambda seed: zipf(0.0, seed),
}


def belady(trace: Trace, places: int) -> float:
    """Share of hits of the policy that evicts what is wanted again last."""
    uses: defaultdict[int, list[int]] = defaultdict(list)
    for when in range(len(trace) - 1, -1, -1):
        uses[trace[when]].append(when)
    inside: dict[int, int] = {}
    hits = 0
    for version in trace:
        uses[version].pop()
        hits += version in inside
        if version not in inside and len(inside) == places:
            del inside[max(inside, key=inside.__getitem__)]
        inside[version] = uses[version][-1] if uses[version] else len(trace)
    return hits / len(trace)


def informed(trace: Trace, ranks: Ranks, places: int) -> float:
    """Share of hits of the policy that knows the weights of the moment, and evicts the lightest but what it serves."""
    inside: set[int] = set()
    hits = 0
    for version, rank in zip(trace, ranks, strict=True):
        hits += version in inside
        if version not in inside and len(inside) == places:
            inside.remove(next(name for name in reversed(rank) if name in inside))
        inside.add(version)
    return hits / len(trace)


class NoStore:
    """Fetches that cost nothing."""

    def __call__(self, entry: BlobEntry, buffer: memoryview, asked: float) -> Tier:
        """Nothing to bring."""
        return "remote"

    def tier(self, key: BlobKey) -> Tier:
        """The same for all."""
        return "remote"

    def seconds_per_byte(self, key: BlobKey) -> float:
        """The same for all."""
        return 1e-8


class Tiers:
    """Slots over a host, as in the product."""

    def __init__(self, half_life: float) -> None:
        self.pool = FetchPool[Tier](1, shared=False)
        popularity = Popularity[BlobKey](half_life)
        memory = memoryview(bytearray(HOST * ALIGNMENT))
        self.blobs = BlobTable(memory, NoStore(), {"remote": self.pool}, Quarantine(1.0), popularity)
        self.slots = SlotTable(SLOTS, half_life=half_life)
        self.found = Counter[Tier]()

    async def request(self, version: int) -> None:
        """One request, from its arrival to its end."""
        name = str(version)
        entry = BlobEntry(block="layers.0", digest=hashlib.sha256(name.encode()).hexdigest(), size=1, tensors=_TENSORS)

        async def load(ask_slot: AskSlot) -> Tier:
            tier: Tier = "host" if self.blobs.ready([entry]) else "remote"
            held = self.blobs.try_hold(name, [entry])
            if held is None:
                raise SystemExit("a host with nothing in use has no room")
            await asyncio.wait([blob.ready for blob in held])
            await ask_slot()
            self.blobs.let_go(held)
            return tier

        pin = await self.slots.pin(name, load)
        self.found[pin.tier] += 1
        self.slots.unpin(pin)


async def run(trace: Trace, half_life: float) -> Counter[Tier]:
    """Where the requests of a trace found their versions."""
    tiers = Tiers(half_life)
    for version in trace:
        await tiers.request(version)
    tiers.blobs.check()
    tiers.slots.check()
    await asyncio.to_thread(tiers.pool.shutdown)
    return tiers.found


def rows(seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """One for each trace and policy."""
    for name, make in TRACES.items():
        for policy, half_life in (("cost-aware", HALF_LIFE), ("recency alone", 1.0)):
            device, host, best_device, best_host, told_device, told_host = [], [], [], [], [], []
            for seed in seeds:
                trace, ranks = make(seed)
                found = asyncio.run(run(trace, half_life))
                device.append(found["device"] / REQUESTS)
                host.append((found["device"] + found["host"]) / REQUESTS)
                best_device.append(belady(trace, SLOTS))
                best_host.append(belady(trace, SLOTS + HOST))
                told_device.append(informed(trace, ranks, SLOTS))
                told_host.append(informed(trace, ranks, SLOTS + HOST))
            yield {
                "trace": name,
                "policy": policy,
                "device": device,
                "device_or_host": host,
                "optimum_device": best_device,
                "optimum_device_or_host": best_host,
                "informed_device": told_device,
                "informed_device_or_host": told_host,
                "informed_of_optimum": sum(told_device) / sum(best_device),
                "informed_of_optimum_or_host": sum(told_host) / sum(best_host),
                "device_of_informed": sum(device) / sum(told_device),
                "device_or_host_of_informed": sum(host) / sum(told_host),
                "device_of_optimum": sum(device) / sum(best_device),
                "device_or_host_of_optimum": sum(host) / sum(best_host),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    found = []
    for row in rows(range(options.seeds)):
        found.append(row)
        print(row["trace"], row["policy"], f"{row['device_of_optimum']:.3f} {row['device_or_host_of_optimum']:.3f}")
    settings = {"versions": VERSIONS, "slots": SLOTS, "host": HOST, "requests": REQUESTS, "seeds": options.seeds}
    options.json.write_text(
        json.dumps({"commit": options.commit, "settings": settings, "rows": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
