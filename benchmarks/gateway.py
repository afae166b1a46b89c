"""The gateway: small requests, held polls, large bodies, many samples at once.

The client is in this process and speaks HTTP by hand, except for samples, which the official SDK
draws. The service runs in a process of its own with a probe on its event loop (``_probed``).
"""

import asyncio
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import tinker
import zstandard
from tinker import types

from benchmarks._bare_asgi import bare_server
from benchmarks._common import Options, common_parser, prepared, report
from benchmarks._http import Connection, hammer
from benchmarks._probed import Probed, probed_service
from tests.blackbox.data import datum, random_tokens
from tests.blackbox.wire import PROTOBUF, forward_backward_bytes
from twinkle_dask_gateway import reading
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.tinker import codec_json, codec_proto, tinker_pb2, wire
from twinkle_dask_gateway.tinker.tensors import Growth

_KEY = "tml-benchmark-tenant"
_CONNECTIONS = 32
_BODY_BYTES = 8_000_000
_DATUM_TOKENS = 1024
_LAG_BOUND_MS = 50
# A place in a run's order that is not reached, so that no engine takes the cores.
_FAR = 1_000_000
_MAX_DATA = GatewayConfig().max_data


def main() -> None:
    raise_file_limit()
    with prepared(common_parser(__doc__).parse_args()) as asked:
        settings = {
            "models": {asked.model: asked.source},
            "api_keys": [_KEY],
            "dtype": asked.dtype,
            "engine": {"threads": asked.service_threads},
            "log_level": "warning",
            # What stands behind a gap in a run's order is accepted and kept, but not computed.
            "journal": {"gap_grace_s": 3600.0},
        }
        with probed_service(settings) as service:
            results = {
                "small": asyncio.run(small_requests(service, asked)),
                "polls": asyncio.run(held_polls(service, asked)),
                "bodies": asyncio.run(large_bodies(service, asked)),
                "samples": many_samples(service, asked),
            }
    report("gateway", asked, results, rows(results))


def raise_file_limit() -> None:
    """Thousands of connections are as many open files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ---- small requests


async def small_requests(service: Probed, asked: Options) -> dict[str, Any]:
    """Each in turn with the bare server, so that both meet the same machine."""
    rounds, seconds = (1, 0.2) if asked.quick else (5, 2.0)
    connection = await Connection.open(service.url, _KEY)
    session, run = await new_run(connection, asked)
    await connection.close()
    with bare_server() as bare_url:
        cases: dict[str, tuple[str, str, Any]] = {
            "bare": (bare_url, "healthz", None),
            "healthz": (service.url, "healthz", None),
            "get_info": (service.url, "get_info", {"model_id": run}),
            "heartbeat": (service.url, "session_heartbeat", {"session_id": session}),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        many: dict[str, list[float]] = {name: [] for name in cases}
        alone: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, (url, path, body) in cases.items():
                _, taken = await hammer(url, _KEY, path, body, connections=1, seconds=seconds / 2)
                alone[name] += taken
                rate, taken = await hammer(
                    url, _KEY, path, body, connections=_CONNECTIONS, seconds=seconds
                )
                rates[name].append(rate)
                many[name] += taken
    return {
        name: {
            "requests_per_s": round(statistics.median(rates[name])),
            "of_bare": round(
                statistics.median(
                    one / bare for one, bare in zip(rates[name], rates["bare"], strict=True)
                ),
                2,
            ),
            "alone_ms": spread(alone[name]),
            f"of_{_CONNECTIONS}_ms": spread(many[name]),
        }
        for name in cases
    }


# ---- held polls


async def held_polls(service: Probed, asked: Options) -> dict[str, Any]:
    """Polls for results that nothing makes yet, each on a connection of its own."""
    num, hold_s, wakes = (20, 0.5, 2) if asked.quick else (2000, 60.0, 20)
    connection = await Connection.open(service.url, _KEY)
    _, run = await new_run(connection, asked)
    _, other = await new_run(connection, asked)
    tickets = [await step(connection, run, seq) for seq in range(2, num + 2)]
    seqs = iter(range(1, 10_000, 2))
    await wake(service, connection, other, next(seqs))  # the first is slower
    alone = [await wake(service, connection, other, next(seqs)) for _ in range(wakes)]
    before = service.lag()["rss_mb"]
    opened = await asyncio.gather(*(Connection.open(service.url, _KEY) for _ in tickets))
    polls = [
        asyncio.create_task(each.result(ticket))
        for each, ticket in zip(opened, tickets, strict=True)
    ]
    await asyncio.sleep(1.0)
    begun = service.lag()
    await asyncio.sleep(hold_s)
    held = service.lag()
    among = [await wake(service, connection, other, next(seqs)) for _ in range(wakes)]
    start_s = time.perf_counter()
    await step(connection, run, 1)  # what all of them wait for
    await asyncio.gather(*polls)
    all_woken_s = time.perf_counter() - start_s
    for each in (*opened, connection):
        await each.close()
    await asyncio.sleep(1.0)
    after = service.lag()
    return {
        "num": num,
        "held_s": hold_s,
        "rss_mb": {
            "before": before,
            "held": begun["rss_mb"],
            "held_on": held["rss_mb"],
            "after": after["rss_mb"],
        },
        "kb_per_poll": round((begun["rss_mb"] - before) * 1024 / num, 1),
        "wake_alone_ms": spread(alone),
        "wake_among_ms": spread(among),
        "among_over_alone": round(statistics.median(among) / statistics.median(alone), 2),
        "all_woken_s": round(all_woken_s, 2),
        "lag_ms": held["max_ms"],
        "lag_p99_ms": held["p99_ms"],
        "lag_busy_ms": held["busy_ms"],
    }


async def wake(service: Probed, connection: Connection, run: str, seq: int) -> float:
    """Milliseconds from sending what a held poll waits for until the poll is answered."""
    polling = await Connection.open(service.url, _KEY)
    poll = asyncio.create_task(polling.result(await step(connection, run, seq + 1)))
    await asyncio.sleep(0.05)
    start_s = time.perf_counter()
    await step(connection, run, seq)
    await poll
    taken_ms = (time.perf_counter() - start_s) * 1000
    await polling.close()
    return taken_ms


async def step(connection: Connection, run: str, seq: int) -> str:
    """Submit a step; gives the id of its request."""
    body: Any = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-6}}
    return (await connection.json("optim_step", body))["request_id"]


async def new_run(connection: Connection, asked: Options) -> tuple[str, str]:
    """A session and a run in it."""
    session = (await connection.json("create_session", {}))["session_id"]
    body: Any = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": asked.model,
        "lora_config": {},
    }
    request = (await connection.json("create_model", body))["request_id"]
    return session, (await connection.result(request))["model_id"]


# ---- large bodies


async def large_bodies(service: Probed, asked: Options) -> dict[str, Any]:
    """Batches of 8 MB in three encodings: what they cost, and how long the loop waits.

    *decode*: the codecs in this process. *accepted*: through the gateway, from the first byte to
    the promise, journal included.
    """
    times, size = (1, 400_000) if asked.quick else (10, _BODY_BYTES)
    connection = await Connection.open(service.url, _KEY)
    _, run = await new_run(connection, asked)
    await connection.ask("healthz")
    service.lag()
    await asyncio.sleep(0.5 if asked.quick else 5.0)
    results: dict[str, Any] = {"idle_lag_ms": service.lag()["max_ms"]}
    seq = _FAR
    for name, encoding in encodings(run, size).items():
        decoded_ms = [timed_ms(encoding.decode) for _ in range(times)]
        library_ms = [timed_ms(encoding.library) for _ in range(times)]
        bodies = [encoding.body(seq := seq + 1) for _ in range(times)]
        service.lag()
        accepted_ms: list[float] = []
        for body in bodies:
            start_s = time.perf_counter()
            status, answer = await connection.ask("forward_backward", body, **encoding.headers)
            accepted_ms.append((time.perf_counter() - start_s) * 1000)
            if status != 200:
                raise SystemExit(f"{name}: {status} {answer[:300]!r}")
        lag = service.lag()
        mb = encoding.num_bytes / 1e6
        results[name] = {
            "mb": round(mb, 2),
            "sent_mb": round(len(bodies[0]) / 1e6, 2),
            "decode_ms_per_mb": round(statistics.median(decoded_ms) / mb, 2),
            "over_library": round(statistics.median(decoded_ms) / statistics.median(library_ms), 2),
            "accepted_ms_per_mb": round(statistics.median(accepted_ms) / mb, 2),
            "lag_ms": lag["max_ms"],
            "lag_p99_ms": lag["p99_ms"],
            "lag_busy_ms": lag["busy_ms"],
            "within_bound": lag["max_ms"] < _LAG_BOUND_MS,
        }
    await connection.close()
    return results


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to send the same kind of batch.

    Attributes:
        body: As it is sent, for a place in the run's order.
        decode: What the gateway's codecs do with it, up to numpy.
        library: The part of that which is a library's: parsing, decompression.
        num_bytes: Of the body, before compression.
    """

    headers: dict[str, str]
    body: Callable[[int], bytes]
    decode: Callable[[], object]
    library: Callable[[], object]
    num_bytes: int


def encodings(run: str, size: int) -> dict[str, Encoding]:
    """Bodies of about so many bytes each; zstd's before compression."""
    text = orjson.dumps(json_batch(data(size // 56_000)))

    def json_body(seq: int) -> bytes:
        head = orjson.dumps({"model_id": run, "seq_id": seq})
        return head[:-1] + b',"forward_backward_input":' + text + b"}"

    message: Any = tinker_pb2.ForwardBackwardRequest.FromString(
        forward_backward_bytes(run, _FAR, data(size // 25_000), "importance_sampling")
    )

    def protobuf_body(seq: int) -> bytes:
        message.seq_id = seq
        return message.SerializeToString()

    def zstd_body(seq: int) -> bytes:
        return zstandard.compress(protobuf_body(seq))

    json_now, protobuf_now, zstd_now = json_body(_FAR), protobuf_body(_FAR), zstd_body(_FAR)

    def from_json() -> object:
        body = reading.check(wire.ForwardBackward, reading.parse(json_now), max_data=_MAX_DATA)
        return codec_json.batch_of(body.batch, backward=True, growth=Growth(0))

    def from_protobuf(content: bytes = protobuf_now) -> object:
        parsed = codec_proto.parse_forward_backward(content, max_data=_MAX_DATA)
        return codec_proto.batch_of(parsed, Growth(0))

    unpacker = zstandard.ZstdDecompressor()
    protobuf = {"content_type": PROTOBUF}
    parse = tinker_pb2.ForwardBackwardRequest.FromString
    return {
        "json": Encoding({}, json_body, from_json, lambda: orjson.loads(json_now), len(json_now)),
        "protobuf": Encoding(
            protobuf,
            protobuf_body,
            from_protobuf,
            lambda: parse(protobuf_now),
            len(protobuf_now),
        ),
        "zstd": Encoding(
            protobuf | {"content_encoding": "zstd"},
            zstd_body,
            lambda: from_protobuf(reading.unpack(zstd_now, 2 * size)),
            lambda: parse(unpacker.decompress(zstd_now)),
            len(protobuf_now),
        ),
    }


def data(num: int) -> list[types.Datum]:
    """What a step of reinforcement learning sends."""
    random = np.random.default_rng(1)
    return [
        datum(
            random_tokens(_DATUM_TOKENS + 1, seed),
            logprobs=-random.exponential(size=_DATUM_TOKENS).astype(np.float32),
            advantages=np.full(_DATUM_TOKENS, random.normal(), np.float32),
        )
        for seed in range(max(1, num))
    ]


def json_batch(of: Sequence[types.Datum]) -> dict[str, Any]:
    """As SDKs before 0.25 write it."""
    return {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": each.model_input.to_ints()}]},
                "loss_fn_inputs": {
                    name: {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
                    for name, tensor in each.loss_fn_inputs.items()
                },
            }
            for each in of
        ],
        "loss_fn": "importance_sampling",
    }


def timed_ms(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start_s = time.perf_counter()
    work()
    return (time.perf_counter() - start_s) * 1000


# ---- samples


def many_samples(service: Probed, asked: Options) -> dict[str, Any]:
    """Single samples of 16 tokens, all asked for before the first is waited for."""
    few, many, rounds = (2, 5, 1) if asked.quick else (50, 500, 3)
    params = types.SamplingParams(max_tokens=16, seed=1, stop=[])
    prompts = [types.ModelInput.from_ints(random_tokens(16, seed)) for seed in range(many)]
    taken_s: dict[int, list[float]] = {few: [], many: []}
    with tinker.ServiceClient(base_url=service.url, api_key=_KEY) as client:
        sampler = client.create_sampling_client(base_model=asked.model).result()
        sampler.sample(prompts[0], num_samples=1, sampling_params=params).result()
        service.lag()
        for _ in range(rounds):
            for num, taken in taken_s.items():
                start_s = time.perf_counter()
                futures = [
                    sampler.sample(prompt, num_samples=1, sampling_params=params)
                    for prompt in prompts[:num]
                ]
                for future in futures:
                    assert len(future.result().sequences[0].tokens) == 16
                taken.append(time.perf_counter() - start_s)
    rates = {num: num / statistics.median(taken) for num, taken in taken_s.items()}
    lag = service.lag()
    return {
        "concurrent": many,
        "samples_per_s": round(rates[many], 1),
        "few": few,
        "samples_per_s_of_few": round(rates[few], 1),
        "many_over_few": round(rates[many] / rates[few], 2),
        "lag_ms": lag["max_ms"],
        "lag_p99_ms": lag["p99_ms"],
        "lag_busy_ms": lag["busy_ms"],
    }


# ---- what is printed


def spread(taken_ms: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    p50, p99 = np.percentile(taken_ms, (50, 99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def rows(results: dict[str, Any]) -> list[tuple[object, ...]]:
    """For the four tables of README.md."""

    def both(of: dict[str, float]) -> str:
        return f"{of['p50']:.2f} / {of['p99']:.2f}"

    def lag(of: dict[str, Any]) -> str:
        return f"{of['lag_ms']} / {of['lag_p99_ms']}"

    small = [
        (
            *(name, one["requests_per_s"], one["of_bare"], both(one["alone_ms"])),
            both(one[f"of_{_CONNECTIONS}_ms"]),
        )
        for name, one in results["small"].items()
    ]
    polls, bodies, samples = results["polls"], results["bodies"], results["samples"]
    held = (
        *(polls["num"], " / ".join(map(str, polls["rss_mb"].values())), polls["kb_per_poll"]),
        *(both(polls["wake_alone_ms"]), both(polls["wake_among_ms"]), polls["all_woken_s"]),
        lag(polls),
    )
    large = [
        (
            *(name, f"{one['mb']} / {one['sent_mb']}", one["decode_ms_per_mb"]),
            *(one["over_library"], one["accepted_ms_per_mb"], lag(one), one["lag_busy_ms"]),
            "yes" if one["within_bound"] else "no",
        )
        for name, one in bodies.items()
        if name != "idle_lag_ms"
    ]
    drawn = (
        *(samples["concurrent"], samples["samples_per_s"], samples["samples_per_s_of_few"]),
        *(samples["many_over_few"], lag(samples)),
    )
    return [*small, held, *large, drawn]


if __name__ == "__main__":
    main()
