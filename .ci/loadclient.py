"""loadclient.c in Python, where there is no C compiler: the same arguments, lines and reports.

It is several times slower, so that a fast server may be waiting for it: bench.py says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import signal
import socket
import sys
import time
import zlib

LIFETIME_S = 600  # never outlive a bench that was killed
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
KEY = "c3dpZnRjbXMtYmVuY2ghIQ=="


def number_after(name: bytes, text: bytes) -> int | None:
    at = text.find(name)
    if at < 0:
        return None
    at += len(name)
    end = at + 1
    while text[end : end + 1].isdigit():
        end += 1
    return int(text[at:end])


class Run:
    """What has been counted since the last `expect`."""

    def __init__(self, expected: int = 0, milliseconds: int = 0) -> None:
        self.expected = expected
        self.deadline = time.monotonic() + milliseconds / 1000
        self.total = self.complete = self.first_ns = self.last_ns = self.wire_bytes = 0
        self.order_errors = self.bad_frames = self.cpu_ns = self.spun_ns = self.largest = 0
        self.smallest = sys.maxsize


class Client:
    def __init__(self, options: argparse.Namespace, stuck: bool) -> None:
        self.stuck, self.engineio = stuck, options.engineio
        self.open, self.close_code = True, 0
        self.answers = self.frames = self.latency_ns = 0
        self.last_seq: int | None = None
        self.inflater = None
        self.sock = socket.socket()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if stuck:
            # Else loopback, with its 64 KiB segments, swallows megabytes before anyone notices.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", options.port))
        offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
        self.sock.sendall(
            f"GET {options.path} HTTP/1.1\r\nHost: 127.0.0.1:{options.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {KEY}\r\n{offer if options.deflate else ''}\r\n".encode()
        )
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            data = self.sock.recv(65536)
            if not data:
                sys.exit("the server hung up during the handshake")
            self.rest += data
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        if b" 101 " not in head:
            sys.exit(f"refused: {head.decode(errors='replace')}")
        self.deflated = b"permessage-deflate" in head.lower()
        if self.deflated:
            self.inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def send(self, opcode: int, payload: bytes) -> None:
        """A client must mask; a key of four zero bytes is allowed and changes nothing."""
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.sock.sendall(bytes([0x80 | opcode]) + length + bytes(4) + payload)

    def read(self, run: Run) -> bool:
        """One read; False at the end."""
        try:
            data = self.sock.recv(262_144)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self.open = False
            return False
        run.wire_bytes += len(data)
        self.take(self.rest + data, run)
        return self.open

    def take(self, data: bytes, run: Run) -> None:
        """Handles the whole frames and keeps what is left over."""
        at, now = 0, time.monotonic_ns()
        while len(data) - at >= 2:
            first, length = data[at], data[at + 1]
            start = at + 2
            if length in (126, 127):
                start += 2 if length == 126 else 8
                length = int.from_bytes(data[at + 2 : start], "big")
            end = start + length
            if first & 0xB0 != 0x80:  # in fragments, or not a frame at all
                run.bad_frames += 1
                self.open = False
                return
            if end > len(data):
                break
            self.frame(first & 0x0F, data[start:end], bool(first & 0x40), now, run)
            at = end
        self.rest = data[at:]

    def frame(self, opcode: int, payload: bytes, compressed: bool, now: int, run: Run) -> None:
        if opcode in (TEXT, BINARY):
            if compressed:
                payload = self.inflater.decompress(payload + b"\0\0\xff\xff")
            if self.engineio and payload == b"2":
                self.send(TEXT, b"3")
            else:
                self.message(payload, now, run)
        elif opcode == PING:
            self.send(PONG, payload)
        elif opcode == CLOSE:
            self.open = False
            self.close_code = int.from_bytes(payload[:2], "big") or 1005

    def message(self, text: bytes, now: int, run: Run) -> None:
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


def say(report: dict) -> None:
    print(json.dumps(report), flush=True)


def busy_ns(run: Run) -> int:
    """When it spins, what it did not wait; else the processor's time."""
    if not run.total:
        return 0
    if run.spun_ns:
        return time.monotonic_ns() - run.first_ns - run.spun_ns
    return time.process_time_ns() - run.cpu_ns


def report(clients: list[Client], run: Run) -> dict:
    reading = [client for client in clients if not client.stuck]
    frames = [client.frames for client in reading]
    latency = sorted(c.latency_ns for c in reading if c.frames) if run.expected == 1 else [0]
    latency = latency or [0]
    return {
        "frames": run.total,
        "fewest": min(frames),
        "most": max(frames),
        "complete": run.complete,
        "closed": sum(not client.open for client in reading),
        "close_code": max(client.close_code for client in reading),
        "order_errors": run.order_errors,
        "bad_frames": run.bad_frames,
        "unseen": 0,
        "first_ns": run.first_ns,
        "last_ns": run.last_ns,
        "wire_bytes": run.wire_bytes,
        "smallest": run.smallest if run.total else 0,
        "largest": run.largest,
        "busy_ns": busy_ns(run),
        "p50_ns": latency[len(latency) // 2],
        "p99_ns": latency[len(latency) * 99 // 100],
        "max_ns": latency[-1],
    }


def report_stuck(client: Client, run: Run) -> dict:
    """Now reads what the stuck connection was sent, and says how that ended."""
    client.sock.settimeout(1)
    run.wire_bytes = 0
    end = "open"
    while client.open:
        try:
            data = client.sock.recv(65536)
        except TimeoutError:
            break
        except OSError:
            end = "reset"
            break
        if not data:
            end = "cut"
            break
        run.wire_bytes += len(data)
        client.take(client.rest + data, run)
    if client.close_code:
        end = "closed"
    size = run.wire_bytes
    return {"end": end, "code": client.close_code, "bytes": size, "order_errors": run.order_errors}


class Crowd:
    """All the clients, and the loop that reads for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.run = Run()
        self.spin = options.spin
        self.poller = select.epoll()
        self.by_fd: dict[int, Client] = {}
        self.clients: list[Client] = []
        running_number = itertools.count()
        for number in range(options.count):
            client = Client(options, options.stuck and number == 0)
            self.clients.append(client)
            for _ in range(options.repeat if options.send else 0):
                client.send(TEXT, options.send.replace("#", str(next(running_number))).encode())
            client.take(client.rest, self.run)
            while client.answers < options.answers:
                if not client.read(self.run):
                    sys.exit("the server hung up instead of answering")
            if not client.stuck:
                client.sock.setblocking(False)
                self.by_fd[client.sock.fileno()] = client
                self.poller.register(client.sock, select.EPOLLIN)
            # Connecting may take long: those already connected must answer the server's pings.
            self.read_ready(0)

    def read_ready(self, patience: float | None) -> bool:
        """Reads what there is; True where there is a command among it."""
        commanded = False
        spinning = self.spin and self.run.expected
        start = time.monotonic_ns()
        ready = self.poller.poll(0 if spinning else patience)
        if spinning and not ready:
            self.run.spun_ns += time.monotonic_ns() - start
        for fd, _ in ready:
            if fd == sys.stdin.fileno():
                commanded = True
            elif not self.by_fd[fd].read(self.run):
                self.poller.unregister(fd)
        return commanded

    def obey(self, command: str, *numbers: str) -> None:
        if command == "expect":
            # Errors seen while nothing was expected belong to the next report.
            before, self.run = self.run, Run(*map(int, numbers))
            self.run.order_errors, self.run.bad_frames = before.order_errors, before.bad_frames
            for client in self.clients:
                client.frames = 0
            say({"armed": 1})
        elif command == "stuck":
            say(report_stuck(self.clients[0], self.run))
        else:
            sys.exit(0)

    def work(self) -> None:
        self.poller.register(sys.stdin, select.EPOLLIN)
        while True:
            run = self.run
            left = max(0.0, run.deadline - time.monotonic()) if run.expected else None
            if self.read_ready(left):
                self.obey(*os.read(sys.stdin.fileno(), 256).decode().split() or ["exit"])
                continue
            readers = sum(not client.stuck for client in self.clients)
            if run.expected and (run.complete == readers or time.monotonic() >= run.deadline):
                say(report(self.clients, run))
                self.run = Run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("count", type=int)
    parser.add_argument("--send")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--answers", type=int, default=0)
    for flag in ("--deflate", "--engineio", "--stuck", "--spin"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    signal.alarm(LIFETIME_S)
    crowd = Crowd(options)
    deflated = sum(client.deflated for client in crowd.clients)
    say({"ready": len(crowd.clients), "deflated": deflated, "inflates": True})
    crowd.work()


if __name__ == "__main__":
    main()
