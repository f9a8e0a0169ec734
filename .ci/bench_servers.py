"""The servers that bench.py compares. Each runs in a process of its own: `bench_servers.py NAME [REDIS]`.

They say {"port": …} and then obey lines on standard input, one answer of JSON a line:

    clients              how many clients are connected (null where the client can tell)
    resize BYTES         how long the messages are from now on
    burst EVENTS         publish them as fast as this server can; when that began
    burst_many EVENTS    the same in one call, where a server has one for that
    publish_cost CALLS   the same, with a stopwatch around each call
    exit

Every message is as long as every other server's. It carries `seq`, one more than the last, and
`sent_ns`, when it was published: the load client looks for nothing else.
"""

# ruff: noqa: PLC0415 - each server imports what it needs itself: the others' memory is measured

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LIFETIME_S = 600  # never outlive a bench that was killed
FIRST_SEQ = 100_000  # six digits from first to last, so that all messages are equally long
WORDS = ["the", "of", "an", "editor", "saves", "draft", "posts", "while", "readers", "watch"]
# Longer than deflate's window of 32 KiB, so that compression cannot just point at the event before.
PROSE = " ".join(random.Random(1).choices(WORDS, k=16_000))


def envelope(payload: dict) -> str:
    """The message of the servers that leave its form to the application."""
    return json.dumps({"type": "content.created", "contentType": "posts", "payload": payload})


class Server:
    """What all have in common. A subclass opens a port and publishes in its own way."""

    port: int

    def __init__(self, message: Callable[[dict], str] = envelope) -> None:
        self.message = message
        self.sequence = itertools.count(FIRST_SEQ)
        self.resize(300)

    def resize(self, size: int) -> None:
        """From now on a message is `size` bytes long."""
        bare = {"seq": FIRST_SEQ, "sent_ns": time.monotonic_ns(), "text": ""}
        self.text_length = size - len(self.message(bare))

    def payload(self) -> dict:
        seq = next(self.sequence)
        start = seq * 307 % (len(PROSE) - self.text_length)
        text = PROSE[start : start + self.text_length]
        return {"seq": seq, "sent_ns": time.monotonic_ns(), "text": text}

    def clients(self) -> int | None:
        return None

    def publish(self, payload: dict) -> None:
        raise NotImplementedError

    def burst(self, events: int) -> dict:
        start = time.monotonic_ns()
        for _ in range(events):
            self.publish(self.payload())
        return {"start_ns": start}

    def publish_cost(self, calls: int) -> dict:
        costs = []
        for _ in range(calls):
            payload = self.payload()
            start = time.perf_counter_ns()
            self.publish(payload)
            costs.append(time.perf_counter_ns() - start)
        return {"p50_us": statistics.median(costs) / 1000, "max_us": max(costs) / 1000}


class RawPython(Server):
    """The yardstick: one prebuilt frame, one system call for each client, and nothing else."""

    def __init__(self) -> None:
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
        for sock in list(self.socks):
            with contextlib.suppress(BlockingIOError):
                if not sock.recv(4096, socket.MSG_DONTWAIT):  # this one has gone
                    self.socks.remove(sock)
        return len(self.socks)

    def frame(self) -> bytes:
        text = self.message(self.payload()).encode()
        return bytes((0x81, 126)) + len(text).to_bytes(2, "big") + text

    def burst(self, events: int, batch: int = 1) -> dict:
        """With a `batch`, so many frames go out in one call: to find the load client's ceiling."""
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
    """Starts Werkzeug's threaded server for an application, and returns its port."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


class FlaskSock(Server):
    """flask-sock as its tutorials do: a set of clients, and a loop in whoever publishes."""

    def __init__(self) -> None:
        super().__init__()
        from flask import Flask
        from flask_sock import Sock

        app = Flask(__name__)
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
    """Flask-SocketIO with threads, and nothing but its WebSocket transport."""

    def __init__(self) -> None:
        super().__init__(self.packet)
        from flask import Flask
        from flask_socketio import SocketIO

        app = Flask(__name__)
        # With the usual 20 s it ends its own clients: their pongs wait behind a thousand threads.
        options = {"async_mode": "threading", "transports": ["websocket"], "ping_timeout": 120}
        self.io = SocketIO(app, message_queue=REDIS_URL, **options)
        self.port = serve_wsgi(app)

    @staticmethod
    def packet(payload: dict) -> str:
        """How it will look on the wire, for its length."""
        return "42" + json.dumps(["content.created", payload], separators=(",", ":"))

    def publish(self, payload: dict) -> None:
        self.io.emit("content.created", payload)


class Websockets(Server):
    """websockets' asyncio server and its broadcast()."""

    HIGH_WATER = 64 * 1024

    def __init__(self) -> None:
        super().__init__()
        self.connections: set = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = self.run(self.open())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def open(self) -> int:
        from websockets.asyncio.server import serve

        self.server = await serve(self.watch, "127.0.0.1", 0)
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
            if number % 16 == 0:  # looking at every client each time would be what is measured
                while self.clients_behind() > 1:  # one may be stuck: broadcast() promises to go on
                    await asyncio.sleep(0)
        return {"start_ns": start}

    def clients_behind(self) -> int:
        sizes = (each.transport.get_write_buffer_size() for each in self.connections)
        return sum(size > self.HIGH_WATER for size in sizes)


class SwiftCMS(Server):
    """swiftcms_ws from this checkout, with its limits raised to let the load in."""

    def __init__(self) -> None:
        super().__init__(self.event)
        from flask import Flask

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from swiftcms_ws import blueprint, publish, publish_many

        app = Flask(__name__)
        app.config["SECRET_KEY"] = "only for the benchmark, and long enough"
        app.config["SWIFTCMS_WS_MAX_CONNECTIONS"] = 20_000
        app.config["SWIFTCMS_WS_RATE"] = 1_000_000
        app.config["SWIFTCMS_WS_REDIS_URL"] = REDIS_URL
        app.register_blueprint(blueprint)
        self.hand_over, self.hand_over_many = publish, publish_many
        self.port = serve_wsgi(app)

    @staticmethod
    def event(payload: dict) -> str:
        """How it will look on the wire, for its length."""
        event = {"type": "content.created", "contentType": "posts", "payload": payload}
        event |= {"id": "1763832000123-0", "timestamp": "2026-11-22T17:20:00.123Z"}
        return json.dumps(event)

    def publish(self, payload: dict) -> None:
        self.hand_over("content.created", "posts", payload)

    def burst_many(self, events: int) -> dict:
        start = time.monotonic_ns()
        self.hand_over_many([("content.created", "posts", self.payload()) for _ in range(events)])
        return {"start_ns": start}


REDIS_URL = sys.argv[2] if len(sys.argv) > 2 else None
SERVERS = {
    "raw_python": RawPython,
    "flask-sock": FlaskSock,
    "Flask-SocketIO": FlaskSocketIO,
    "websockets": Websockets,
    "swiftcms_ws": SwiftCMS,
}


def main() -> None:
    signal.alarm(LIFETIME_S)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    server = SERVERS[sys.argv[1]]()
    print(json.dumps({"port": server.port}), file=answers)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "exit":
            break
        print(json.dumps(getattr(server, command)(*map(int, numbers))), file=answers)
    os._exit(0)  # at once: a thousand threads would take their time


if __name__ == "__main__":
    main()
