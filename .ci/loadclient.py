"""loadclient.c in Python, if there is no C compiler: same arguments, commands and reports.

It is several times slower, so a fast server may have to wait for it. bench.py prints a warning.
"""

from __future__ import annotations

import argparse
import enum
import itertools
import json
import os
import select
import signal
import socket
import sys
import time
import zlib

# It must not outlive a bench.py that was killed.
LIFETIME_S = 600
# Give up connecting if no client became ready for so long.
PATIENCE_S = 30
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
KEY = "c3dpZnRjbXMtYmVuY2ghIQ=="
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"


def number_after(name: bytes, text: bytes) -> int | None:
    at = text.find(name)
    if at < 0:
        return None
    at += len(name)
    end = at + 1
    while text[end : end + 1].isdigit():
        end += 1
    return int(text[at:end])


class State(enum.Enum):
    """The state of a connection."""

    CONNECTING = enum.auto()
    # The handshake was sent.
    UPGRADING = enum.auto()
    # The messages of --send were sent, and answers are missing.
    GREETING = enum.auto()
    READY = enum.auto()


class Run:
    """The events counted since the last `expect`."""

    def __init__(self, expected: int = 0, milliseconds: int = 0) -> None:
        self.expected = expected
        self.deadline = time.monotonic() + milliseconds / 1000
        self.total = self.complete = self.first_ns = self.last_ns = self.wire_bytes = 0
        self.order_errors = self.bad_frames = self.cpu_ns = self.spun_ns = self.largest = 0
        self.smallest = sys.maxsize

    def busy_ns(self) -> int:
        """If --spin is given, the time without waiting; otherwise the processor's time."""
        if not self.total:
            return 0
        if self.spun_ns:
            return time.monotonic_ns() - self.first_ns - self.spun_ns
        return time.process_time_ns() - self.cpu_ns


class Client:
    """One connection: its handshake, its frames and its counts."""

    running_number = itertools.count()
    pings = 0

    def __init__(self, options: argparse.Namespace, stuck: bool) -> None:
        self.options, self.stuck = options, stuck
        self.state = State.CONNECTING
        self.is_open, self.close_code = True, 0
        self.answers = self.frames = self.latency_ns = self.ready_ns = 0
        self.last_seq: int | None = None
        self.inflater = None
        # The beginning of an incomplete frame or of an incomplete response to the handshake.
        self.rest = b""
        self.started_ns = time.monotonic_ns()
        self.sock = socket.socket()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if stuck:
            # Otherwise loopback, with segments of 64 KiB, buffers megabytes for this client.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.setblocking(False)
        self.sock.connect_ex(("127.0.0.1", options.port))

    def send_handshake(self) -> None:
        if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            sys.exit(f"loadclient: connect: {os.strerror(error)}")
        options = self.options
        upgrade = (
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {KEY}\r\n{OFFER if options.deflate else ''}"
        )
        self.sock.sendall(
            f"GET {options.path} HTTP/1.1\r\nHost: 127.0.0.1:{options.port}\r\n"
            f"{'' if options.stream else upgrade}\r\n".encode()
        )
        self.state = State.UPGRADING

    def read_response(self, run: Run) -> None:
        """Read the response to the handshake. Frames may follow it in the same read."""
        data = self.sock.recv(65536)
        if not data:
            sys.exit("loadclient: the server closed the connection during the handshake")
        self.rest += data
        if b"\r\n\r\n" not in self.rest:
            return
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        if (b" 200 " if self.options.stream else b" 101 ") not in head:
            sys.exit(f"loadclient: refused: {head.decode(errors='replace')}")
        if b"permessage-deflate" in head.lower():
            self.inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        for _ in range(self.options.repeat):
            number = str(next(self.running_number))
            for text in self.options.send:
                self.send(TEXT, text.replace("#", number).encode())
        self.state = State.GREETING
        self.feed(self.rest, run)

    def on_ready(self, run: Run) -> bool:
        """Handle an event of the poller. Return True if it made the connection ready."""
        if self.state is State.CONNECTING:
            self.send_handshake()
        elif self.state is State.UPGRADING:
            self.read_response(run)
        else:
            self.read(run)
        if self.state is not State.READY and not self.is_open:
            sys.exit(f"loadclient: closed with {self.close_code} instead of an answer")
        if self.state is not State.GREETING or self.answers < self.options.answers:
            return False
        self.state = State.READY
        self.ready_ns = time.monotonic_ns()
        return True

    def send(self, opcode: int, payload: bytes) -> None:
        """A client must mask its frames; a key of four zero bytes is allowed."""
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.sock.sendall(bytes([0x80 | opcode]) + length + bytes(4) + payload)

    def read(self, run: Run) -> None:
        """Read once, and handle the frames."""
        try:
            data = self.sock.recv(262_144)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_open = False
            return
        run.wire_bytes += len(data)
        self.feed(self.rest + data, run)

    def feed(self, data: bytes, run: Run) -> None:
        """Handle the complete frames in `data` and keep the beginning of the next one."""
        at, now = 0, time.monotonic_ns()
        if self.options.stream:
            *blocks, self.rest = data.split(b"\n\n")
            for text in [block.partition(b"data: ")[2] for block in blocks]:
                if text:
                    self.on_message(text, now, run)
            return
        while len(data) - at >= 2:
            first, length = data[at], data[at + 1]
            start = at + 2
            if length in (126, 127):
                start += 2 if length == 126 else 8
                length = int.from_bytes(data[at + 2 : start], "big")
            end = start + length
            if first & 0xB0 != 0x80:
                # If this is a fragment or no frame, the rest cannot be read.
                run.bad_frames += 1
                self.is_open = False
                return
            if end > len(data):
                break
            self.on_frame(first & 0x0F, data[start:end], bool(first & 0x40), now, run)
            at = end
        self.rest = data[at:]

    def on_frame(self, opcode: int, payload: bytes, compressed: bool, now: int, run: Run) -> None:
        if opcode in (TEXT, BINARY):
            if compressed:
                payload = self.inflater.decompress(payload + b"\0\0\xff\xff")
            if self.options.engineio and payload == b"2":
                Client.pings += 1
                self.send(TEXT, b"3")
            else:
                self.on_message(payload, now, run)
        elif opcode == PING:
            Client.pings += 1
            self.send(PONG, payload)
        elif opcode == CLOSE:
            self.is_open = False
            self.close_code = int.from_bytes(payload[:2], "big") or 1005

    def on_message(self, text: bytes, now: int, run: Run) -> None:
        seq = number_after(b'"seq":', text)
        if seq is None:
            self.answers += 1
            return
        if self.last_seq is not None and seq != self.last_seq + 1:
            run.order_errors += 1
        self.last_seq = seq
        if self.stuck:
            return
        if not run.total:
            run.first_ns, run.cpu_ns, run.spun_ns = now, time.process_time_ns(), 0
        run.total += 1
        run.last_ns = now
        run.smallest = min(run.smallest, len(text))
        run.largest = max(run.largest, len(text))
        self.frames += 1
        if self.frames == run.expected:
            run.complete += 1
        if run.expected == 1:
            self.latency_ns = now - number_after(b'"sent_ns":', text)


def print_line(report: dict) -> None:
    print(json.dumps(report), flush=True)


def quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    size = len(ordered)
    return {
        "p50_ns": ordered[size // 2],
        "p99_ns": ordered[size * 99 // 100],
        "max_ns": ordered[-1],
    }


def ready_report(clients: list[Client]) -> dict:
    last = max(client.ready_ns for client in clients)
    return {
        "ready": len(clients),
        "deflated": sum(client.inflater is not None for client in clients),
        "inflates": True,
        "ready_ns": last - clients[0].started_ns,
        **quantiles([client.ready_ns - client.started_ns for client in clients]),
    }


def report(clients: list[Client], run: Run) -> dict:
    reading = [client for client in clients if not client.stuck]
    frames = [client.frames for client in reading]
    latencies = [c.latency_ns for c in reading if c.frames] if run.expected == 1 else []
    return {
        "frames": run.total,
        "fewest": min(frames),
        "most": max(frames),
        "complete": run.complete,
        "closed": sum(not client.is_open for client in reading),
        "close_code": max(client.close_code for client in reading),
        "order_errors": run.order_errors,
        "bad_frames": run.bad_frames,
        "unseen": 0,
        "first_ns": run.first_ns,
        "last_ns": run.last_ns,
        "wire_bytes": run.wire_bytes,
        "smallest": run.smallest if run.total else 0,
        "largest": run.largest,
        "busy_ns": run.busy_ns(),
        **quantiles(latencies),
    }


def report_stuck(client: Client, run: Run) -> dict:
    """Read the data that waits for the stuck connection, and report how the server closed it."""
    client.sock.settimeout(1)
    run.wire_bytes = 0
    outcome = "open"
    while client.is_open:
        try:
            data = client.sock.recv(65536)
        except TimeoutError:
            break
        except OSError:
            outcome = "reset"
            break
        if not data:
            outcome = "cut"
            break
        run.wire_bytes += len(data)
        client.feed(client.rest + data, run)
    if client.close_code:
        outcome = "closed"
    size, errors = run.wire_bytes, run.order_errors
    return {"end": outcome, "code": client.close_code, "bytes": size, "order_errors": errors}


class LoadClient:
    """All connections, and the loop that reads for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.run = Run()
        self.poller = select.epoll()
        self.by_fd: dict[int, Client] = {}
        self.clients: list[Client] = []
        self.ready = 0

    def connect_all(self) -> None:
        count, progress = self.options.count, time.monotonic()
        while self.ready < count:
            before = self.ready
            while len(self.clients) < count and len(self.clients) - before < self.options.parallel:
                client = Client(self.options, self.options.stuck and not self.clients)
                self.clients.append(client)
                self.by_fd[client.sock.fileno()] = client
                self.poller.register(client.sock, select.EPOLLOUT)
            # Connecting may take long: the clients that are ready must answer pings.
            self.poll(1)
            if self.ready > before:
                progress = time.monotonic()
            elif time.monotonic() - progress > PATIENCE_S:
                sys.exit(f"loadclient: {self.ready} of {count} clients are ready, then no more")

    def poll(self, timeout: float | None) -> bool:
        """Read everything that has arrived. Return True if there is a command."""
        commanded = False
        spinning = self.options.spin and self.run.expected
        start = time.monotonic_ns()
        ready = self.poller.poll(0 if spinning else timeout)
        if spinning and not ready:
            self.run.spun_ns += time.monotonic_ns() - start
        for fd, _ in ready:
            if fd == sys.stdin.fileno():
                commanded = True
                continue
            client = self.by_fd[fd]
            before = client.state
            self.ready += client.on_ready(self.run)
            if not client.is_open or (client.stuck and client.state is State.READY):
                self.poller.unregister(fd)
            elif before is State.CONNECTING:
                self.poller.modify(fd, select.EPOLLIN)
        return commanded

    def execute(self, command: str, *numbers: str) -> None:
        if command == "expect":
            # Errors that are seen while no event is expected belong to the next report.
            before, self.run = self.run, Run(*map(int, numbers))
            self.run.order_errors, self.run.bad_frames = before.order_errors, before.bad_frames
            for client in self.clients:
                client.frames = 0
            print_line({"armed": 1})
        elif command == "pings":
            print_line({"pings": Client.pings})
        elif command == "stuck":
            print_line(report_stuck(self.clients[0], self.run))
        else:
            sys.exit(0)

    def serve(self) -> None:
        self.poller.register(sys.stdin, select.EPOLLIN)
        readers = sum(not client.stuck for client in self.clients)
        while True:
            run = self.run
            left = max(0.0, run.deadline - time.monotonic()) if run.expected else None
            if self.poll(left):
                self.execute(*os.read(sys.stdin.fileno(), 256).decode().split() or ["exit"])
                continue
            if run.expected and (run.complete == readers or time.monotonic() >= run.deadline):
                print_line(report(self.clients, run))
                self.run = Run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("count", type=int)
    parser.add_argument("--send", action="append", default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    for flag in ("--deflate", "--engineio", "--stream", "--stuck", "--spin"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    signal.alarm(LIFETIME_S)
    client = LoadClient(options)
    client.connect_all()
    print_line(ready_report(client.clients))
    client.serve()


if __name__ == "__main__":
    main()
