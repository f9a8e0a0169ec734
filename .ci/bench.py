"""Measures how fast swiftcms_ws pushes events, beside what else there is: `python3 .ci/bench.py`.

It needs Python 3.10+ with pip, Linux, and better a C compiler. It makes its own environment, in
~/.cache/swiftcms-ws-bench (or under $XDG_CACHE_HOME), and uses it again the next time.

Each server (bench_servers.py) and the load client (loadclient.c) run in a process of their own,
each on a core of its own where there are two, and talk over 127.0.0.1. The servers take turns, one
round of all of them after another, and a ratio is always between two figures of the same round, so
that a machine that is slow for a minute is slow for both. The client does not sleep while it
expects events, or servers would be charged for waking it. What other processes disturbed is
measured again, up to twice. Tables show the median of the rounds, and (least..most). All messages
are equally long (300 bytes unless it says otherwise).

fan-out     from the first publish of a burst until the last client has its last event
latency     one event; when all have it, the next: until half of the clients, and the last, have it
publish     one call of publish(), back to back, with 1 and with 1000 clients subscribed
memory      the server process's PSS for each of 200 clients that offer compression
stuck       how much longer a burst takes the others when one of 200 clients never reads
redis       200 clients of another process than the one that publishes, beside one process alone
matching    one subscriber of what is published, while others subscribed to something else
ceiling     what the load client can count: it must be more than any server sends

The client checks that everybody gets every event, whole and in order; if not, this ends with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_JSON = HERE / "bench.json"
PACKAGES = ["flask", "flask-sock", "simple-websocket", "pyjwt", "flask-socketio", "websockets", "redis"]
RAW, OURS = "raw_python", "swiftcms_ws"
SOCKET_IO_PATH = "/socket.io/?EIO=4&transport=websocket"
# How a client joins each server: the path, and what else the load client must know.
# They are measured in this order, which puts ours next to the raw loop it is compared with.
JOIN = {
    RAW: ["/ws"],
    OURS: ["/ws", "--send", '{"action":"subscribe","type":"content.*"}', "--answers", "2"],
    "websockets": ["/ws"],
    "flask-sock": ["/ws"],
    "Flask-SocketIO": [SOCKET_IO_PATH, "--engineio", "--send", "40", "--answers", "2"],
}
ELSEWHERE = '{"action":"subscribe","type":"content.created","contentType":"elsewhere-#"}'
COLUMNS = [(200, False), (200, True), (1000, False), (1000, True)]
SMALL_BURST = 10  # warms up, and tells how many events a slow server can be asked for
PATIENCE_S = 60  # for any one answer: longer means that it hangs
STUCK_LIMIT_S = 10
DISTURBED = 0.15  # of a core's time, taken by other processes: then a measurement is repeated
ATTEMPTS, CALM_WAIT_S = 3, 20  # how often, and how long to wait for them to finish
ROUND_LIMIT_S = 600  # a round takes 4 minutes; nothing is repeated once they take longer than this


class Wrong(Exception):
    """A server lost, repeated, reordered or damaged an event, or a process failed."""


# --- An environment of its own ------------------------------------------------------------------


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "swiftcms-ws-bench"


def enter_environment() -> None:
    """Starts this program again in its virtual environment, made first where there is none."""
    kind = hashlib.sha256(" ".join([sys.version, *PACKAGES]).encode()).hexdigest()[:12]
    home = cache_directory() / kind
    if Path(sys.prefix) == home:
        return
    python = home / "bin" / "python"
    finished = home / "complete"  # an interrupted installation is begun again
    if not finished.exists():
        print(f"making an environment in {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        finished.touch()
    os.execv(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])


def build_client(directory: Path) -> tuple[list[str], str]:
    """The command that runs the load client, and what to say about it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    program = str(directory / "loadclient")
    attempts = {
        "C, looks into compressed frames too": ["-DWITH_ZLIB", "-lz"],
        "C, without zlib: it only counts compressed frames": [],
    }
    for about, extra in attempts.items() if compiler else ():
        command = [compiler, "-O2", "-o", program, str(HERE / "loadclient.c"), *extra]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return [program], about
    about = "Python, as there is no C compiler: IT MAY BE THE BOTTLENECK, see its ceiling"
    return [sys.executable, str(HERE / "loadclient.py")], about


# --- Processes ----------------------------------------------------------------------------------


class Process:
    """A child that takes a line and answers with lines of JSON."""

    def __init__(self, command: list[str], core: int | None) -> None:
        self.name = Path(command[0]).name if len(command) < 3 else " ".join(command[1:3])
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors)
        if core is not None:
            os.sched_setaffinity(self.child.pid, {core})  # before it starts a thread: they inherit
        self.unread = b""

    def tell(self, line: str) -> None:
        self.child.stdin.write(line.encode() + b"\n")
        self.child.stdin.flush()

    def hear(self, patience: float = PATIENCE_S) -> dict:
        deadline = time.monotonic() + patience
        output = self.child.stdout.fileno()
        while b"\n" not in self.unread:
            left = max(0.0, deadline - time.monotonic())
            data = os.read(output, 65536) if select.select([output], [], [], left)[0] else b""
            if not data:
                raise Wrong(f"{self.name} gave no answer: {self.complaint()}")
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def ask(self, line: str, patience: float = PATIENCE_S) -> dict:
        self.tell(line)
        return self.hear(patience)

    def complaint(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-2000:] or "nothing on standard error"

    def pss_kib(self) -> int:
        """Its memory; what it shares with other processes counts in part."""
        for line in Path(f"/proc/{self.child.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
        raise Wrong("the kernel does not tell the PSS")

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it, or this very call, came before
            self.tell("exit")
        try:
            self.child.wait(2)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()


class Session:
    """One server with its clients, and what can be measured of them."""

    def __init__(self, bench: Bench, name: str, redis_url: str | None = None) -> None:
        """With Redis a second process of the same kind, which has no clients, is the one that publishes."""
        self.bench, self.name = bench, name
        command = [sys.executable, str(HERE / "bench_servers.py"), name, *([redis_url] if redis_url else [])]
        self.server = self.publisher = Process(command, bench.server_core)
        self.processes = [self.server]
        if redis_url:
            self.publisher = Process(command, bench.server_core)
            self.processes.append(self.publisher)

    def __enter__(self) -> Session:
        ports = [process.hear()["port"] for process in self.processes]
        self.port = ports[0]
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in reversed(self.processes):
            process.end()

    def join(self, count: int, *options: str, join: list[str] | None = None) -> Process:
        """Connects clients, and waits until the server knows them all."""
        path, *more = join or JOIN[self.name]
        command = [*self.bench.client, str(self.port), path, str(count), *more, *options]
        command += self.bench.spin
        client = Process(command, self.bench.client_core)
        self.processes.append(client)
        client.count, client.stuck = count, "--stuck" in options
        client.hear()
        deadline = time.monotonic() + PATIENCE_S
        while self.server.ask("clients") not in (None, count):
            if time.monotonic() > deadline:
                raise Wrong(f"{self.name} does not see its {count} clients")
            time.sleep(0.01)
        return client

    def publish(
        self,
        client: Process,
        events: int,
        *,
        command: str = "burst",
        extra: str = "",
        size: int = 300,
        limit: float = PATIENCE_S,
    ) -> dict:
        """Publishes, and returns what the server and the client say of it, checked."""
        client.ask(f"expect {events} {int(limit * 1000)}")
        self.publisher.tell(f"{command} {events} {extra}")
        report = client.hear(limit + 5)
        everybody = client.count - client.stuck
        if report["order_errors"] or report["bad_frames"]:
            raise Wrong(f"{self.name}: events out of order or damaged: {report}")
        if report["complete"] < everybody:
            if client.stuck:
                return {"stops": True}
            complaint = self.server.complaint()
            raise Wrong(f"{self.name}: not all got {events} events: {report}; server: {complaint}")
        if report["most"] != events or report["closed"]:
            raise Wrong(f"{self.name}: too many events, or connections lost: {report}")
        if not size * 0.95 <= report["smallest"] <= report["largest"] <= size * 1.05:
            raise Wrong(f"{self.name}: messages should have {size} bytes: {report}")
        report |= self.publisher.hear()
        if "start_ns" in report:
            report["seconds"] = (report["last_ns"] - report["start_ns"]) / 1e9
            report["per_second"] = events * everybody / report["seconds"]
        # How much of the time the client's core was at work: near 1, it was the bottleneck.
        span = report["last_ns"] - report["first_ns"]
        report["client_busy"] = report["busy_ns"] / span if span > 1e6 else 0.0
        return report

    def affordable(self, client: Process, wanted: int, budget: float) -> int:
        """How many of the wanted events this server delivers within the budget, in seconds."""
        rate = self.publish(client, SMALL_BURST)["per_second"]
        return max(SMALL_BURST, min(wanted, int(rate * budget / client.count)))


# --- Measurements: each returns its figures of one round ------------------------------------------


class Bench:
    """The machine, the options, and the measurements."""

    def __init__(self, client: list[str], quick: bool) -> None:
        self.client, self.quick = client, quick
        cores = sorted(os.sched_getaffinity(0))
        self.server_core, self.client_core = cores[:2] if len(cores) > 1 else (None, None)
        self.spin = ["--spin"] if len(cores) > 1 else []  # on one core it would starve the server
        self.burst = 100 if quick else 400
        self.repeats = 3 if quick else 9
        self.budget = 1.0 if quick else 3.0  # seconds, for what is repeated

    def fan_out(self, name: str, clients: int, deflate: bool) -> dict:
        """Bursts; without compression also events one at a time, and at 1000 publish()'s cost."""
        with Session(self, name) as session:
            client = session.join(clients, *["--deflate"] * deflate)
            events = session.affordable(client, self.burst, self.budget)
            deadline = time.monotonic() + self.budget
            bursts = [session.publish(client, events)]
            while len(bursts) < self.repeats and time.monotonic() < deadline:
                bursts.append(session.publish(client, events))
            rates = [burst["per_second"] for burst in bursts]
            middle = bursts[rates.index(statistics.median_low(rates))]
            wanted = ("per_second", "client_busy", "wire_bytes")
            figures = {"events": events} | {key: middle[key] for key in wanted}
            if not deflate:
                figures |= self.latency(session, client)
            if clients == 1000 and not deflate and name not in (RAW, "websockets"):
                figures |= self.publish_cost(session, client, events)
        return figures

    def latency(self, session: Session, client: Process) -> dict:
        deadline = time.monotonic() + self.budget
        events = []
        while len(events) < self.burst // 2 and (time.monotonic() < deadline or len(events) < 5):
            events.append(session.publish(client, 1))
        half, last = (statistics.median(e[k] for e in events) / 1000 for k in ("p50_ns", "max_ns"))
        return {"half_us": half, "last_us": last, "latency_events": len(events)}

    def publish_cost(self, session: Session, client: Process, calls: int) -> dict:
        report = session.publish(client, calls, command="publish_cost")
        return {"publish_us": report["p50_us"], "publish_max_us": report["max_us"]}

    def publish_alone(self, name: str) -> dict:
        with Session(self, name) as session:
            client = session.join(1)
            session.publish(client, SMALL_BURST)
            return self.publish_cost(session, client, self.burst)

    def memory(self, name: str) -> dict:
        clients, settle_s = 200, 0.5
        with Session(self, name) as session:
            # The first client makes the server import and start what it needs for any client.
            session.publish(first := session.join(1, "--deflate"), 5)
            first.end()
            time.sleep(settle_s)
            before = session.server.pss_kib()
            client = session.join(clients, "--deflate")
            figures = {}
            for moment, events in (("idle", 0), ("after_20", 20), ("after_400", 380)):
                if events:
                    session.publish(client, events)
                time.sleep(settle_s)
                figures[moment] = (session.server.pss_kib() - before) / clients
        return figures

    def stuck(self, name: str) -> dict:
        """Messages of 4 KiB, 2.4 MB for each client: more than kernel and queue hold for one."""
        events, size = 600, 4096
        figures = {}
        for who in ("without", "with"):
            with Session(self, name) as session:
                client = session.join(200, *["--stuck"] * (who == "with"))
                session.server.ask(f"resize {size}")
                limit = max(STUCK_LIMIT_S, 3 * figures.get("without", 0))
                limit = limit if client.stuck else PATIENCE_S
                report = session.publish(client, events, size=size, limit=limit)
                if "stops" in report:
                    if name == OURS:
                        raise Wrong(f"{name}: one client that does not read stops the others")
                    return figures | {"stops": True}
                figures[who] = report["seconds"]
                if client.stuck:
                    figures["end"] = client.ask("stuck")
        return figures | {"ratio": figures["with"] / figures["without"]}

    def redis(self, name: str, redis_url: str | None, command: str = "burst") -> dict:
        with Session(self, name, redis_url) as session:
            client = session.join(200)
            session.publish(client, SMALL_BURST)
            bursts = [session.publish(client, self.burst, command=command) for _ in range(self.repeats)]
            per_second = statistics.median(burst["per_second"] for burst in bursts)
            return {"per_second": per_second} | self.latency(session, client)

    def matching(self, name: str) -> dict:
        """The same server, with 10 and then 10,000 subscriptions that do not match."""
        figures = {}
        with Session(self, name) as session:
            client = session.join(1)
            for others, count, each in ((10, 10, 1), (10_000, 100, 100)):
                joining = ["/ws", "--send", ELSEWHERE, "--repeat", str(each)]
                bystanders = session.join(count, join=[*joining, "--answers", str(1 + each)])
                session.publish(client, SMALL_BURST)
                bursts = [session.publish(client, 5 * self.burst)["seconds"] for _ in range(3)]
                figures[str(others)] = {
                    "burst_us": statistics.median(bursts) / (5 * self.burst) * 1e6,
                    "alone_us": self.latency(session, client)["half_us"],
                }
                if others == 10:
                    bystanders.end()
        return figures

    def ceiling(self) -> dict:
        with Session(self, RAW) as session:
            client = session.join(200)
            report = session.publish(client, 64 * self.burst // 4, extra="64")
            return {key: report[key] for key in ("per_second", "client_busy")}


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str | None]:
    """A Redis of our own, in memory, or None where there is none to start."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(directory)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        child.kill()
        child.wait()


def other_processes_s() -> float:
    """Processor time of everything but this program and those of its children that have ended."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    # user, nice, system, irq, softirq (sending over loopback is in it) and steal; not the idle ones
    everything = sum(int(ticks[place]) for place in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everything - sum(use.ru_utime + use.ru_stime for use in uses)


def watched(measure: Callable[[], dict]) -> dict:
    """Measures, and adds how much of a core other processes had meanwhile."""
    started, before = time.monotonic(), other_processes_s()
    figures = measure()
    share = (other_processes_s() - before) / (time.monotonic() - started)
    return figures | {"others": max(0.0, share)}


def undisturbed(measure: Callable[[], dict], patience_until: float) -> dict:
    """Measures again while other processes had much of a core; the calmest attempt counts."""

    def wait_a_second() -> dict:
        time.sleep(1)
        return {}

    attempts = [watched(measure)]
    while (
        attempts[-1]["others"] > DISTURBED
        and len(attempts) < ATTEMPTS
        and time.monotonic() < patience_until
    ):
        calm_by = time.monotonic() + CALM_WAIT_S
        while time.monotonic() < calm_by and watched(wait_a_second)["others"] > DISTURBED:
            pass
        attempts.append(watched(measure))
    return min(attempts, key=lambda figures: figures["others"])


# --- What is printed ------------------------------------------------------------------------------


NOTHING = "–"


def spread(values: list[float], form: str = "{:,.0f}") -> str:
    """Median (least..most)."""
    if not values:
        return NOTHING
    text = form.format(statistics.median(values))
    if len(values) > 1:
        text += f" ({form.format(min(values))}..{form.format(max(values))})"
    return text


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return f"\n### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.partition(":")[2].strip() for x in cpuinfo if x.startswith("model name")), "?")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in [*PACKAGES, "werkzeug"])
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before; Python {platform.python_version()}, {versions}"
    )


Figures = dict[str, dict[str, list[dict]]]  # measurement -> server -> one dict a round


def values(found: Figures, measurement: str, server: str, key: str) -> list[float]:
    return [each[key] for each in found.get(measurement, {}).get(server, []) if key in each]


def ratios(found: Figures, measurement: str, server: str, key: str) -> list[float]:
    """Each round's figure divided by the raw loop's in the same round."""
    raw = {each["round"]: each for each in found.get(measurement, {}).get(RAW, [])}
    mine = found.get(measurement, {}).get(server, [])
    return [
        each[key] / raw[each["round"]][key]
        for each in mine
        if key in each and key in raw.get(each["round"], {})
    ]


def column(clients: int, deflate: bool) -> str:
    return f"{clients} clients" + (", deflate offered" if deflate else "")


def in_markdown(found: Figures, names: list[str]) -> str:
    columns = [column(*each) for each in COLUMNS]
    plain = [column(*each) for each in COLUMNS if not each[1]]
    # Title, heads of the columns, and what makes one server's row.
    tables: list[tuple[str, list[str], Callable[[Figures, str], list[str]]]] = [
        ("Fan-out of a burst: deliveries a second, raw loop = 1", columns, share_cells),
        ("Fan-out of a burst: deliveries a second", columns, rate_cells),
        (
            "One event at a time: µs until half of the clients, and the last, have it",
            [f"{where}: {what}" for where in plain for what in ("half", "raw loop = 1", "last")],
            latency_cells,
        ),
        (
            "One publish(), back to back: µs, median of the calls",
            ["1 client", "1000 clients"],
            publish_cells,
        ),
        (
            "Memory: KiB for each of 200 clients, deflate offered",
            ["idle", "after 20 events", "after 400 events"],
            memory_cells,
        ),
        (
            "One of 200 clients never reads: seconds until the others have 600 events of 4 KiB",
            ["all read", "one does not", "ratio", "how it ended for that one"],
            stuck_cells,
        ),
        (
            "Matching: µs an event for 1 subscriber, beside subscriptions to something else",
            [f"{how}, {many} others" for how in ("burst", "alone") for many in ("10", "10,000")],
            matching_cells,
        ),
    ]
    with_redis = (
        "Through Redis, 200 clients of another process than the one that publishes",
        ["burst, deliveries a second", "one event: µs until half have it", "until the last has it"],
        redis_cells,
    )
    parts = []
    for title, heads, cells in [*tables, with_redis]:
        rows = [[name, *cells(found, name)] for name in (REDIS_ROWS if cells == redis_cells else names)]
        rows = [row for row in rows if set(row[1:]) != {NOTHING}]
        if rows:
            parts.append(table(title, ["server", *heads], rows))
    return "\n".join([*parts, "", ceiling_line(found), "", others_line(found)])


def share_cells(found: Figures, name: str) -> list[str]:
    return [spread(ratios(found, column(*c), name, "per_second"), "{:.2f}") for c in COLUMNS]


def rate_cells(found: Figures, name: str) -> list[str]:
    return [spread(values(found, column(*c), name, "per_second")) for c in COLUMNS]


def latency_cells(found: Figures, name: str) -> list[str]:
    cells = []
    for where in (column(*each) for each in COLUMNS if not each[1]):
        cells.append(spread(values(found, where, name, "half_us")))
        cells.append(spread(ratios(found, where, name, "half_us"), "{:.2f}"))
        cells.append(spread(values(found, where, name, "last_us")))
    return cells


def publish_cells(found: Figures, name: str) -> list[str]:
    places = ("publish", column(1000, False))
    return [spread(values(found, place, name, "publish_us"), "{:,.1f}") for place in places]


def memory_cells(found: Figures, name: str) -> list[str]:
    moments = ("idle", "after_20", "after_400")
    return [spread(values(found, "memory", name, moment), "{:.1f}") for moment in moments]


def stuck_cells(found: Figures, name: str) -> list[str]:
    rounds = found.get("stuck", {}).get(name, [])
    stopped = any(each.get("stops") for each in rounds)
    ends = {f"{e['end']['end']} {e['end']['code'] or ''}".strip() for e in rounds if "end" in e}
    return [
        spread(values(found, "stuck", name, "without"), "{:.2f}"),
        "stops" if stopped else spread(values(found, "stuck", name, "with"), "{:.2f}"),
        NOTHING if stopped else spread(values(found, "stuck", name, "ratio"), "{:.2f}"),
        ", ".join(sorted(ends)) or NOTHING,
    ]


def matching_cells(found: Figures, name: str) -> list[str]:
    rounds = found.get("matching", {}).get(name, [])
    return [
        spread([each[others][key] for each in rounds], "{:.1f}")
        for key in ("burst_us", "alone_us")
        for others in ("10", "10000")
    ]


def redis_cells(found: Figures, name: str) -> list[str]:
    return [spread(values(found, "redis", name, key)) for key in ("per_second", "half_us", "last_us")]


def ceiling_line(found: Figures) -> str:
    bursts = [
        (figures["per_second"], name, where, figures["client_busy"])
        for where in (column(*each) for each in COLUMNS)
        for name, rounds in found.get(where, {}).items()
        for figures in rounds
    ]
    ceiling = values(found, "ceiling", RAW, "per_second")
    if not bursts or not ceiling:
        return "Client ceiling: not measured."
    rate, name, where, busy = max(bursts)
    busy_then = spread(values(found, "ceiling", RAW, "client_busy"), "{:.0%}")
    return (
        f"Client ceiling: it counted {spread(ceiling)} events a second, sent 64 in a call to "
        f"200 clients, with its core {busy_then} busy. The most that any server delivered: "
        f"{rate:,.0f} ({name}, {where}), with the client's core {busy:.0%} busy."
    )


def others_line(found: Figures) -> str:
    shares = [
        figures["others"]
        for servers in found.values()
        for rounds in servers.values()
        for figures in rounds
    ]
    return (
        f"Other processes had {statistics.median(shares):.0%} of a core during the median "
        f"measurement, {max(shares):.0%} during the worst. With more than {DISTURBED:.0%} it was "
        "repeated, up to twice, and the calmest one counts."
        if shares
        else ""
    )


# --- The run --------------------------------------------------------------------------------------


ALONE = f"{OURS}, one process, no Redis"
REDIS_ROWS = [ALONE, OURS, f"{OURS}, publish_many", "Flask-SocketIO"]


def redis_plan(
    bench: Bench, names: list[str], url: str | None
) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    if url is None:
        print("there is no redis-server: nothing is measured with Redis", file=sys.stderr)
        return
    if OURS in names:
        yield "redis", ALONE, lambda: bench.redis(OURS, None)
        yield "redis", OURS, lambda: bench.redis(OURS, url)
        yield "redis", REDIS_ROWS[2], lambda: bench.redis(OURS, url, "burst_many")
    if "Flask-SocketIO" in names:
        yield "redis", "Flask-SocketIO", lambda: bench.redis("Flask-SocketIO", url)


def plan(bench: Bench, names: list[str]) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """One round: (measurement, server, what to call)."""
    yield "ceiling", RAW, bench.ceiling
    for clients, deflate in COLUMNS:
        for name in names:
            args = (name, clients, deflate)
            yield column(clients, deflate), name, lambda args=args: bench.fan_out(*args)
    for name in names:
        if name not in (RAW, "websockets"):  # they publish in a loop that is not a call
            yield "publish", name, lambda name=name: bench.publish_alone(name)
    for what in (bench.memory, bench.stuck, bench.matching):
        for name in names if what != bench.matching else {OURS} & set(names):
            yield what.__name__, name, lambda what=what, name=name: what(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=0, help="default 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help="fewer events: only to try it")
    parser.add_argument("--only", default=",".join(JOIN), help=f"of {', '.join(JOIN)}")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="default: .ci/bench.json")
    options = parser.parse_args()
    names = [name for name in JOIN if name in options.only.split(",")]
    if unknown := set(options.only.split(",")) - set(JOIN):
        parser.error(f"no such server: {', '.join(sorted(unknown))}; there are {', '.join(JOIN)}")
    enter_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if OURS in names and not (HERE.parent / "swiftcms_ws.py").exists():
        print("swiftcms_ws.py is not there: only the others are measured", file=sys.stderr)
        names.remove(OURS)
    found: Figures = {}
    failures: list[str] = []
    started = time.monotonic()
    about_machine = machine()
    with tempfile.TemporaryDirectory() as directory, redis_server(Path(directory)) as redis_url:
        client, about_client = build_client(Path(directory))
        bench = Bench(client, options.quick)
        rounds = options.rounds or (1 if options.quick else 3)
        patience_until = started + rounds * ROUND_LIMIT_S
        for number in range(1, rounds + 1):
            for measurement, name, measure in [*plan(bench, names), *redis_plan(bench, names, redis_url)]:
                try:
                    figures = undisturbed(measure, patience_until) | {"round": number}
                except Wrong as error:
                    failures.append(f"round {number}, {measurement}, {name}: {error}")
                    print("FAILED:", failures[-1], file=sys.stderr)
                    continue
                found.setdefault(measurement, {}).setdefault(name, []).append(figures)
                print(f"round {number}, {measurement}, {name}: {figures}", file=sys.stderr)
    minutes = (time.monotonic() - started) / 60
    print(f"{about_machine}.")
    print(f"{rounds} rounds in {minutes:.0f} minutes. Load client: {about_client}.")
    print(in_markdown(found, names))
    about = {"machine": about_machine, "client": about_client, "quick": options.quick}
    document = about | {"figures": found, "failures": failures}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nAll figures of all rounds: {options.json}")
    for failure in failures:
        print(f"\nFAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
