"""Many agents for a long time: ``python -m benchmarks.soak`` (500 agents with open streams, 10 minutes)

Each agent has an account and a connection of its own, keeps one stream open and now and then asks for a few pictures.
None may be refused while it has budget, what the agents got must be what the books posted, and the server's memory
may not grow: the median of the last fifth of the time against the second fifth (the first is warm-up). Prints a JSON
line and appends it to benchmarks/results/soak.jsonl; exit status 1 where one of the three fails.
"""

import asyncio
import random
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

from benchmarks import record
from benchmarks.services import ServiceError, descendants, list_accounts, serving, stop_on_sigterm
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service import auth
from teacher_service.ledger_sql import SqlLedger

MODEL = "array:10,3,32,32"
SHAPE_CHW = (3, 32, 32)
MOST_PICTURES = 8
ANSWER_SECONDS = 60.0
SAMPLE_SECONDS = 2.0
MOST_GROWTH = 0.05


@click.command()
@click.option("--agents", default=500, show_default=True)
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--pause-seconds", default=5.0, show_default=True, help="Of an agent between two batches, on average.")
@click.option("--seed", default=0, show_default=True)
@click.option("--note", default="", help="Kept with the result.")
def main(agents: int, minutes: float, pause_seconds: float, seed: int, note: str) -> None:
    """Ask, watch the server's memory, compare with the books."""
    stop_on_sigterm()
    begun = record.about("soak", note)
    with tempfile.TemporaryDirectory(prefix="mekd-soak-") as name:
        folder = Path(name)
        ledger = f"sqlite:///{folder}/ledger.db"
        keys = asyncio.run(_accounts(ledger, agents))
        before = descendants()
        with serving(Path(MODEL), ledger, log=folder / "server.log") as address:
            (server,) = descendants() - before
            found = asyncio.run(_soak(address, keys, server, minutes * 60, pause_seconds, random.Random(seed)))
        posted = sum(account["posted"] for account in list_accounts(ledger))
        errors = sum('"level": "error"' in line for line in (folder / "server.log").read_text().splitlines())
    result = begun | {"agents": agents, "minutes": minutes, "pause_seconds": pause_seconds, "seed": seed}
    result |= found | {"pictures_posted": posted, "errors_logged": errors}
    record.keep("soak", result)
    fine = not found["refusals"] and found["growth"] <= MOST_GROWTH and posted == found["pictures_answered"]
    sys.exit(0 if fine and not errors else 1)


async def _accounts(url: str, count: int) -> list[str]:
    ledger = SqlLedger.open(url)
    keys = []
    for n in range(count):
        text, stored = auth.new_key(f"agent-{n}")
        await ledger.create_account(f"agent-{n}", 10**9, stored)
        keys.append(text)
    await ledger.close()
    return keys


async def _soak(
    address: str, keys: list[str], server: int, seconds: float, pause_seconds: float, rng: random.Random
) -> dict[str, Any]:
    counts = {"batches": 0, "pictures_answered": 0}
    refusals: dict[str, int] = {}
    latencies: list[float] = []
    samples: list[int] = []
    until = time.monotonic() + seconds

    async def agent(key: str, rng: random.Random) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = TeacherInferenceStub(channel).Infer(metadata=(("authorization", f"Bearer {key}"),))
            await call.write(wire.InferRequest(config=wire.StreamConfig(run_id="soak")))
            await call.read()
            while time.monotonic() < until:
                await asyncio.sleep(rng.uniform(0, 2 * pause_seconds))
                images_NCHW = np.full((rng.randint(1, MOST_PICTURES), *SHAPE_CHW), rng.randrange(256), np.uint8)
                batch = wire.Batch(batch_id=str(uuid.uuid4()), images=codec.encode_images(images_NCHW))
                began = time.perf_counter()
                await call.write(wire.InferRequest(batch=batch))
                response = await asyncio.wait_for(call.read(), ANSWER_SECONDS)
                latencies.append(time.perf_counter() - began)
                counts["batches"] += 1
                if response is not grpc.aio.EOF and response.WhichOneof("payload") == "result":
                    counts["pictures_answered"] += response.result.answer.charged_count
                else:
                    refusals[str(response)[:200]] = refusals.get(str(response)[:200], 0) + 1
            await call.done_writing()

    async def watch() -> None:
        while True:
            samples.append(_resident_kib(server))
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        await asyncio.gather(*(agent(key, random.Random(rng.random())) for key in keys))
    finally:
        watching.cancel()
    fifth = len(samples) // 5
    first, last = statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return counts | {
        "refusals": refusals,
        "resident_mib": [round(first / 1024, 1), round(last / 1024, 1)],
        "growth": round(last / first - 1, 4),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
    }


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
