"""The servers that bench.py compares, each in a process of its own.

    bench_servers.py NAME [--checkout DIR] [--redis URL] [--database PATH] [--heartbeat SECONDS]

A server prints {"port": …}. Then it reads commands from standard input, one per line, and answers
each with one line of JSON:

    clients              number of connected clients (null if the server does not know it)
    resize BYTES         length of all messages from now on
    burst EVENTS         publish them as fast as possible; returns the times of start and end
    burst_many EVENTS    the same in one call, if the server has such a call
    publish_cost CALLS   the same as burst, with a stopwatch around each call
    process              process id, and the processor time that it has used
    status               number of connections and subscriptions, and the newest event's id
    exit

Every message has the same length for all servers. It carries `seq`, one more than the message
before, and `sent_ns`, the time of its publication. The load client reads only these two.

Under gunicorn the application is `bench_servers:deployed(…)`. It has an ordinary page at `/`, and
executes the same commands as body of `POST /command`.
"""

# Each server imports only its own packages, because its memory is measured.
# ruff: noqa: PLC0415

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# A server must not outlive a bench.py that was killed.
LIFETIME_S = 600
# All numbers have six digits, so that all messages are equally long.
FIRST_SEQ = 100_000
WORDS = ["the", "of", "an", "editor", "saves", "draft", "posts", "while", "readers", "watch"]
# Longer than deflate's window of 32 KiB. Otherwise compression would only point at the last event.
PROSE = " ".join(random.Random(1).choices(WORDS, k=16_000))
PAGE = """<!doctype html><title>{{ title }}</title><h1>{{ title }}</h1>
<ul>{% for post in posts %}<li><a href="/posts/{{ post }}">Post {{ post }}</a>{% endfor %}</ul>"""


def envelope(payload: dict) -> str:
    """Return the message of the servers that leave its form to the application."""
    return json.dumps({"type": "content.created", "contentType": "posts", "payload": payload})


class Server:
    """Common part: commands and messages. A subclass opens a port and publishes in its own way."""

    port: int

    def __init__(self, message: Callable[[dict], str] = envelope) -> None:
        self.message = message
        self.sequence = itertools.count(FIRST_SEQ)
        self.resize(300)

    def execute(self, line: str) -> dict | int | None:
        """Execute one command and return its answer."""
        command, *numbers = line.split()
        return getattr(self, command)(*map(int, numbers))

    def resize(self, size: int) -> None:
        """Make all messages from now on `size` bytes long."""
        bare = {"seq": FIRST_SEQ, "sent_ns": time.monotonic_ns(), "text": ""}
        self.text_length = size - len(self.message(bare))

    def payload(self) -> dict:
        seq = next(self.sequence)
        start = seq * 307 % (len(PROSE) - self.text_length)
        text = PROSE[start : start + self.text_length]
        return {"seq": seq, "sent_ns": time.monotonic_ns(), "text": text}

    def clients(self) -> int | None:
        return None

    def process(self) -> dict:
        return {"pid": os.getpid(), "cpu_ns": time.process_time_ns()}

    def publish(self, payload: dict) -> None:
        raise NotImplementedError

    def burst(self, events: int) -> dict:
        start = time.monotonic_ns()
        for _ in range(events):
            self.publish(self.payload())
        return {"start_ns": start, "end_ns": time.monotonic_ns()}

    def publish_cost(self, calls: int) -> dict:
        costs = []
        for _ in range(calls):
            payload = self.payload()
            start = time.perf_counter_ns()
            self.publish(payload)
            costs.append(time.perf_counter_ns() - start)
        return {"publish_us": statistics.median(costs) / 1000, "publish_max_us": max(costs) / 1000}


class RawPython(Server):
    """The reference: one prebuilt frame, one system call for each client, no protocol work."""

    def __init__(self, _options: argparse.Namespace) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.socks: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(4096)
            key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
            digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            sock.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
            )
            self.socks.append(sock)

    def clients(self) -> int:
        """Remove the clients that have disconnected, and return the number of the others."""
        for sock in list(self.socks):
            with contextlib.suppress(BlockingIOError):
                if not sock.recv(4096, socket.MSG_DONTWAIT):
                    self.socks.remove(sock)
        return len(self.socks)

    def frame(self) -> bytes:
        text = self.message(self.payload()).encode()
        return bytes((0x81, 126)) + len(text).to_bytes(2, "big") + text

    def burst(self, events: int, batch: int = 1) -> dict:
        """Send `batch` frames per call. More than one is for the load client's ceiling."""
        chunks = [b"".join(self.frame() for _ in range(batch)) for _ in range(events // batch)]
        socks = self.socks
        start = time.monotonic_ns()
        for chunk in chunks:
            size = len(chunk)
            for sock in socks:
                try:
                    sent = sock.send(chunk, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                if sent < size:
                    self.finish(sock, chunk[sent:])
        return {"start_ns": start}

    @staticmethod
    def finish(sock: socket.socket, rest: bytes) -> None:
        writable = select.poll()
        writable.register(sock, select.POLLOUT)
        while rest:
            writable.poll()
            rest = rest[sock.send(rest, socket.MSG_DONTWAIT) :]


def serve_wsgi(app: Callable) -> int:
    """Start Werkzeug's threaded server for an application, and return its port."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


class FlaskSock(Server):
    """flask-sock as in its tutorials: a set of clients, and a loop in the publishing thread."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        from flask import Flask
        from flask_sock import Sock

        app = Flask(__name__)
        if options.heartbeat:
            app.config["SOCK_SERVER_OPTIONS"] = {"ping_interval": options.heartbeat}
        self.sockets: set = set()

        @Sock(app).route("/ws")
        def watch(ws) -> None:
            self.sockets.add(ws)
            try:
                while True:
                    ws.receive()
            finally:
                self.sockets.discard(ws)

        self.port = serve_wsgi(app)

    def clients(self) -> int:
        return len(self.sockets)

    def publish(self, payload: dict) -> None:
        message = self.message(payload)
        for ws in self.sockets:
            ws.send(message)


class FlaskSocketIO(Server):
    """Flask-SocketIO with threads, and with its WebSocket transport only."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(self.packet)
        from flask import Flask
        from flask_socketio import SocketIO

        app = Flask(__name__)
        # If this is the default of 20 s, it disconnects its clients, because a thousand threads
        # delay their pongs.
        settings = {"async_mode": "threading", "transports": ["websocket"], "ping_timeout": 120}
        self.io = SocketIO(app, message_queue=options.redis, **settings)
        self.port = serve_wsgi(app)

    @staticmethod
    def packet(payload: dict) -> str:
        """Return the message as it will be sent, to compute its length."""
        return "42" + json.dumps(["content.created", payload], separators=(",", ":"))

    def publish(self, payload: dict) -> None:
        self.io.emit("content.created", payload)


class Websockets(Server):
    """The asyncio server of websockets and its broadcast()."""

    HIGH_WATER = 64 * 1024

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.connections: set = set()
        self.settings = {"ping_interval": options.heartbeat} if options.heartbeat else {}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = self.run(self.open())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def open(self) -> int:
        from websockets.asyncio.server import serve

        self.server = await serve(self.watch, "127.0.0.1", 0, **self.settings)
        return self.server.sockets[0].getsockname()[1]

    async def watch(self, connection) -> None:
        self.connections.add(connection)
        try:
            await connection.wait_closed()
        finally:
            self.connections.discard(connection)

    def clients(self) -> int:
        return len(self.connections)

    def burst(self, events: int) -> dict:
        return self.run(self.burst_in_loop(events))

    async def burst_in_loop(self, events: int) -> dict:
        from websockets.asyncio.server import broadcast

        start = time.monotonic_ns()
        for number in range(1, events + 1):
            broadcast(self.connections, self.message(self.payload()))
            await asyncio.sleep(0)
            # If this scan of all clients ran for each event, it would dominate the measurement.
            if number % 16 == 0:
                # One client may be stuck. broadcast() promises to continue without it.
                while self.clients_behind() > 1:
                    await asyncio.sleep(0)
        return {"start_ns": start}

    def clients_behind(self) -> int:
        sizes = (each.transport.get_write_buffer_size() for each in self.connections)
        return sum(size > self.HIGH_WATER for size in sizes)


class SwiftCMS(Server):
    """swiftcms_ws of one checkout."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(self.event)
        self.configure(
            options.checkout,
            # Neither limit may interfere with the load.
            MAX_CONNECTIONS=18_000,
            RATE=1_000_000,
            REDIS_URL=options.redis,
            DATABASE=options.database,
            HEARTBEAT=options.heartbeat,
        )
        self.port = serve_wsgi(self.app)

    def configure(self, checkout: str, **config: object) -> None:
        """Make the application with the module of this checkout."""
        from flask import Flask

        sys.path.insert(0, checkout)
        import swiftcms_ws

        if Path(swiftcms_ws.__file__).resolve().parent != Path(checkout).resolve():
            raise ImportError(f"{swiftcms_ws.__file__} is not from {checkout}")
        self.module = swiftcms_ws
        self.app = Flask(__name__)
        self.app.config["SECRET_KEY"] = "only for the benchmark, and long enough"
        for key, value in config.items():
            if value is not None:
                self.app.config[f"SWIFTCMS_WS_{key}"] = value
        self.app.register_blueprint(swiftcms_ws.blueprint)

    @staticmethod
    def event(payload: dict) -> str:
        """Return the message as it will be sent, to compute its length."""
        event = {"type": "content.created", "contentType": "posts", "payload": payload}
        event |= {"id": "1763832000123-0", "timestamp": "2026-11-22T17:20:00.123Z"}
        return json.dumps(event)

    def publish(self, payload: dict) -> None:
        self.module.publish("content.created", "posts", payload)

    def burst_many(self, events: int) -> dict:
        start = time.monotonic_ns()
        drafts = [("content.created", "posts", self.payload()) for _ in range(events)]
        self.module.publish_many(drafts)
        return {"start_ns": start}

    def status(self) -> dict:
        hub = self.module.hub
        counts = hub.stats()
        return {
            "connections": counts["connections"],
            "subscriptions": counts["subscriptions"],
            "last_id": hub.last_id(),
        }


class DeployedSwiftCMS(SwiftCMS):
    """swiftcms_ws in an application that gunicorn serves, with a page and perhaps a slow hook."""

    def __init__(self, checkout: str, lookup_s: float, heartbeat: float | None) -> None:
        Server.__init__(self, self.event)
        version = re.search(r'__version__ = "(\d+)', Path(checkout, "swiftcms_ws.py").read_text())
        # 1.0.0 accepts a thousand clients by default. Later versions derive the limit themselves.
        limit = 18_000 if version and int(version[1]) < 2 else None
        self.configure(checkout, MAX_CONNECTIONS=limit, HEARTBEAT=heartbeat)
        self.add_views()
        if lookup_s:
            self.add_hook(lookup_s)

    def add_views(self) -> None:
        from flask import render_template_string, request

        @self.app.get("/")
        def page() -> str:
            return render_template_string(PAGE, title="Latest posts", posts=range(20))

        @self.app.get("/live")
        def live() -> str:
            # A database.
            time.sleep(0.018)
            return page()

        @self.app.post("/command")
        def command() -> dict:
            return {"answer": self.execute(request.get_data(as_text=True))}

    def add_hook(self, lookup_s: float) -> None:
        """Authorize everything after one slow look-up per request context."""
        from flask import g

        @self.module.hub.authorize
        def authorize(_user, _event_type, _content_type) -> bool:
            if "allowed" not in g:
                time.sleep(lookup_s)
                g.allowed = True
            return g.allowed


def deployed(checkout: str, lookup_s: float, heartbeat: float | None) -> Callable:
    """Return the application for gunicorn."""
    signal.alarm(LIFETIME_S)
    return DeployedSwiftCMS(checkout, lookup_s, heartbeat).app


SERVERS = {
    "raw_python": RawPython,
    "flask-sock": FlaskSock,
    "Flask-SocketIO": FlaskSocketIO,
    "websockets": Websockets,
    "swiftcms_ws": SwiftCMS,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("--checkout", help="the directory of swiftcms_ws.py")
    parser.add_argument("--redis", help="the URL of a Redis server")
    parser.add_argument("--database", help="the path of an SQLite file")
    parser.add_argument("--heartbeat", type=float, help="seconds between pings")
    options = parser.parse_args()
    signal.alarm(LIFETIME_S)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # A library may print, which must not be mistaken for an answer.
    os.dup2(2, 1)
    server = SERVERS[options.name](options)
    print(json.dumps({"port": server.port}), file=answers)
    for line in sys.stdin:
        if line.strip() == "exit":
            break
        print(json.dumps(server.execute(line)), file=answers)
    # Exit at once, because a thousand threads would exit slowly.
    os._exit(0)


if __name__ == "__main__":
    main()
