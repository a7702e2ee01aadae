"""``palisade-serve bench``: put load on a running service and report what its callers would feel."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from service.client.key import API_KEY
from service.commands.usage import add_command, fail, printable

if TYPE_CHECKING:
    from service.load.connection import Target
    from service.load.report import Report
    from service.load.requests import Requests, Size

PROTOCOLS = ("v1", "v2-json", "v2-binary")
CLOSED_CONNECTIONS, OPEN_CONNECTIONS = 8, 1000
DISTINCT_IMAGES = 12_288
"""More than a service's answer cache holds by default: sent in turn, each has been forgotten when it comes again."""

MOST_BYTES = 128 * 2**20
"""Of all requests together; images too large for it come again sooner."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    command = add_command(
        commands,
        "bench",
        "put load on a running service and report latency and throughput",
        "Put load on a running service with generated images. Closed loop by default: each of --connections sends its next "
        "request when the last one is answered, which finds the capacity. Open loop with --rate: requests are due at random "
        "times (a Poisson process) that are fixed in advance, and latency counts from when a request was due, so that a stall "
        "of the service shows. Quotas hold: use a key, or a test service with PALISADE_LIMITS=off. The client shares this "
        "machine's cores with whatever else runs here.",
        [
            "palisade-serve bench http://127.0.0.1:8000",
            "palisade-serve bench http://127.0.0.1:8000 --rate 200 --seconds 30 --json | jq .latency_ms",
            "palisade-serve bench http://127.0.0.1:8000 --protocol v2-binary --images-per-request 64 --connections 2",
        ],
        "Exit status: 0 measured, 1 no request was answered 200, 2 wrong usage.",
    )
    command.add_argument("url", metavar="URL", help="the service, as http://127.0.0.1:8000")
    command.add_argument(
        "--connections",
        type=_whole,
        metavar="N",
        help=f"requests on their way (default: {CLOSED_CONNECTIONS}); with --rate, at most (default: {OPEN_CONNECTIONS})",
    )
    command.add_argument("--rate", type=_positive, metavar="PER_SECOND", help="open loop: requests per second, on average")
    command.add_argument("--seconds", type=_positive, default=10.0, help="how long requests are sent (default: %(default)g)")
    command.add_argument("--images-per-request", type=_whole, default=1, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="v1",
        help="PNG files to /v1/classify, or tensors to /v2 in JSON or as bytes (default: %(default)s)",
    )
    command.add_argument("--key-file", metavar="FILE", help=f"file with the API key to send (default: ${API_KEY}, if set)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from subprocess import CalledProcessError

    from service.client.key import headers_of, read_key
    from service.load.connection import Target
    from service.load.requests import probe

    try:
        target = Target.parse(options.url)
        headers = headers_of(read_key(options.key_file))
    except ValueError as error:
        return fail(str(error), 2)
    try:
        requests = _requests(options, _input_size(target, headers)).to(target.prefix, headers)
        probe(target.origin, requests)
        report = _measure(options, target, requests)
    except (RuntimeError, OSError) as error:
        return fail(printable(f"{target.origin}: {error}"), 1)
    except CalledProcessError:
        return fail("the load client failed; its last words are above", 1)
    if options.json:
        print(json.dumps({**_setting(options, target, requests), **report.to_json()}))
    else:
        print("\n".join(report.lines()))
    if report.refused:
        told = f"{report.refused} of {report.requests} requests were refused"
        print(f"palisade-serve: {told}: by a quota (429) or for want of capacity (503)", file=sys.stderr)
    return 0 if report.answered else 1


def _input_size(target: Target, headers: dict[str, str]) -> Size:
    """Return the height and width of the service's model; raises ``RuntimeError`` or ``OSError``."""
    from service.load.requests import ask

    try:
        size = json.loads(ask(target.origin, f"{target.prefix}/v1/model", headers))["input"]
        return int(size["height"]), int(size["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError("GET /v1/model does not tell the model's input size: is it a Palisade service?") from error


def _requests(options: argparse.Namespace, size: Size) -> Requests:
    from service.load.requests import json_tensors, multipart, single_images, tensors

    images, pixels = options.images_per_request, 3 * size[0] * size[1]
    image_bytes = 4 * pixels if options.protocol == "v2-json" else pixels
    count = max(2, min(DISTINCT_IMAGES, MOST_BYTES // image_bytes) // images)
    if options.rate:
        count = min(count, max(1, round(options.rate * options.seconds)))
    seed = time.time_ns()  # other images than last time: the service may have kept those answers
    if options.protocol == "v1":
        return single_images(count, size, seed) if images == 1 else multipart(images, count, size, seed)
    return (json_tensors if options.protocol == "v2-json" else tensors)(images, count, size, seed)


def _measure(options: argparse.Namespace, target: Target, requests: Requests) -> Report:
    """Run the load client, with a bar if standard error is a terminal."""
    from concurrent.futures import ThreadPoolExecutor, wait

    if not sys.stderr.isatty():
        return _load(options, target, requests)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(1) as thread:
        task = progress.add_task("load", total=options.seconds)
        began, running = time.monotonic(), thread.submit(_load, options, target, requests)
        while not wait([running], timeout=0.2).done:
            progress.update(task, completed=time.monotonic() - began)
        return running.result()


def _load(options: argparse.Namespace, target: Target, requests: Requests) -> Report:
    from service.load.measurement import closed_loop, open_loop
    from service.load.report import Report

    images, seconds = options.images_per_request, options.seconds
    if options.rate:
        seen = open_loop(target.origin, requests, options.rate, seconds, options.connections or OPEN_CONNECTIONS)
        return Report.of_open(seen, images)
    return Report.of_closed(closed_loop(target.origin, requests, options.connections or CLOSED_CONNECTIONS, seconds), images)


def _setting(options: argparse.Namespace, target: Target, requests: Requests) -> dict[str, Any]:
    """Return what was measured, for the JSON."""
    loop = {"loop": "open", "rate_per_s": options.rate} if options.rate else {"loop": "closed"}
    return {
        "url": target.origin + target.prefix,
        "protocol": options.protocol,
        "images_per_request": options.images_per_request,
        "distinct_images": len(requests.bodies) * options.images_per_request,
        **loop,
        "connections": options.connections or (OPEN_CONNECTIONS if options.rate else CLOSED_CONNECTIONS),
        "seconds": options.seconds,
    }


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0, at most 100000")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to 10000")
    return int(text)
