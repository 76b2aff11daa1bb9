"""The load on one server, run as a process of its own: closed loop, then open loop.

    python -m benchmarks.serve_load '{"address": ..., "requests": [path], "clients": 8, "seconds": 5}'
    python -m benchmarks.serve_load '{"address": ..., "requests": [path], "rate": 500, "seconds": 5}'

`requests` are files with the bytes of a ModelInferRequest, sent as they are, one drawn each time, so that
every server has the same client at the same cost; answers are not parsed. Prints one JSON line: requests,
failed, seconds, and latencies in milliseconds (p50, p90, p99, p99.9, most).

With "shared": {"key": name below /dev/shm, "requests": [a file for each client], "bytes": n} each client
writes n bytes, its input, into its part of that object before every request, which only names the place.

A closed loop has `clients` threads, each with a connection of its own and one request at a time. An open
loop sends at random times (exponential gaps) whatever became of earlier requests; a latency begins when its
request was due, so that a client held up by the server does not hide it.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc

METHOD = "/inference.GRPCInferenceService/ModelInfer"
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
TIMEOUT_S = 60.0
WARM_UP = 20


def connect(address: str, number: int) -> Any:
    """A connection that is not shared with others of this process."""
    channel = grpc.insecure_channel(address, options=(*OPTIONS, ("bench.number", number)))
    grpc.channel_ready_future(channel).result(TIMEOUT_S)
    return channel.unary_unary(METHOD)


class Shared:
    """A client's part of a shared memory object, and the input to put there."""

    def __init__(self, key: str, number: int, size: int) -> None:
        with (Path("/dev/shm") / key).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._place = slice(number * size, (number + 1) * size)
        self._input = bytes(size)

    def fill(self) -> None:
        self._map[self._place] = self._input


def closed(
    address: str, requests: list[list[bytes]], places: list[Shared] | None, seconds: float
) -> dict[str, Any]:
    """`requests`: for each client those that it draws from."""
    clients = len(requests)
    calls = [connect(address, number) for number in range(clients)]
    for call, mine in zip(calls, requests, strict=True):
        for request in mine * max(1, WARM_UP // clients // len(mine)):
            call(request, timeout=TIMEOUT_S)
    spent: list[list[float]] = [[] for _ in calls]
    failed = [0] * clients
    begin = threading.Barrier(clients + 1)
    end = [0.0]

    def ask(number: int) -> None:
        call, mine = calls[number], spent[number]
        place = None if places is None else places[number]
        drawn, rng = requests[number], random.Random(number)
        begin.wait()
        while (started := time.perf_counter()) < end[0]:
            try:
                if place is not None:
                    place.fill()
                call(rng.choice(drawn) if len(drawn) > 1 else drawn[0], timeout=TIMEOUT_S)
                mine.append(time.perf_counter() - started)
            except grpc.RpcError:
                failed[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    end[0] = started + seconds
    begin.wait()
    for thread in threads:
        thread.join()
    return summary([value for each in spent for value in each], sum(failed), time.perf_counter() - started)


def opened(address: str, requests: list[bytes], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    calls = [connect(address, number) for number in range(8)]
    for call in calls:
        call(requests[0], timeout=TIMEOUT_S)
    rng = random.Random(seed)
    spent: list[float] = []
    lock, left, failed = threading.Lock(), threading.Semaphore(0), [0]

    def done(future: Any, due: float) -> None:
        now = time.perf_counter()
        with lock:
            if future.code() is grpc.StatusCode.OK:
                spent.append(now - due)
            else:
                failed[0] += 1
        left.release()

    started = time.perf_counter()
    due, sent = started, 0
    while True:
        due += rng.expovariate(rate)
        if due > started + seconds:
            break
        wait_s = due - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        future = calls[sent % len(calls)].future(rng.choice(requests), timeout=TIMEOUT_S)
        future.add_done_callback(lambda future, due=due: done(future, due))
        sent += 1
    for _ in range(sent):
        left.acquire()
    return summary(spent, failed[0], time.perf_counter() - started)


def summary(spent: list[float], failed: int, seconds: float) -> dict[str, Any]:
    ordered = sorted(spent)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else float("nan")

    return {
        "requests": len(ordered),
        "failed": failed,
        "seconds": seconds,
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p999": at(0.999),
        "most": at(1.0),
    }


def main() -> None:
    wanted = json.loads(sys.argv[1])
    requests = [Path(name).read_bytes() for name in wanted["requests"]]
    if "rate" in wanted:
        found = opened(wanted["address"], requests, wanted["rate"], wanted["seconds"], wanted.get("seed", 1))
    else:
        clients, shared = wanted["clients"], wanted.get("shared")
        drawn, places = [requests] * clients, None
        if shared is not None:
            drawn = [[Path(name).read_bytes()] for name in shared["requests"]]
            places = [Shared(shared["key"], number, shared["bytes"]) for number in range(clients)]
        found = closed(wanted["address"], drawn, places, wanted["seconds"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
