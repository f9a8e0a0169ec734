"""Measure swiftcms_ws and its peers: `python3 .ci/bench.py`. BENCHMARK.md explains the method.

It needs Linux, Python 3.10 or newer with pip, and preferably a C compiler and redis-server. It
installs packages in ~/.cache/swiftcms-ws-bench (or under $XDG_CACHE_HOME), if they are missing.

    bench.py                                    everything, three rounds of about 15 minutes
    bench.py --against ../1.0.0                 in turns with the swiftcms_ws.py of that directory
    bench.py --measure single,many --rounds 5   only these measurements
    bench.py --only raw_python,swiftcms_ws      only these servers (and the one of --against)
    bench.py --quick                            small sizes and one round, to try the code
    bench.py --report                           print the tables of earlier runs only
    bench.py --write                            put the tables into .ci/BENCHMARK.md too

Results are stored in .ci/bench.json. A run replaces the results of its measurements and keeps the
others, so a benchmark can be made in several runs. If --quick is given, another file is used.

burst       from the first publish of a burst until the last client has its last event
single      one event alone, in turns with the raw loop: until half of the clients have it
publish     one call of publish(), back to back, with 1 and with 1000 subscribers in turns
memory      the server process's memory per client, with 200 and with 1000 clients
stuck       how much longer a burst takes for the others if one of 200 clients never reads
matching    one subscriber, while others subscribe to something else
redis       200 clients of another process than the one that publishes, beside one process alone
file        the same with an SQLite file; four processes that publish at once; an idle process
deploy      3,000 clients connect to gunicorn, with few threads, while pages are fetched
live        one event for 200 live pages on four sync workers, while other pages are fetched
many        15,000 clients of one process: one event, in turns with the raw loop
idle_cpu    processor time for a connection that only answers pings
return      1,000 clients reconnect with ten patterns each, while `authorize` looks something up
http        the same over plain HTTP: a burst, memory of streams, and processor time of a poll
refresh     a live page of 1,000 rows in Chromium, if one row changes
ceiling     how much the load client can count; if a server sends more, its figure is too low

The load client checks that every client gets every event, complete and in order. If not, or if a
process fails, the measurement is reported as failed and the exit status is 1. No figure is compared
with a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_JSON = HERE / "bench.json"
BENCHMARK_MD = HERE / "BENCHMARK.md"
MARKERS = ("<!-- tables: written by bench.py --write -->", "<!-- end of the tables -->")
PACKAGES = [
    "flask",
    "flask-sock",
    "simple-websocket",
    "pyjwt",
    "gunicorn",
    "flask-socketio",
    "websockets",
    "redis",
]
# The longest wait for one answer. A process that takes longer hangs.
PATIENCE_S = 60
LIFETIME_S = 600


class Failure(Exception):
    """A server lost, repeated, reordered or damaged an event, or a process failed."""


# --- Servers --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
    """A server to measure: its name in the tables, and how clients join it."""

    name: str
    # Path and further options of the load client.
    join: tuple[str, ...]
    # The directory of swiftcms_ws.py; None for the peers.
    checkout: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of bench_servers.py."""
        if self.checkout is None:
            return [self.name]
        return ["swiftcms_ws", "--checkout", str(self.checkout)]

    @property
    def holds_threads(self) -> bool:
        """Return whether each WebSocket occupies a thread of the web server: before 2.0.0."""
        return self.checkout is not None and int(version_in(self.checkout).partition(".")[0]) < 2

    @property
    def has_events(self) -> bool:
        """Return whether it serves the events over plain HTTP too."""
        return self.checkout is not None and '"/ws/events"' in source_in(self.checkout)

    @property
    def sends_pings(self) -> bool:
        """Return whether `--heartbeat` is implemented for it in bench_servers.py."""
        return self.checkout is not None or self.name in ("websockets", "flask-sock")

    @property
    def has_publish(self) -> bool:
        """Return whether it has a call that publishes one event."""
        return self.name not in ("raw_python", "websockets")


def source_in(checkout: Path) -> str:
    return (checkout / "swiftcms_ws.py").read_text(encoding="utf-8")


def version_in(checkout: Path) -> str:
    found = re.search(r'^__version__ = "([^"]+)"', source_in(checkout), re.M)
    return found[1] if found else "0"


def swiftcms_ws(checkout: Path, name: str) -> Server:
    subscribe = '{"action":"subscribe","type":"content.*"}'
    return Server(name, ("/ws", "--send", subscribe, "--answers", "2"), checkout)


OURS = "swiftcms_ws"
RAW = Server("raw_python", ("/ws",))
SOCKET_IO_PATH = "/socket.io/?EIO=4&transport=websocket"
PEERS = [
    Server("websockets", ("/ws",)),
    Server("flask-sock", ("/ws",)),
    Server("Flask-SocketIO", (SOCKET_IO_PATH, "--engineio", "--send", "40", "--answers", "2")),
]


# --- An environment of its own --------------------------------------------------------------------


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "swiftcms-ws-bench"


def enter_environment() -> None:
    """Start this program again in its virtual environment. Create it if it is missing."""
    kind = hashlib.sha256(" ".join([sys.version, *PACKAGES]).encode()).hexdigest()[:12]
    home = cache_directory() / kind
    if Path(sys.prefix) == home:
        return
    python = home / "bin" / "python"
    # If this file is missing, an installation was interrupted. Then it is started again.
    finished = home / "complete"
    if not finished.exists():
        print(f"making an environment in {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        finished.touch()
    os.execv(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])


def build_client(directory: Path) -> tuple[list[str], str]:
    """Return the command that runs the load client, and its description."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    program = str(directory / "loadclient")
    attempts = {
        "C, reads compressed frames too": ["-DWITH_ZLIB", "-lz"],
        "C without zlib, which only counts compressed frames": [],
    }
    for description, extra in attempts.items() if compiler else ():
        command = [compiler, "-O2", "-o", program, str(HERE / "loadclient.c"), *extra]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return [program], description
    description = "Python, for lack of a C compiler: IT MAY BE THE BOTTLENECK, see its ceiling"
    return [sys.executable, str(HERE / "loadclient.py")], description


# --- Processes ------------------------------------------------------------------------------------


class Process:
    """A child process that reads commands from its standard input and answers in lines of JSON."""

    def __init__(self, command: list[str], core: int | None) -> None:
        self.name = " ".join(Path(part).name for part in command[:3])
        # Closed by stop().
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.child = self.start(command)
        if core is not None:
            # It has no thread yet. Threads inherit this.
            os.sched_setaffinity(self.child.pid, {core})
        self.unread = b""

    def start(self, command: list[str]) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors)

    @property
    def pid(self) -> int:
        return self.child.pid

    def send(self, line: str) -> None:
        try:
            self.child.stdin.write(line.encode() + b"\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failure(f"{self.name} has exited: {self.stderr_tail()}") from error

    def receive(self, patience: float = PATIENCE_S) -> dict:
        deadline = time.monotonic() + patience
        output = self.child.stdout.fileno()
        while b"\n" not in self.unread:
            left = max(0.0, deadline - time.monotonic())
            data = os.read(output, 65536) if select.select([output], [], [], left)[0] else b""
            if not data:
                raise Failure(f"{self.name} gave no answer: {self.stderr_tail()}")
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def request(self, line: str, patience: float = PATIENCE_S) -> dict:
        self.send(line)
        return self.receive(patience)

    def stderr_tail(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-2000:] or "nothing on standard error"

    def memory_kib(self) -> int:
        """Return its own memory, without the files that it maps.

        The proportional size of mapped files changes whenever another Python process starts.
        """
        return self.number_in("smaps_rollup", "Pss_Anon:")

    def threads(self) -> int:
        return self.number_in("status", "Threads:")

    def number_in(self, file: str, field: str) -> int:
        for line in Path(f"/proc/{self.pid}/{file}").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
        raise Failure(f"/proc/{self.pid}/{file} has no {field}")

    def stop(self) -> None:
        # It may have exited already.
        with contextlib.suppress(Failure, ValueError):
            self.send("exit")
        self.wait(2)
        for stream in (self.child.stdin, self.child.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def wait(self, patience: float) -> None:
        try:
            self.child.wait(patience)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


class Gunicorn(Process):
    """gunicorn with one worker, which executes the same commands over HTTP."""

    def __init__(self, options: list[str], app: str, core: int | None) -> None:
        self.port = free_port()
        bind = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "gunicorn", "--workers", "1", "--bind", bind]
        command += ["--chdir", str(HERE), "--no-control-socket", "--log-level", "warning"]
        super().__init__([*command, *options, app], core)
        self.worker_pid = 0

    def start(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            preexec_fn=limit_lifetime,  # noqa: PLW1509 - no other thread runs now
        )

    @property
    def pid(self) -> int:
        """Return the worker's process id: its memory and threads are measured."""
        return self.worker_pid

    def wait_until_up(self) -> None:
        wait_for_port(self.port, self.child)
        self.worker_pid = self.request("process")["pid"]

    def send(self, line: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/command", line)
        except OSError as error:
            raise Failure(f"{self.name} has exited: {self.stderr_tail()}") from error
        self.connection = connection

    def receive(self, patience: float = PATIENCE_S) -> dict:
        self.connection.sock.settimeout(patience)
        try:
            response = self.connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{self.name} gave no answer: {self.stderr_tail()}") from error
        finally:
            self.connection.close()
        if response.status != 200:
            raise Failure(f"{self.name} answered {response.status}: {self.stderr_tail()}")
        return json.loads(body)["answer"]

    def stop(self) -> None:
        # Whatever happens to the master, its worker notices that it is gone and exits.
        self.child.terminate()
        self.wait(10)
        self.errors.close()


def limit_lifetime() -> None:
    """Let SIGALRM stop a child process that outlives this program, if this one was killed."""
    signal.alarm(LIFETIME_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for_port(port: int, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and child.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise Failure(f"{child.args[0]} did not open its port")


def events_in(path: Path) -> int:
    """Return how many events were ever stored in the file of a shared log, one after the other."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT position FROM events ORDER BY id").fetchall()
    positions = [position for (position,) in rows]
    if positions != list(range(positions[0], positions[-1] + 1)):
        raise Failure("events are lost or doubled in the file")
    return positions[-1]


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis server in memory."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        child = subprocess.Popen(
            [*command, "--dir", directory],
            stdout=subprocess.DEVNULL,
            preexec_fn=limit_lifetime,  # noqa: PLW1509 - no other thread runs now
        )
        try:
            wait_for_port(port, child)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            child.kill()
            child.wait()


class PageFetcher(threading.Thread):
    """Thread: fetches the site's page every 10 ms, whether the last one has arrived or not.

    A latency is counted from the time at which the request was due, so a request that had to
    wait for anything counts with its wait.
    """

    INTERVAL_S = 0.01
    LIMIT_S = 60

    def __init__(self, port: int, core: int | None) -> None:
        super().__init__(daemon=True)
        self.port, self.core = port, core
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.is_stopping = threading.Event()

    def __enter__(self) -> PageFetcher:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.is_stopping.set()
        self.join(2 * self.LIMIT_S)

    def run(self) -> None:
        if self.core is not None:
            os.sched_setaffinity(0, {self.core})
        asyncio.run(self.fetch_pages())

    async def fetch_pages(self) -> None:
        start, fetches = time.monotonic(), []
        for number in range(int(self.LIMIT_S / self.INTERVAL_S)):
            due = start + number * self.INTERVAL_S
            await asyncio.sleep(due - time.monotonic())
            if self.is_stopping.is_set():
                break
            fetches.append(asyncio.create_task(self.fetch(due)))
        await asyncio.gather(*fetches)

    async def fetch(self, due: float) -> None:
        try:
            page = await asyncio.wait_for(self.get(), self.LIMIT_S)
        except (OSError, TimeoutError, asyncio.TimeoutError) as error:
            self.failures.append(repr(error))
            return
        self.seconds.append(time.monotonic() - due)
        if not page.startswith(b"HTTP/1.1 200 "):
            self.failures.append(page[:60].decode(errors="replace"))

    async def get(self) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return await reader.read(-1)
        finally:
            writer.close()

    def report(self) -> dict:
        if self.failures:
            raise Failure(f"{len(self.failures)} pages failed, the first: {self.failures[0]}")
        ordered = sorted(self.seconds)
        return {
            "pages": len(ordered),
            "page_p50_ms": ordered[len(ordered) // 2] * 1000,
            "page_p99_ms": ordered[len(ordered) * 99 // 100] * 1000,
        }


class Visitors(threading.Thread):
    """Thread: live pages, which imitate client.js with `data-live`.

    A page is opened, subscribes, and learns the server's `spread` from a heartbeat. After an event
    it waits for a random time, up to half a second or the spread, and fetches itself again.
    """

    def __init__(self, port: int, count: int, core: int | None) -> None:
        super().__init__(daemon=True)
        self.port, self.count, self.core = port, count, core
        self.are_ready = threading.Event()
        # Of each page that is subscribed, from its first heartbeat.
        self.spreads: list[float] = []
        # The times at which pages showed the event, of time.monotonic().
        self.refreshed: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        if self.core is not None:
            os.sched_setaffinity(0, {self.core})
        try:
            asyncio.run(asyncio.wait_for(self.visit(), PATIENCE_S))
        except Exception as error:
            self.error = error
        self.are_ready.set()

    async def visit(self) -> None:
        gate = asyncio.Semaphore(20)
        await asyncio.gather(*(self.page(gate) for _ in range(self.count)))

    async def page(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            await self.fetch()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            key = base64.b64encode(os.urandom(16)).decode()
            head = f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\n"
            head += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            writer.write(f"{head}Sec-WebSocket-Version: 13\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            self.send(writer, {"action": "subscribe", "type": "content.*", "contentType": "posts"})
            await self.message(reader, writer, "system.subscribed")
        for _ in range(2):
            # All pages have subscribed before the second one.
            heartbeat = await self.message(reader, writer, "system.heartbeat")
        spread = heartbeat["payload"]["spread"]
        self.spreads.append(spread)
        if len(self.spreads) == self.count:
            self.are_ready.set()
        await self.message(reader, writer, "content.created")
        await asyncio.sleep(random.uniform(0, max(0.5, spread)))
        await self.fetch("X-SwiftCMS-Live: 1\r\n")
        self.refreshed.append(time.monotonic())
        writer.close()

    @staticmethod
    def send(writer: asyncio.StreamWriter, message: dict) -> None:
        data = json.dumps(message).encode()
        # The mask is zero.
        writer.write(bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data)

    async def message(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: str
    ) -> dict:
        """Return the next message of this type. Answer heartbeats meanwhile."""
        while True:
            opcode, length = await reader.readexactly(2)
            if length == 126:
                length = int.from_bytes(await reader.readexactly(2), "big")
            data = await reader.readexactly(length)
            if opcode != 0x81:
                continue
            message = json.loads(data)
            if message["type"] == "system.heartbeat":
                self.send(writer, {"action": "pong"})
            if message["type"] == wanted:
                return message

    async def fetch(self, header: str = "") -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}Connection: close\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.read(-1)
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise Failure(f"a live page was answered with {answer[:60]!r}")


class Session:
    """One server with its clients."""

    def __init__(
        self,
        bench: Bench,
        server: Server,
        *,
        shared_log: Sequence[str] = (),
        heartbeat: float | None = None,
    ) -> None:
        """With a shared log, a second process of the server publishes, and it has no clients.

        shared_log: `--redis URL` or `--database PATH`
        """
        self.bench, self.kind, self.name = bench, server, server.name
        command = [sys.executable, str(HERE / "bench_servers.py"), *server.arguments]
        command += shared_log
        if heartbeat:
            command += ["--heartbeat", str(heartbeat)]
        self.server = self.publisher = Process(command, bench.server_core)
        self.processes = [self.server]
        if shared_log:
            self.publisher = Process(command, bench.server_core)
            self.processes.append(self.publisher)

    def __enter__(self) -> Session:
        try:
            ports = [process.receive()["port"] for process in self.processes]
        except BaseException:
            self.__exit__()
            raise
        self.port = ports[0]
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in reversed(self.processes):
            process.stop()

    def join(self, count: int, *options: str, join: Iterable[str] | None = None) -> Process:
        """Connect clients, and wait until the server has registered them all."""
        path, *more = join or self.kind.join
        command = [*self.bench.client, str(self.port), path, str(count), *more, *options]
        command += self.bench.spin
        client = Process(command, self.bench.client_core)
        self.processes.append(client)
        client.count, client.stuck = count, "--stuck" in options
        client.ready = client.receive(PATIENCE_S + count / 50)
        deadline = time.monotonic() + PATIENCE_S
        while self.server.request("clients") not in (None, count):
            if time.monotonic() > deadline:
                raise Failure(f"{self.name} does not see its {count} clients")
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
        """Publish, and return the checked reports of the server and of the load client."""
        client.request(f"expect {events} {int(limit * 1000)}")
        self.publisher.send(f"{command} {events} {extra}")
        report = client.receive(limit + 5)
        readers = client.count - client.stuck
        if report["order_errors"] or report["bad_frames"]:
            raise Failure(f"{self.name}: events out of order or damaged: {report}")
        if report["complete"] < readers:
            if client.stuck:
                return {"stops": True}
            tail = self.server.stderr_tail()
            raise Failure(f"{self.name}: lost some of {events} events: {report}; server: {tail}")
        if report["most"] != events or report["closed"]:
            raise Failure(f"{self.name}: too many events, or connections lost: {report}")
        if not size * 0.95 <= report["smallest"] <= report["largest"] <= size * 1.05:
            raise Failure(f"{self.name}: messages should have {size} bytes: {report}")
        report |= self.publisher.receive()
        if "start_ns" in report:
            report["seconds"] = (report["last_ns"] - report["start_ns"]) / 1e9
            report["per_second"] = events * readers / report["seconds"]
        # The share of time in which the client's core was busy. If it is near 1, the client was the
        # bottleneck.
        span = report["last_ns"] - report["first_ns"]
        report["client_busy"] = report["busy_ns"] / span if span > 1e6 else 0.0
        return report

    def affordable(self, client: Process, wanted: int, budget: float) -> int:
        """Return how many of the wanted events this server delivers in `budget` seconds."""
        few = 10
        rate = self.publish(client, few)["per_second"]
        return max(few, min(wanted, int(rate * budget / client.count)))

    def alone(self, client: Process, wanted: int, budget: float) -> dict:
        """Publish events one at a time: how long until half of the clients, and the last, have it.

        The first event finds cold caches and is not counted.
        """
        self.publish(client, 1)
        deadline = time.monotonic() + budget
        events: list[dict] = []
        while len(events) < wanted and (time.monotonic() < deadline or len(events) < 3):
            events.append(self.publish(client, 1))
        half, last = (statistics.median(e[key] for e in events) for key in ("p50_ns", "max_ns"))
        return {"half_us": half / 1000, "last_us": last / 1000}


class Deployment(Session):
    """swiftcms_ws under gunicorn, in a small site."""

    def __init__(
        self,
        bench: Bench,
        server: Server,
        options: list[str],
        lookup_s: float = 0.0,
        heartbeat: float | None = None,
    ) -> None:
        self.bench, self.kind, self.name = bench, server, server.name
        app = f"bench_servers:deployed({str(server.checkout)!r}, {lookup_s}, {heartbeat})"
        self.server = self.publisher = Gunicorn(options, app, bench.server_core)
        self.processes = [self.server]

    def __enter__(self) -> Deployment:
        try:
            self.server.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        self.port = self.server.port
        return self


class Poller:
    """Clients that poll a deployment, each every two seconds, one after the other in one thread."""

    INTERVAL_S = 2.0

    def __init__(self, session: Deployment, count: int) -> None:
        self.session = session
        self.last_ids: list[str] = [""] * count

    def poll_for(self, seconds: float, path: str) -> tuple[float, int]:
        """Return the worker's processor time for one request, in ms, and their number."""
        server, count = self.session.server, len(self.last_ids)
        before = server.request("process")["cpu_ns"]
        started = time.monotonic()
        number = 0
        while (due := number * self.INTERVAL_S / count) < seconds:
            time.sleep(max(0.0, started + due - time.monotonic()))
            if path != "/" and number % (count // 2) == 0:
                server.request("burst 1")
            self.fetch(number % count, path)
            number += 1
        return (server.request("process")["cpu_ns"] - before) / 1e6 / number, number

    def fetch(self, client: int, path: str) -> None:
        """Make one request on a connection of its own, and keep the last id of the response."""
        address = ("127.0.0.1", self.session.port)
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            last_id = self.last_ids[client]
            connection.request("GET", path, headers={"Last-Event-ID": last_id} if last_id else {})
            body = connection.getresponse().read().decode()
        if path == "/":
            return
        if '"recovered": true' not in body:
            raise Failure(f"{self.session.name}: a poll has missed events: {body}")
        self.last_ids[client] = body.rpartition("\nid: ")[2].partition("\n")[0]


# --- Measurements: each returns the figures of one round, by server -------------------------------

Figures = dict[str, dict]
# A variant of a measurement: its name in the results, and a function.
Variants = Iterator[tuple[str, Callable[[], Figures]]]
MEASUREMENTS = [
    "ceiling",
    "burst",
    "single",
    "publish",
    "memory",
    "stuck",
    "matching",
    "redis",
    "file",
    "deploy",
    "live",
    "many",
    "idle_cpu",
    "return",
    "http",
    "refresh",
]
# Options of the load client for plain HTTP.
STREAM = ("/ws/events?sub=content.*", "--stream", "--answers", "1")
BURST_COLUMNS = [(200, False), (200, True), (1000, False), (1000, True)]
# The ten patterns of a client that reconnects. Events have the content type of the last one.
CONTENT_TYPES = [*(f"section-{number}" for number in range(9)), "posts"]
ELSEWHERE = '{"action":"subscribe","type":"content.created","contentType":"elsewhere-#"}'


def burst_column(clients: int, deflate: bool) -> str:
    return f"{clients} clients" + (", deflate offered" if deflate else "")


class Bench:
    """The measurements, with sizes for this machine and these options."""

    # Alternating pairs or rounds, and events in each turn of one.
    PAIRS = 10
    STUCK_LIMIT_S = 10
    # Seconds between heartbeats while processor time is measured.
    HEARTBEAT_S = 25
    LOOKUP_S = 0.01

    def __init__(self, client: list[str], servers: list[Server], quick: bool) -> None:
        self.client, self.servers, self.quick = client, servers, quick
        cores = sorted(os.sched_getaffinity(0))
        self.server_core = self.client_core = None
        # On a single core a spinning client would take the server's time.
        self.spin: list[str] = []
        if len(cores) > 1:
            self.server_core, self.client_core = cores[:2]
            self.spin = ["--spin"]
        self.burst_size = 100 if quick else 400
        self.repeats = 3 if quick else 9
        # Seconds for measurements that are repeated as often as there is time.
        self.budget = 1.0 if quick else 3.0
        self.pairs = 3 if quick else self.PAIRS
        self.turn_size = 5 if quick else 30
        self.deploy_count = 300 if quick else 3000

    def plan(self, name: str, round_number: int) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Yield the variants of a measurement: a key for the results, and a function.

        The servers change places in every second round, so that none always comes first.
        """
        servers = self.servers[:: 1 if round_number % 2 else -1]
        for variant, measure in getattr(self, f"{name}_variants")(servers):
            yield f"{name}: {variant}" if variant else name, measure

    def ceiling_variants(self, servers: list[Server]) -> Variants:
        if RAW in servers:
            yield "", self.ceiling

    def burst_variants(self, servers: list[Server]) -> Variants:
        for clients, deflate in BURST_COLUMNS:
            for server in servers:
                yield burst_column(clients, deflate), bind(self.burst, server, clients, deflate)

    def single_variants(self, servers: list[Server]) -> Variants:
        for clients in (200, 1000):
            for server in servers:
                if server != RAW:
                    yield f"{clients} clients", bind(self.single, server, clients)

    def publish_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            if server.has_publish:
                yield "", bind(self.publish, server)

    def memory_variants(self, servers: list[Server]) -> Variants:
        for clients in (200, 1000):
            for server in servers:
                yield f"{clients} clients", bind(self.memory, server, clients)

    def stuck_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            yield "", bind(self.stuck, server)

    def matching_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            if server.checkout:
                yield "", bind(self.matching, server)

    def redis_variants(self, servers: list[Server]) -> Variants:
        if not (shutil.which("redis-server") or shutil.which("valkey-server")):
            print("redis is not measured: there is no redis-server", file=sys.stderr)
            return
        for server in servers:
            if server.checkout:
                yield "one process, no Redis", bind(self.redis, server, "burst", alone=True)
                yield "publish_many", bind(self.redis, server, "burst_many")
            if server.checkout or server.name == "Flask-SocketIO":
                yield "publish", bind(self.redis, server, "burst")

    def file_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            # Version 1.0.0 has Redis only.
            if server.checkout and not server.holds_threads:
                yield "publish_many", bind(self.file, server, "burst_many")
                yield "publish", bind(self.file, server, "burst")
                yield "alone", bind(self.file_alone, server)

    def deploy_variants(self, servers: list[Server]) -> Variants:
        count = self.deploy_count
        workers = {"sync": [], "gthread --threads 2": ["-k", "gthread", "--threads", "2"]}
        for server in servers:
            if server.checkout is None:
                continue
            for parallel, how in ((100, "100 at a time"), (count, "all at once")):
                if server.holds_threads:
                    # The only way in which 1.0.0 can serve as many clients.
                    options = threads_for(server, count)
                    yield f"a thread each, {how}", bind(self.deploy, server, options, parallel)
                    continue
                for name, options in workers.items():
                    yield f"{name}, {how}", bind(self.deploy, server, options, parallel)

    def live_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            if server.checkout and not server.holds_threads:
                yield "", bind(self.live, server)

    def many_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            # The others need one or two threads for each client.
            if server.name == "websockets" or (server.checkout and not server.holds_threads):
                yield "", bind(self.many, server)

    def idle_cpu_variants(self, servers: list[Server]) -> Variants:
        if pinging := [server for server in servers if server.sends_pings]:
            yield "", bind(self.idle_cpu, pinging)

    def return_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            if server.checkout:
                yield "", bind(self.come_back, server)

    def http_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            if server.has_events:
                yield "burst", bind(self.http_burst, server)
                yield "memory", bind(self.http_memory, server)
                yield "poll", bind(self.http_poll, server)

    def refresh_variants(self, servers: list[Server]) -> Variants:
        for server in servers:
            # Version 1.0.0 has no live pages.
            if server.checkout and not server.holds_threads and shutil.which("chromium"):
                yield "", bind(self.refresh, server)

    def burst(self, server: Server, clients: int, deflate: bool) -> Figures:
        with Session(self, server) as session:
            client = session.join(clients, *["--deflate"] * deflate)
            events = session.affordable(client, self.burst_size, self.budget)
            deadline = time.monotonic() + self.budget
            bursts = [session.publish(client, events)]
            while len(bursts) < self.repeats and time.monotonic() < deadline:
                bursts.append(session.publish(client, events))
        rates = [burst["per_second"] for burst in bursts]
        middle = bursts[rates.index(statistics.median_low(rates))]
        wanted = ("per_second", "client_busy", "wire_bytes")
        return {server.name: {"events": events} | {key: middle[key] for key in wanted}}

    def single(self, server: Server, clients: int) -> Figures:
        with Session(self, RAW) as raw, Session(self, server) as session:
            return self.take_turns(raw, raw.join(clients), session, session.join(clients))

    def take_turns(
        self, raw: Session, raw_client: Process, session: Session, client: Process
    ) -> Figures:
        """Publish events one at a time, in turns with the raw loop, which changes places too."""
        pairs = []
        for number in range(self.pairs):
            pair = {}
            turns = [(raw, raw_client), (session, client)]
            for turn, joined in turns if number % 2 else reversed(turns):
                pair[turn.name] = turn.alone(joined, self.turn_size, 0.7)
            pairs.append(pair)
        both = {}
        for name in (raw.name, session.name):
            half, last = ([pair[name][key] for pair in pairs] for key in ("half_us", "last_us"))
            both[name] = {"half_us": statistics.median(half), "last_us": statistics.median(last)}
        for key in ("half", "last"):
            ratios = [p[session.name][f"{key}_us"] / p[raw.name][f"{key}_us"] for p in pairs]
            both[session.name] |= {f"{key}_ratio": statistics.median(ratios)}
            both[session.name] |= {f"{key}_ratios": ratios}
        return both

    def publish(self, server: Server) -> Figures:
        """Measure publish() in two processes in turns, one with 1 and one with 1000 subscribers."""
        counts, costs = (1, 1000), {1: [], 1000: []}
        with Session(self, server) as one, Session(self, server) as many:
            sessions = {1: one, 1000: many}
            clients = {count: sessions[count].join(count) for count in counts}
            calls = many.affordable(clients[1000], 2 * self.burst_size, 1.0)
            deadline = time.monotonic() + 10 * self.budget
            for number in range(self.pairs):
                if number >= 3 and time.monotonic() > deadline:
                    break
                for count in counts if number % 2 else reversed(counts):
                    session, client = sessions[count], clients[count]
                    report = session.publish(client, calls, command="publish_cost")
                    costs[count].append(report["publish_us"])
        figures = {f"us_{count}": statistics.median(costs[count]) for count in counts}
        ratio = figures["us_1000"] / figures["us_1"]
        return {server.name: figures | {"calls": calls, "ratio": ratio}}

    def memory(self, server: Server, clients: int) -> Figures:
        """Measure how much the server's memory grows per client.

        The first few hundred clients of a server that needs little partly use memory that was
        freed after its start. `many` shows the memory of clients to which this does not apply.
        """
        settle_s = 0.5
        with Session(self, server) as session:
            # The first client makes the server import and start everything that one client needs.
            first = session.join(1, "--deflate")
            session.publish(first, 5)
            first.stop()
            time.sleep(settle_s)
            before, threads = session.server.memory_kib(), session.server.threads()
            client = session.join(clients, "--deflate")
            time.sleep(settle_s)
            figures = {
                "idle": (session.server.memory_kib() - before) / clients,
                "threads": (session.server.threads() - threads) / clients,
            }
            # A server that would need minutes for 400 events has no figure for them.
            if session.affordable(client, 400, 40.0) == 400:
                session.publish(client, 390)
                time.sleep(settle_s)
                figures["after_400"] = (session.server.memory_kib() - before) / clients
        with Session(self, server) as session:
            client = session.join(1)
            session.publish(client, 5)
            before = session.server.memory_kib()
            session.publish(client, 400)
            time.sleep(settle_s)
            figures["events_kib"] = session.server.memory_kib() - before
        return {server.name: figures}

    def stuck(self, server: Server) -> Figures:
        """Messages of 4 KiB, 2.4 MB for each client: more than is buffered for one."""
        events, size = 600, 4096
        figures: dict = {}
        for which in ("without", "with"):
            with Session(self, server) as session:
                client = session.join(200, *["--stuck"] * (which == "with"))
                session.server.request(f"resize {size}")
                limit = float(PATIENCE_S)
                if client.stuck:
                    limit = max(self.STUCK_LIMIT_S, 3 * figures["without"])
                report = session.publish(client, events, size=size, limit=limit)
                if "stops" in report:
                    if server.checkout:
                        raise Failure(f"{server.name}: one client stops the others")
                    return {server.name: figures | {"stops": True}}
                figures[which] = report["seconds"]
                if client.stuck:
                    figures["end"] = client.request("stuck")
        return {server.name: figures | {"ratio": figures["with"] / figures["without"]}}

    def matching(self, server: Server) -> Figures:
        """Measure the same server with 10, then 10,000 subscriptions that do not match."""
        events = 5 * self.burst_size
        figures = {}
        with Session(self, server) as session:
            client = session.join(1)
            for others, count, each in ((10, 10, 1), (10_000, 100, 100)):
                joining = ["/ws", "--send", ELSEWHERE, "--repeat", str(each)]
                bystanders = session.join(count, join=[*joining, "--answers", str(1 + each)])
                session.publish(client, 10)
                bursts = [session.publish(client, events)["seconds"] for _ in range(3)]
                figures[f"burst_us_{others}"] = statistics.median(bursts) / events * 1e6
                alone = session.alone(client, self.burst_size // 2, self.budget)
                figures[f"alone_us_{others}"] = alone["half_us"]
                if others == 10:
                    bystanders.stop()
        return {server.name: figures}

    def redis(self, server: Server, command: str, *, alone: bool = False) -> Figures:
        if alone:
            return self.across(server, command, ())
        with redis_server() as url:
            return self.across(server, command, ("--redis", url))

    def file(self, server: Server, command: str) -> Figures:
        with tempfile.TemporaryDirectory() as directory:
            return self.across(server, command, ("--database", f"{directory}/live.sqlite3"))

    def across(self, server: Server, command: str, shared_log: Sequence[str]) -> Figures:
        """Publish in one process for clients of another."""
        with Session(self, server, shared_log=shared_log) as session:
            client = session.join(200)
            session.publish(client, 10)
            bursts = [
                session.publish(client, self.burst_size, command=command)["per_second"]
                for _ in range(self.repeats)
            ]
            figures = session.alone(client, self.burst_size // 2, self.budget)
        return {server.name: {"per_second": statistics.median(bursts)} | figures}

    def file_alone(self, server: Server) -> Figures:
        """Measure publish(), four processes that publish at once, and an idle process."""
        events, idle_s = 10 * self.burst_size, 2 if self.quick else 20
        with contextlib.ExitStack() as stack:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "live.sqlite3"
            shared_log = ("--database", str(path))
            session = stack.enter_context(Session(self, server, shared_log=shared_log))
            session.join(1)
            figures = session.publisher.request(f"publish_cost {events}")
            command = [sys.executable, str(HERE / "bench_servers.py"), *server.arguments]
            # On all cores, as the workers of a site.
            publishers = [Process([*command, *shared_log], None) for _ in range(4)]
            for publisher in publishers:
                stack.callback(publisher.stop)
                publisher.receive()
                publisher.request("burst 1")
            before = events_in(path)
            for publisher in publishers:
                publisher.send(f"burst {events}")
            reports = [publisher.receive() for publisher in publishers]
            stored = events_in(path) - before
            if stored != 4 * events:
                raise Failure(f"{server.name}: {stored} events of {4 * events} are in the file")
            span = max(each["end_ns"] for each in reports) - min(r["start_ns"] for r in reports)
            figures["together"] = 4 * events / span * 1e9
            # The last round of deletions is over by then.
            time.sleep(2)
            figures["file_mib"] = sum(each.stat().st_size for each in path.parent.iterdir()) / 2**20
            start, cpu = time.monotonic(), session.server.request("process")["cpu_ns"]
            time.sleep(idle_s)
            cpu = session.server.request("process")["cpu_ns"] - cpu
            figures["idle_percent"] = cpu / (time.monotonic() - start) / 1e7
        return {server.name: figures}

    def deploy(self, server: Server, options: list[str], parallel: int) -> Figures:
        """Connect clients to gunicorn as fast as it can, and fetch pages meanwhile."""
        count = self.deploy_count
        with Deployment(self, server, options) as session:
            with PageFetcher(session.port, self.client_core) as quiet:
                time.sleep(1)
            threads, memory = session.server.threads(), session.server.memory_kib()
            with PageFetcher(session.port, self.client_core) as busy:
                client = session.join(count, "--parallel", str(parallel))
            connected = session.server.request("status")["connections"]
            if connected != count:
                raise Failure(f"{server.name}: {connected} of {count} clients are connected")
            alone = session.alone(client, self.turn_size, self.budget)
            figures = {
                "clients": count,
                "seconds": client.ready["ready_ns"] / 1e9,
                "more_threads": session.server.threads() - threads,
                "kib": (session.server.memory_kib() - memory) / count,
                "quiet_p99_ms": quiet.report()["page_p99_ms"],
            }
        return {server.name: figures | alone | busy.report()}

    def live(self, server: Server) -> Figures:
        """Publish one event for live pages, and fetch other pages meanwhile; and again."""
        figures: dict[str, float] = {"clients": 50 if self.quick else 200}
        with tempfile.TemporaryDirectory() as directory:
            options = ["--workers", "4", "--env", f"SWIFTCMS_WS_DATABASE={directory}/live.sqlite3"]
            with Deployment(self, server, options, heartbeat=4.0) as session:
                for name in ("first", "later"):
                    figures |= self.one_event(session, int(figures["clients"]), name)
        return {server.name: figures}

    def one_event(self, session: Deployment, count: int, name: str) -> dict[str, float]:
        visitors = Visitors(session.port, count, self.client_core)
        visitors.start()
        visitors.are_ready.wait(PATIENCE_S)
        with PageFetcher(session.port, self.client_core) as pages:
            began = time.monotonic()
            session.server.request("burst 1")
            visitors.join(PATIENCE_S)
        if visitors.error or len(visitors.refreshed) != count:
            shown = len(visitors.refreshed)
            raise Failure(f"{shown} of {count} pages show the event: {visitors.error!r}")
        return {
            f"{name}_spread": statistics.median(visitors.spreads),
            f"{name}_seconds": max(visitors.refreshed) - began,
            f"{name}_p50_ms": pages.report()["page_p50_ms"],
            f"{name}_p99_ms": pages.report()["page_p99_ms"],
        }

    def many(self, server: Server) -> Figures:
        """Measure one event for as many clients as one process can have here."""
        wanted = 1500 if self.quick else 15_000
        # Each client needs a file in its server and one in the load client.
        count = min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 2000)
        with Session(self, RAW) as raw, Session(self, server) as session:
            raw_client = raw.join(count, "--parallel", "16")
            before, threads = session.server.memory_kib(), session.server.threads()
            client = session.join(count, "--parallel", "16")
            both = self.take_turns(raw, raw_client, session, client)
            both[server.name] |= {
                "clients": count,
                "kib": (session.server.memory_kib() - before) / count,
                "more_threads": session.server.threads() - threads,
            }
        return both

    def idle_cpu(self, servers: list[Server]) -> Figures:
        """Measure processor time during two heartbeats, of all servers in the same minute.

        Each server runs twice, with many clients and with one. The difference of their processor
        times is divided by the difference of the pings that their clients answered, which gives
        the cost of one heartbeat of one connection, and that by the seconds between heartbeats.
        With --quick the heartbeats come faster, and the result is scaled to 25 s.
        """
        count = 200 if self.quick else 1000
        interval = 2.5 if self.quick else float(self.HEARTBEAT_S)
        with contextlib.ExitStack() as stack:
            pairs = {}
            for server in servers:
                sessions = []
                for clients in (count, 1):
                    new = Session(self, server, heartbeat=interval)
                    session = stack.enter_context(new)
                    sessions.append((session, session.join(clients)))
                pairs[server.name] = sessions
            time.sleep(1)
            before = {name: self.idle_counts(sessions) for name, sessions in pairs.items()}
            time.sleep(2 * interval)
            after = {name: self.idle_counts(sessions) for name, sessions in pairs.items()}
        found = {}
        for name in pairs:
            cpu_ns, pings = (after[name][n] - before[name][n] for n in (0, 1))
            if pings < 1.5 * count:
                raise Failure(f"{name}: {pings} pings for {count} clients in two heartbeats")
            per_second = cpu_ns / 1000 / pings / self.HEARTBEAT_S
            found[name] = {"us_per_second": per_second, "pings": pings, "cpu_ms": cpu_ns / 1e6}
        return found

    @staticmethod
    def idle_counts(sessions: list[tuple[Session, Process]]) -> tuple[int, int]:
        """Return how much more the server with many clients has worked, and been answered."""
        (many, many_client), (one, one_client) = sessions
        cpu = many.server.request("process")["cpu_ns"] - one.server.request("process")["cpu_ns"]
        return cpu, many_client.request("pings")["pings"] - one_client.request("pings")["pings"]

    def come_back(self, server: Server) -> Figures:
        """Reconnect clients with ten patterns each, all at once, to a site with a slow hook."""
        count = 100 if self.quick else 1000
        options = threads_for(server, count)
        with Deployment(self, server, options, self.LOOKUP_S) as session:
            session.server.request("burst 5")
            since = session.server.request("status")["last_id"]
            messages = self.resume_messages(server, since)
            sends = [part for message in messages for part in ("--send", json.dumps(message))]
            joining = ["/ws", *sends, "--answers", str(1 + len(messages))]
            client = session.join(count, "--parallel", str(count), join=joining)
            status = session.server.request("status")
            if status["subscriptions"] != count * len(CONTENT_TYPES):
                raise Failure(f"{server.name}: {count} clients with ten patterns: {status}")
            # Proves that the clients are subscribed to the last of their patterns.
            session.publish(client, 1)
        keys = {"seconds": "ready_ns", "half_seconds": "p50_ns"}
        return {server.name: {key: client.ready[name] / 1e9 for key, name in keys.items()}}

    @staticmethod
    def resume_messages(server: Server, since: str) -> list[dict]:
        subscriptions = [{"type": "content.*", "contentType": each} for each in CONTENT_TYPES]
        if server.holds_threads:
            # 1.0.0 has no `subscriptions`: it takes one message for each.
            return [{"action": "subscribe", "since": since, **each} for each in subscriptions]
        return [{"action": "subscribe", "since": since, "subscriptions": subscriptions}]

    def http_burst(self, server: Server) -> Figures:
        """Measure bursts to 200 streams and to 200 WebSockets of another process, in turns."""
        rates: dict[str, list[float]] = {"websocket": [], "stream": []}
        with Session(self, server) as one, Session(self, server) as other:
            turns = [("websocket", one, one.join(200))]
            turns.append(("stream", other, other.join(200, join=STREAM)))
            for _, session, client in turns:
                session.publish(client, 10)
            for number in range(self.repeats):
                for name, session, client in turns[:: 1 if number % 2 else -1]:
                    rates[name].append(session.publish(client, self.burst_size)["per_second"])
        figures = {name: statistics.median(each) for name, each in rates.items()}
        return {server.name: figures | {"ratio": figures["stream"] / figures["websocket"]}}

    def http_memory(self, server: Server) -> Figures:
        found = {}
        for name, join in (("websocket", server.join), ("stream", STREAM)):
            joined = dataclasses.replace(server, join=join)
            figures = self.memory(joined, 200 if self.quick else 1000)[server.name]
            found |= {f"{name}_{key}": figures[key] for key in ("idle", "after_400")}
        return {server.name: found}

    def http_poll(self, server: Server) -> Figures:
        """Measure a sync worker that 200 clients poll every two seconds; an event each second.

        The same number of requests for a plain page shows the part of gunicorn and Flask.
        """
        seconds = 4 if self.quick else 20
        with Deployment(self, server, []) as session:
            poller, path = Poller(session, 200), f"{STREAM[0]}&mode=poll"
            poller.poll_for(2, path)
            poll_ms, polls = poller.poll_for(seconds, path)
            page_ms, _ = poller.poll_for(seconds / 4, "/")
        return {server.name: {"poll_ms": poll_ms, "polls": polls, "page_ms": page_ms}}

    def refresh(self, server: Server) -> Figures:
        """Change one row of a live page of 1,000 rows, and measure how long its scripts run."""
        command = [sys.executable, str(HERE / "bench_page.py"), str(server.checkout)]
        page = Process([*command, "10" if self.quick else "50"], None)
        try:
            return {server.name: page.receive(2 * PATIENCE_S)}
        finally:
            page.stop()

    def ceiling(self) -> Figures:
        with Session(self, RAW) as session:
            client = session.join(200)
            report = session.publish(client, 64 * self.burst_size // 4, extra="64")
        return {RAW.name: {key: report[key] for key in ("per_second", "client_busy")}}


def threads_for(server: Server, clients: int) -> list[str]:
    """Return the options with which gunicorn can serve so many WebSockets."""
    if not server.holds_threads:
        return []
    limits = ["--threads", str(clients + 100), "--worker-connections", str(clients + 1000)]
    return ["-k", "gthread", *limits]


def bind(function: Callable[..., Figures], *arguments, **options) -> Callable[[], Figures]:
    return lambda: function(*arguments, **options)


# --- Disturbances by other processes --------------------------------------------------------------

# If other processes take more than this share of a core, a measurement is repeated.
DISTURBED = 0.15
# The most attempts of a measurement, and the longest wait for a calm machine before another one.
ATTEMPTS, CALM_WAIT_S = 3, 20


def other_processes_s() -> float:
    """Return the processor time of everything but this program and its children that exited."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    # user, nice, system, irq, softirq (which includes sending over loopback), steal; not idle.
    everything = sum(int(ticks[place]) for place in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everything - sum(use.ru_utime + use.ru_stime for use in uses)


def watched(measure: Callable[[], Figures]) -> tuple[float, Figures]:
    """Measure, and return how much of a core other processes had meanwhile."""
    started, before = time.monotonic(), other_processes_s()
    figures = measure()
    share = (other_processes_s() - before) / (time.monotonic() - started)
    return max(0.0, share), figures


def undisturbed(measure: Callable[[], Figures], attempts: int) -> Figures:
    """Measure again if other processes used much of a core. The calmest attempt counts."""

    def wait_a_second() -> Figures:
        time.sleep(1)
        return {}

    results = [watched(measure)]
    while results[-1][0] > DISTURBED and len(results) < attempts:
        calm_by = time.monotonic() + CALM_WAIT_S
        while time.monotonic() < calm_by and watched(wait_a_second)[0] > DISTURBED:
            pass
        results.append(watched(measure))
    share, figures = min(results, key=lambda result: result[0])
    return {name: each | {"others": share} for name, each in figures.items()}


# --- Results --------------------------------------------------------------------------------------


class Results:
    """The figures of this and of earlier runs: by measurement, by server, one dict per round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        document = json.loads(path.read_text()) if path.exists() else {}
        self.figures: dict[str, dict[str, list[dict]]] = document.get("figures", {})
        # How each measurement was made: machine, client, date, rounds.
        self.runs: dict[str, dict] = document.get("runs", {})

    def forget(self, measurements: Iterable[str]) -> None:
        for key in list(self.figures):
            if name_of(key) in measurements:
                del self.figures[key]
        for name in measurements:
            self.runs.pop(name, None)

    def add(self, key: str, figures: Figures, round_number: int) -> None:
        for name, each in figures.items():
            rounds = self.figures.setdefault(key, {}).setdefault(name, [])
            rounds.append(each | {"round": round_number})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {"runs": self.runs, "figures": self.figures}
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    def values(self, key: str, server: str, field: str) -> list[float]:
        rounds = self.figures.get(key, {}).get(server, [])
        return [each[field] for each in rounds if field in each]

    def ratios(self, key: str, server: str, other: str, field: str) -> list[float]:
        """Return each round's figure divided by the other server's of the same round."""
        base = {each["round"]: each for each in self.figures.get(key, {}).get(other, [])}
        return [
            each[field] / base[each["round"]][field]
            for each in self.figures.get(key, {}).get(server, [])
            if field in each and field in base.get(each["round"], {})
        ]

    def servers(self) -> list[str]:
        """Return the names of all servers, ours and its older version first."""
        names = {name for servers in self.figures.values() for name in servers}
        order = [RAW.name, OURS, *sorted(n for n in names if n.startswith(f"{OURS} "))]
        order += [peer.name for peer in PEERS]
        return [name for name in order if name in names]

    def older(self) -> str | None:
        """Return the name of the version that this one is compared with."""
        return next((name for name in self.servers() if name.startswith(f"{OURS} ")), None)


def name_of(key: str) -> str:
    return key.partition(":")[0]


NOTHING = "–"


def spread(values: list[float], form: str = "{:,.0f}") -> str:
    """Return the median and (least..most)."""
    if not values:
        return NOTHING
    text = form.format(statistics.median(values))
    if len(values) > 1:
        text += f" ({form.format(min(values))}..{form.format(max(values))})"
    return text


Cell = Callable[[Results, str], str]


def cell(key: str, field: str, form: str = "{:,.0f}") -> Cell:
    """Return a function that prints one figure of one server."""
    return lambda results, name: spread(results.values(key, name, field), form)


def share_of_raw(key: str, field: str) -> Cell:
    return lambda results, name: spread(results.ratios(key, name, RAW.name, field), "{:.2f}")


def stuck_time(results: Results, name: str) -> str:
    if any(each.get("stops") for each in results.figures.get("stuck", {}).get(name, [])):
        return "stops"
    return spread(results.values("stuck", name, "with"), "{:.2f}")


def stuck_outcome(results: Results, name: str) -> str:
    ends = results.values("stuck", name, "end")
    return ", ".join(sorted({f"{e['end']} {e['code'] or ''}".strip() for e in ends})) or NOTHING


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_server(results: Results, title: str, columns: dict[str, Cell]) -> Iterator[str]:
    """Yield a table with a row for each server that has figures."""
    names, cells = results.servers(), columns.values()
    rows = [[name, *(each(results, name) for each in cells)] for name in names]
    if rows := [row for row in rows if set(row[1:]) != {NOTHING}]:
        yield table(title, ["server", *columns], rows)


def by_variant(results: Results, measurement: str, title: str, fields: dict) -> Iterator[str]:
    """Yield a table with a row for each variant of a measurement and each server."""
    rows = []
    for key in results.figures:
        name, _, variant = key.partition(": ")
        if name != measurement:
            continue
        for server in results.servers():
            row = [f"{server}{', ' if variant else ''}{variant}"]
            row += [cell(key, *field)(results, server) for field in fields.values()]
            if set(row[1:]) != {NOTHING}:
                rows.append(row)
    if rows:
        yield table(title, ["server", *fields], rows)


TWO, WHOLE = "{:.2f}", "{:,.0f}"
# A figure that issue 22 sets as a goal, the goal, and the names of the figures in the results.
GOALS: list[tuple[str, str, list[tuple[str, str, str]]]] = [
    *(
        (
            f"{clients} clients: KiB per connection idle, after 400 events; threads per connection",
            "≤ 7; ≤ 7; 0",
            [
                (f"memory: {clients} clients", key, "{:.1f}")
                for key in ("idle", "after_400", "threads")
            ],
        )
        for clients in (200, 1000)
    ),
    *(
        (
            f"3,000 clients connect to gunicorn, {worker}, {how}: more threads; p99 of pages, ms",
            "≤ 16; < 500",
            [(f"deploy: {worker}, {how}", key, WHOLE) for key in ("more_threads", "page_p99_ms")],
        )
        for worker in ("sync", "gthread --threads 2")
        for how in ("100 at a time", "all at once")
    ),
    (
        "200 live pages, four sync workers, one event: p99 of other pages, ms; of a later event",
        "< 500",
        [("live", "first_p99_ms", WHOLE), ("live", "later_p99_ms", WHOLE)],
    ),
    (
        "15,000 clients, one event: until half have it, raw loop = 1",
        "≤ 1.2",
        [("many", "half_ratio", TWO)],
    ),
    *(
        (
            f"{clients} clients, one event: until half have it, raw loop = 1",
            "≤ 1.2",
            [(f"single: {clients} clients", "half_ratio", TWO)],
        )
        for clients in (200, 1000)
    ),
    (
        "publish(): µs with 1 subscriber; with 1000; ratio",
        "≤ 30; ≤ 30; ≤ 1.25",
        [("publish", key, TWO) for key in ("us_1", "us_1000", "ratio")],
    ),
    (
        "µs of processor time a second for an idle connection",
        "≤ 3",
        [("idle_cpu", "us_per_second", TWO)],
    ),
    (
        "seconds until 1,000 clients with 10 patterns each are back",
        "≤ 4",
        [("return", "seconds", TWO)],
    ),
    (
        "burst over 200 streams of plain HTTP: share of the WebSocket's deliveries",
        "≥ 0.5",
        [("http: burst", "ratio", TWO)],
    ),
    (
        "KiB per stream idle, after 400 events; the same of a WebSocket",
        "no more",
        [
            ("http: memory", f"{name}_{key}", "{:.1f}")
            for name in ("stream", "websocket")
            for key in ("idle", "after_400")
        ],
    ),
    (
        "ms of processor time for a poll, 200 clients every 2 s; for a plain page",
        "≤ 1",
        [("http: poll", "poll_ms", TWO), ("http: poll", "page_ms", TWO)],
    ),
    (
        "ms of scripts for a refresh of 1,000 rows, of which one changes (issue 26)",
        "≤ 50",
        [("refresh", "script_ms", WHOLE)],
    ),
]


def goals(results: Results) -> Iterator[str]:
    rows = []
    for figure, goal, places in GOALS:
        cells = [spread(results.values(key, OURS, field), form) for key, field, form in places]
        if set(cells) != {NOTHING}:
            rows.append([figure, goal, "; ".join(cells)])
    if rows:
        yield table(f"Goals of issues 22 and 28, and {OURS}", ["figure", "goal", "measured"], rows)


MORE_IS_BETTER, LESS_IS_BETTER = 1, -1
# A figure to compare with an older version, its place in the results, and its direction.
COMPARED: list[tuple[str, str, str, int]] = [
    *(
        (f"burst, {column}: deliveries a second", f"burst: {column}", "per_second", MORE_IS_BETTER)
        for column in (burst_column(*each) for each in BURST_COLUMNS)
    ),
    ("stuck: seconds with one client that never reads", "stuck", "with", LESS_IS_BETTER),
    *(
        (f"matching, {kind}: µs an event beside {label} others", "matching", key, LESS_IS_BETTER)
        for kind in ("burst", "alone")
        for label, key in (("10", f"{kind}_us_10"), ("10,000", f"{kind}_us_10000"))
    ),
    *(
        row
        for way in ("one process, no Redis", "publish", "publish_many")
        for row in (
            (f"redis, {way}: deliveries a second", f"redis: {way}", "per_second", MORE_IS_BETTER),
            (f"redis, {way}: µs until half have one", f"redis: {way}", "half_us", LESS_IS_BETTER),
        )
    ),
]


def compared(results: Results) -> Iterator[str]:
    """Yield the table that compares this version with an older one."""
    older = results.older()
    if older is None:
        return
    rows = []
    for figure, key, field, direction in COMPARED:
        mine, theirs = (results.values(key, name, field) for name in (OURS, older))
        rounds = [each**direction for each in results.ratios(key, OURS, older, field)]
        if not rounds:
            continue
        medians = statistics.median(theirs), statistics.median(mine)
        form = "{:,.2f}" if medians[0] < 100 else WHOLE
        ratio = f"{(medians[1] / medians[0]) ** direction:.2f}"
        span = f"{min(rounds):.2f}..{max(rounds):.2f}"
        rows.append([figure, *(form.format(median) for median in medians), ratio, span])
    if rows:
        head = ["figure", older, OURS, "ratio of medians", "ratios of rounds"]
        yield table(f"{OURS} beside {older}, in turns (ratio: more is better)", head, rows)


def all_tables(results: Results) -> Iterator[str]:
    plain = [burst_column(*each) for each in BURST_COLUMNS if not each[1]]
    columns = [burst_column(*each) for each in BURST_COLUMNS]
    yield from goals(results)
    yield from compared(results)
    yield from by_server(
        results,
        "burst: deliveries a second, raw loop = 1",
        {column: share_of_raw(f"burst: {column}", "per_second") for column in columns},
    )
    yield from by_server(
        results,
        "burst: deliveries a second",
        {column: cell(f"burst: {column}", "per_second") for column in columns},
    )
    single = {}
    for column in plain:
        key = f"single: {column}"
        single[f"{column}: half"] = cell(key, "half_us")
        single[f"{column}: half, raw loop = 1"] = cell(key, "half_ratio", "{:.2f}")
        single[f"{column}: last"] = cell(key, "last_us")
        single[f"{column}: last, raw loop = 1"] = cell(key, "last_ratio", "{:.2f}")
    title = "single: µs until half of the clients, and the last, have one event"
    yield from by_server(results, title, single)
    fields = {
        "clients": ("clients",),
        "half": ("half_us",),
        "half, raw loop = 1": ("half_ratio", "{:.2f}"),
        "last": ("last_us",),
        "last, raw loop = 1": ("last_ratio", "{:.2f}"),
        "KiB a client": ("kib", "{:.1f}"),
        "more threads": ("more_threads",),
    }
    title = "many: µs until half of the clients, and the last, have one event"
    yield from by_variant(results, "many", title, fields)
    fields = {
        "1 subscriber": ("us_1", "{:,.1f}"),
        "1000 subscribers": ("us_1000", "{:,.1f}"),
        "ratio": ("ratio", "{:,.2f}"),
        "calls": ("calls",),
    }
    title = "publish: µs for one publish(), back to back, median of the calls"
    yield from by_variant(results, "publish", title, fields)
    fields = {
        "idle": ("idle", "{:.1f}"),
        "after 400 events": ("after_400", "{:.1f}"),
        "400 events, in all": ("events_kib",),
        "threads a client": ("threads", "{:.2f}"),
    }
    title = "memory: KiB per client, deflate offered"
    yield from by_variant(results, "memory", title, fields)
    yield from by_server(
        results,
        "stuck: seconds until the others of 200 clients have 600 events of 4 KiB",
        {
            "all read": cell("stuck", "without", "{:.2f}"),
            "one does not": stuck_time,
            "ratio": cell("stuck", "ratio", "{:.2f}"),
            "how the server closed that one": stuck_outcome,
        },
    )
    yield from by_server(
        results,
        "matching: µs an event for 1 subscriber, beside subscriptions to something else",
        {
            f"{kind}, {label} others": cell("matching", f"{kind}_us_{others}", "{:.1f}")
            for kind in ("burst", "alone")
            for others, label in ((10, "10"), (10_000, "10,000"))
        },
    )
    fields = {
        "burst, deliveries a second": ("per_second",),
        "one event: µs until half have it": ("half_us",),
        "until the last has it": ("last_us",),
    }
    for name in ("redis", "file"):
        title = f"{name}: 200 clients of another process than the one that publishes"
        yield from by_variant(results, name, title, fields)
    fields = {
        "publish(), µs": ("publish_us", "{:.0f}"),
        "four processes at once: events a second": ("together",),
        "MiB on the disk afterwards": ("file_mib", "{:.1f}"),
        "idle: % of a core": ("idle_percent", "{:.2f}"),
    }
    yield from by_server(
        results,
        "file: without other clients",
        {name: cell("file: alone", *field) for name, field in fields.items()},
    )
    fields = {
        "clients": ("clients",),
        "s until connected": ("seconds", "{:.2f}"),
        "more threads": ("more_threads",),
        "KiB a client": ("kib", "{:.1f}"),
        "pages: p50 ms": ("page_p50_ms", "{:,.1f}"),
        "p99 ms": ("page_p99_ms", "{:,.1f}"),
        "p99 ms before": ("quiet_p99_ms", "{:,.1f}"),
        "one event: µs until half have it": ("half_us",),
    }
    title = "deploy: clients connect to one gunicorn worker while pages are fetched"
    yield from by_variant(results, "deploy", title, fields)
    fields = {
        f"{name} event: {label}": (f"{name}_{key}", form)
        for name in ("first", "later")
        for label, key, form in (
            ("`spread`, s", "spread", "{:.1f}"),
            ("s until all pages show it", "seconds", "{:.1f}"),
            ("other pages: p50 ms", "p50_ms", "{:.0f}"),
            ("p99 ms", "p99_ms", "{:.0f}"),
        )
    }
    title = "live: 200 live pages, of 20 ms each, on four sync workers with an SQLite file"
    yield from by_variant(results, "live", title, fields)
    fields = {
        "µs a second": ("us_per_second", "{:.2f}"),
        "pings answered": ("pings",),
        "processor time for them, ms": ("cpu_ms",),
    }
    title = "idle_cpu: processor time of a connection that only answers pings"
    yield from by_variant(results, "idle_cpu", title, fields)
    fields = {
        "all have their answer": ("seconds", "{:.2f}"),
        "half have it": ("half_seconds", "{:.2f}"),
    }
    title = "return: seconds after which clients that reconnect have their answer"
    yield from by_variant(results, "return", title, fields)
    fields = {"median": ("script_ms", "{:.1f}"), "most": ("most_ms", "{:.1f}")}
    title = "refresh: ms in which client.js changes one of 1,000 rows of a live page"
    yield from by_variant(results, "refresh", title, fields)


def ceiling_line(results: Results) -> str:
    bursts = [
        (figures["per_second"], server, key, figures["client_busy"])
        for key, servers in results.figures.items()
        if name_of(key) == "burst"
        for server, rounds in servers.items()
        for figures in rounds
    ]
    ceiling = results.values("ceiling", RAW.name, "per_second")
    if not bursts or not ceiling:
        return "The ceiling of the load client was not measured."
    rate, name, key, busy = max(bursts)
    busy_then = spread(results.values("ceiling", RAW.name, "client_busy"), "{:.0%}")
    return (
        f"Ceiling of the load client: it counted {spread(ceiling)} events a second, sent 64 in a "
        f"call to 200 clients, while its core was {busy_then} busy. The most that any server "
        f"delivered: {rate:,.0f} ({name}, {key}), while its core was {busy:.0%} busy."
    )


def others_line(results: Results) -> str:
    shares = [
        figures["others"]
        for servers in results.figures.values()
        for rounds in servers.values()
        for figures in rounds
    ]
    return (
        f"Other processes had {statistics.median(shares):.0%} of a core during the median "
        f"measurement, {max(shares):.0%} during the worst. Above {DISTURBED:.0%} a measurement was "
        f"repeated, up to {ATTEMPTS} times in all, and the calmest one counts."
    )


def run_lines(results: Results) -> Iterator[str]:
    """Yield how the measurements were made, one line for each run."""
    grouped: dict[str, list[str]] = {}
    for name, run in results.runs.items():
        about = f"{run['date']}, rounds: {run['rounds']}"
        if run["quick"]:
            about += ", SMALL SIZES (--quick), fewer clients than the tables say"
        about += f". {run['machine']}. Load client: {run['client']}"
        grouped.setdefault(about, []).append(name)
    for about, names in grouped.items():
        yield f"- {', '.join(names)}: {about}."


def markdown(results: Results) -> str:
    if not results.figures:
        return "There are no figures yet."
    header = "Medians of the rounds, and (least..most).\n\n" + "\n".join(run_lines(results))
    footer = f"{ceiling_line(results)}\n\n{others_line(results)}"
    return "\n\n".join([header, *all_tables(results), footer])


def write_benchmark_md(text: str) -> None:
    """Replace the text between the markers of BENCHMARK.md."""
    page = BENCHMARK_MD.read_text(encoding="utf-8")
    begin, end = MARKERS
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        sys.exit(f"{BENCHMARK_MD} has no {begin} and {end}")
    page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    BENCHMARK_MD.write_text(page, encoding="utf-8")


# --- The run --------------------------------------------------------------------------------------


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in [*PACKAGES, "werkzeug"])
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}; "
        f"Python {platform.python_version()}, {versions}"
    )


def choose(parser: argparse.ArgumentParser, wanted: str, names: list[str]) -> list[str]:
    """Return the names of a comma-separated list, in their usual order."""
    chosen = wanted.split(",") if wanted else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    return [name for name in names if name in chosen]


def all_servers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Server]:
    ours = [swiftcms_ws(HERE.parent, OURS)]
    if options.against:
        checkout = options.against.resolve()
        if not (checkout / "swiftcms_ws.py").exists():
            parser.error(f"there is no swiftcms_ws.py in {checkout}")
        ours.append(swiftcms_ws(checkout, f"{OURS} {version_in(checkout)}"))
    # Ours stands beside the raw loop with which it is compared.
    servers = [RAW, *ours, *PEERS]
    names = [server.name for server in servers]
    chosen = choose(parser, options.only, names)
    if options.against and ours[1].name not in chosen:
        chosen.append(ours[1].name)
    return [server for server in servers if server.name in chosen]


def run(bench: Bench, names: list[str], rounds: int, results: Results, about: dict) -> list[str]:
    """Make the measurements, and return the failures."""
    failures: list[str] = []
    attempts = 1 if bench.quick else ATTEMPTS
    results.forget(names)
    for number in range(1, rounds + 1):
        for key, measure in [each for name in names for each in bench.plan(name, number)]:
            try:
                figures = undisturbed(measure, attempts)
            except Failure as failure:
                failures.append(f"round {number}, {key}: {failure}")
                print("FAILED:", failures[-1], file=sys.stderr)
                continue
            results.add(key, figures, number)
            print(f"round {number}, {key}: {figures}", file=sys.stderr)
        for name in names:
            results.runs[name] = about | {"rounds": number}
        results.save()
    return failures


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=0, help="default 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code")
    parser.add_argument("--only", default="", help="names of servers, with commas")
    parser.add_argument("--measure", default="", help="names of measurements, with commas")
    parser.add_argument("--against", type=Path, help="directory of another swiftcms_ws.py")
    parser.add_argument("--json", type=Path, help="the file of results")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--write", action="store_true", help="put the tables into BENCHMARK.md")
    return parser, parser.parse_args()


def main() -> int:
    parser, options = parse_arguments()
    servers = all_servers(parser, options)
    names = choose(parser, options.measure, MEASUREMENTS)
    enter_environment()
    # Raises SystemExit, which stops the child processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    quick_json = cache_directory() / "quick.json"
    results = Results(options.json or (quick_json if options.quick else DEFAULT_JSON))
    failures: list[str] = []
    if not options.report:
        with tempfile.TemporaryDirectory() as directory:
            client, description = build_client(Path(directory))
            bench = Bench(client, servers, options.quick)

            about = {"machine": machine(), "client": description}
            about |= {"date": time.strftime("%Y-%m-%d"), "quick": options.quick}
            rounds = options.rounds or (1 if options.quick else 3)
            failures = run(bench, names, rounds, results, about)
    text = markdown(results)
    print(text)
    if options.write and any(each["quick"] for each in results.runs.values()):
        failures.append("figures of a quick run do not belong into BENCHMARK.md")
    elif options.write:
        write_benchmark_md(text)
    for failure in failures:
        print(f"\nFAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
