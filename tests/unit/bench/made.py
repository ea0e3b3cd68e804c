"""Results of the load generator that were never measured, for tests of what is made of them."""

import msgspec

from bench import loadgen
from bench.machine import Machine

MACHINE = Machine("cpu", 2, 1 << 30, True, "6.18", "ext4", "2026-01-01T00:00:00+00:00", "c", 0)


def result(
    requests_per_s: float,
    *,
    trip_ns: float = 105.0,
    busy_s: float = 2.0,
    max_ns: int = 4000,
    series: list[loadgen.Interval] | None = None,
    total_bytes: int | None = None,
) -> loadgen.Result:
    trip = {"median_ns": trip_ns, "min_ns": trip_ns, "max_ns": trip_ns, "samples": 9}
    raw = {
        "workload": "randread",
        "block_bytes": 4096,
        "depth": 1,
        "requests": int(requests_per_s),
        "bytes": int(requests_per_s) * 4096 if total_bytes is None else total_bytes,
        "elapsed_s": 1.0,
        "requests_per_s": requests_per_s,
        "bytes_per_s": requests_per_s * 4096,
        "latency_ns": {"mean": 1.0, "p50": 1000, "p99": 2000, "p99_9": 3000, "max": max_ns},
        "errors": {"ioerr": 0, "unsupp": 0, "other": 0},
        "wrong_used_len": 0,
        "kicks": 0,
        "sleeps": 0,
        "event_idx": True,
        "cpu": {
            "backend_ns": 10**9,
            "backend_ns_per_request": 1e9 / requests_per_s,
            "frontend_ns": 10**9,
            "machine_busy_ns": int(busy_s * 1e9),
            "machine_steal_ns": 0,
        },
        "backend_resident_bytes": 10 << 20,
        "backend_anonymous_bytes": 1 << 20,
        "round_trip_before": trip,
        "round_trip_after": trip,
        "verify": None,
    }
    converted = msgspec.convert(raw, loadgen.Result)
    return msgspec.structs.replace(converted, series=series or [])
