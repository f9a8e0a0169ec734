"""Behaviour of swiftcms_ws, over real sockets: real servers on free ports, real clients, a real browser.

Nothing here sleeps to wait for something: it waits for the thing, until a deadline. A warning, and
an exception in any thread, fails the test in which it happens (see pyproject.toml).
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import gc
import hashlib
import hmac
import itertools
import json
import logging
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import pytest
import simple_websocket
from flask import Flask, g, request, session
from flask_sock import Sock
from werkzeug.serving import make_server
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate

import swiftcms_ws
from swiftcms_ws import Hub

HERE = Path(__file__).parent
SEED = HERE.parent / "shared" / "seed" / "websocket-api.md"
KEY = "a key for tests that is longer than the 64 bytes that HS512 asks for, and so for all"
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and their children too
PATIENCE = 20.0  # seconds, for anything that is bound to happen; a busy machine is slow

# ---------------------------------------------------------------------------------------------------
# Tools: a server, a client, a process, a browser
# ---------------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any], what: str = "it", timeout: float = PATIENCE) -> Any:
    """Wait until `condition()` is true and return what it returned."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} seconds"
        pause.wait(0.005)
    return result


class Server:
    """A hub and an app under Werkzeug's threaded server, on a free port of this machine."""

    def __init__(self, configure: Callable[[Flask, Hub], None] | None = None, **config: Any) -> None:
        self.hub = Hub()
        self.app = Flask("site")
        self.app.secret_key = KEY
        for name, value in config.items():
            self.app.config[f"SWIFTCMS_WS_{name}"] = value
        if configure is not None:
            configure(self.app, self.hub)
        self.hub.init_app(self.app)
        ssl_context = self.app.config.get("TEST_SSL")
        self._http = make_server("127.0.0.1", 0, self.app, threaded=True, ssl_context=ssl_context)
        self.port: int = self._http.port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hub.close()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(PATIENCE)

    def publish(self, number: int = 0, kind: str = "content.created", to: Any = None, **more: Any) -> str:
        return self.hub.publish(kind, "posts", {"n": number, **more}, to=to)

    def client(self, **options: Any) -> Client:
        return Client(self.port, **options)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return http(f"http://127.0.0.1:{self.port}{path}", **headers)

    def handshake(self, path: str = "/ws", **changes: str | None) -> tuple[int, dict[str, str], Any]:
        """Send a handshake as plain HTTP with some headers changed; return status, headers, JSON body."""
        headers: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.port}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
        }
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        lines = [f"GET {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items() if v is not None)]
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += sock.recv(4096)
            head, _, body = answer.partition(b"\r\n\r\n")
            status, *fields = head.decode("latin-1").split("\r\n")
            found = dict(field.split(": ", 1) for field in fields)
            if status.split()[1] == "101":
                return 101, found, None
            while len(body) < int(found["Content-Length"]):
                body += sock.recv(4096)
            return int(status.split()[1]), found, json.loads(body)


def http(
    url: str, method: str = "GET", data: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    body = None if data is None else json.dumps(data).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        sent["Content-Type"] = "application/json"
    ask = urllib.request.Request(url, body, sent, method=method)
    try:
        with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


class Refused(Exception):
    """The server answered the handshake with HTTP."""


class Closed(Exception):
    """The server ended the connection, as `code` and `reason` say; None: without a close frame."""

    def __init__(self, code: int | None, reason: str | None) -> None:
        super().__init__(f"{code} {reason}")
        self.code, self.reason = code, reason


class Client:
    """A client that offers permessage-deflate, as every browser does, and is strict in what it accepts.

    wsproto fails it for a reserved bit, a broken frame or text that is not UTF-8; it fails itself
    for a single byte that comes after the server's close frame.
    """

    def __init__(
        self,
        port: int,
        path: str = "/ws",
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        greeted: bool = True,
        sock: socket.socket | None = None,
    ) -> None:
        self.sock = sock or socket.socket()
        self.messages: deque[dict[str, Any]] = deque()
        self.pings = 0
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._refs = itertools.count(1)
        self._text = ""
        self._status = 0
        self._closed: Closed | None = None
        if receive_buffer is not None:  # a stuck reader: loopback would else take megabytes for it
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.settimeout(PATIENCE)
        if sock is None:
            self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = Request(
            host=f"127.0.0.1:{port}",
            target=path,
            extensions=[PerMessageDeflate()],
            extra_headers=[(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        )
        self.sock.sendall(self._ws.send(hello))
        self._accepted = False
        while not self._accepted:
            self._read(PATIENCE)
        if greeted:
            self.hello = self.receive()
            assert self.hello["type"] == "system.connected"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def _read(self, timeout: float) -> None:  # noqa: PLR0912 - one case for each kind of event
        self.sock.settimeout(max(timeout, 0.001))
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._closed = self._closed or Closed(None, None)
            raise self._closed
        if self._closed is not None:
            raise AssertionError(f"bytes after the close frame: {data[:80]!r}")
        self._ws.receive_data(data)
        for event in self._ws.events():
            match event:
                case AcceptConnection():
                    assert not event.extensions, "the server must not compress"
                    self._accepted = True
                case RejectConnection():
                    self._status = event.status_code
                case RejectData():
                    if event.body_finished:
                        self.sock.close()
                        raise Refused(self._status)
                case Ping():
                    self.pings += 1
                    with contextlib.suppress(OSError):  # the server may be gone by now
                        self.sock.sendall(self._ws.send(event.response()))
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        self.messages.append(json.loads(self._text))
                        self._text = ""
                case BytesMessage():
                    raise AssertionError("the server sends text only")
                case CloseConnection():
                    self._closed = Closed(event.code, event.reason)
                    if self._ws.state is ConnectionState.REMOTE_CLOSING:
                        with contextlib.suppress(OSError):
                            self.sock.sendall(self._ws.send(event.response()))

    def receive(self, timeout: float = PATIENCE, heartbeats: bool = False) -> dict[str, Any]:
        """Return the next message, heartbeats only where wanted; raise Closed at the end."""
        deadline = time.monotonic() + timeout
        while True:
            while self.messages:
                message = self.messages.popleft()
                if heartbeats or message["type"] != "system.heartbeat" or "ref" in message:
                    return message
            self._read(deadline - time.monotonic())

    def receive_many(self, count: int) -> list[dict[str, Any]]:
        return [self.receive() for _ in range(count)]

    def send(self, **message: Any) -> None:
        self.send_raw(json.dumps(message))

    def send_raw(self, data: str | bytes) -> None:
        self.sock.sendall(self._ws.send(Message(data=data)))

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """Send a message with a `ref` and return its answer; what else comes is kept for receive()."""
        ref = next(self._refs)
        self.send(action=action, ref=ref, **fields)
        others = []
        while (message := self.receive(heartbeats=True)).get("ref") != ref:
            others.append(message)
        self.messages.extendleft(reversed(others))
        return message

    def subscribe(self, pattern: str = "*", content_type: str = "*", **fields: Any) -> dict[str, Any]:
        answer = self.ask("subscribe", type=pattern, contentType=content_type, **fields)
        assert answer["type"] == "system.subscribed", answer
        return answer["payload"]

    def authenticate(self, token: str) -> dict[str, Any]:
        return self.ask("authenticate", token=token)

    def nothing_more(self) -> None:
        assert self.rest() == []

    def rest(self) -> list[dict[str, Any]]:
        """Return all that is still on its way, by asking for an answer that the dispatcher gives.

        It gives it in its order, so after every event that was published before.
        """
        self.ask("editStop", contentType="none", entryId="none")
        rest = [message for message in self.messages if message["type"] != "system.heartbeat"]
        self.messages.clear()
        return rest

    def closing(self) -> Closed:
        """Read on until the server has ended the connection, and the end of the stream after it."""
        with pytest.raises(Closed) as caught:
            while True:
                self._read(PATIENCE)
        return caught.value

    def close(self, code: int = 1000) -> Closed:
        """End the connection as a client does, and wait for the server's close frame and its end."""
        self.sock.sendall(self._ws.send(CloseConnection(code)))
        return self.closing()

    def reset(self) -> None:
        """Vanish without a word: the kernel sends RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Frames:
    """Raw frames, well formed and not, for what no library would send."""

    @staticmethod
    def masked(
        opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, length: int | None = None
    ) -> bytes:
        size = len(payload) if length is None else length
        head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
        if size < 126:
            head += bytes([0x80 | size])
        elif size < 65536:
            head += bytes([0x80 | 126]) + struct.pack("!H", size)
        else:
            head += bytes([0x80 | 127]) + struct.pack("!Q", size)
        return head + b"\0\0\0\0" + payload


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


class Process:
    """A server in a process of its own, with its output in a file; ended by its id."""

    def __init__(self, *command: str, cwd: Path, port: int, **environ: str) -> None:
        self.port = port
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", **environ},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Process:
        until(self._is_up, f"the start of {self.popen.args}", timeout=60)
        return self

    def _is_up(self) -> bool:
        assert self.popen.poll() is None, self.output()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(PATIENCE)
        self._log.close()

    def output(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def client(self, **options: Any) -> Client:
        return Client(self.port, **options)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


class Browser:
    """Headless Chromium, driven over its DevTools protocol."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Browser:
        until(lambda: self._port() > 0, "Chromium's start", timeout=60)
        return self

    def _port(self) -> int:
        try:
            return int((Path(self._profile.name) / "DevToolsActivePort").read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._log.close()
        self._profile.cleanup()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(PATIENCE)

    def page(self, url: str, **options: Any) -> Page:
        answer = json.loads(http(f"http://127.0.0.1:{self._port()}/json/new?about:blank", "PUT")[2])
        page = Page(self._port(), answer["webSocketDebuggerUrl"].split(str(self._port()), 1)[1], answer["id"])
        page.open(url, **options)
        return page


class Page:
    """One page of a Browser. `console` has what it logged and what the browser complained of."""

    def __init__(self, port: int, path: str, target: str) -> None:
        self._port, self._target = port, target
        self._numbers = itertools.count(1)
        self.console: list[str] = []
        self._socket = simple_websocket.Client.connect(f"ws://127.0.0.1:{port}{path}")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            data = self._socket.receive(PATIENCE)
            assert data is not None, f"Chromium did not answer {method}"
            message = json.loads(data)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message["method"]:
            case "Runtime.consoleAPICalled":
                values = [str(arg.get("value", arg.get("description"))) for arg in params["args"]]
                self.console.append(f"{params['type']}: {' '.join(values)}")
            case "Runtime.exceptionThrown":
                self.console.append(f"exception: {params['exceptionDetails']}")
            case "Log.entryAdded":
                self.console.append(f"{params['entry']['level']}: {params['entry']['text']}")

    def open(self, url: str, before: str = "", width: int = 1200, height: int = 900) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=url)
        until(lambda: self.js("document.readyState === 'complete' && location.href !== 'about:blank'"), url)

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, timeout: float = PATIENCE) -> Any:
        try:
            return until(lambda: self.js(expression), expression, timeout)
        except AssertionError as error:
            shown = self.js("document.body.innerText")
            raise AssertionError(f"{error}; console: {self.console}; page: {shown}") from None

    def be_offline(self, offline: bool) -> None:
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=offline, **speed)

    def complaints(self) -> list[str]:
        """Return what stands in the console but was not logged by the page itself."""
        self.js("1")  # collects what is on its way
        return [line for line in self.console if not line.startswith(("log:", "info:"))]

    def close(self) -> None:
        http(f"http://127.0.0.1:{self._port}/json/close/{self._target}")
        with contextlib.suppress(OSError, simple_websocket.ConnectionClosed):  # Chromium was faster
            self._socket.close()


# ---------------------------------------------------------------------------------------------------
# The protocol: every action, answer and error
# ---------------------------------------------------------------------------------------------------


def token(user: Any = "ana", expires_in: float = 600, key: str = KEY, algorithm: str = "HS256", **claims: Any) -> str:
    """Sign a token without our help, so that ours is not checked against itself."""
    return jwt.encode({"sub": user, "exp": time.time() + expires_in, **claims}, key, algorithm)


def unsigned_token() -> str:
    head, body = ({"alg": "none", "typ": "JWT"}, {"sub": "ana", "exp": time.time() + 600})
    encode = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (head, body)]
    return ".".join([*encode, ""])


def test_greeting_and_message_form(server: Server) -> None:
    """The first message, and the form of a published one, are exactly PROTOCOL.md's."""
    with server.client() as client:
        assert client.hello.keys() == {"type", "payload", "timestamp"}
        assert client.hello["payload"].keys() == {"clientId", "userId", "heartbeat", "lastId"}
        assert client.hello["payload"]["userId"] is None
        assert client.hello["payload"]["heartbeat"] == 25
        assert re.fullmatch(r"\d+-\d+", client.hello["payload"]["lastId"])
        client.subscribe()
        event_id = server.publish(7)
        message = client.receive()
    assert message == {
        "type": "content.created",
        "contentType": "posts",
        "payload": {"n": 7},
        "id": event_id,
        "timestamp": message["timestamp"],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message["timestamp"])
    sent = datetime.fromisoformat(message["timestamp"].replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - sent).total_seconds()) < PATIENCE


ANSWERS = [
    ({"action": "subscribe"}, "system.subscribed", {"type": "*", "contentType": "*", "recovered": True, "replayed": 0}),
    ({"action": "subscribe", "type": "content.*"}, "system.subscribed", {"type": "content.*", "contentType": "*"}),
    ({"action": "subscribe", "contentType": "posts"}, "system.subscribed", {"type": "*", "contentType": "posts"}),
    ({"action": "subscribe", "type": "a.b-c.d_e", "color": "blue"}, "system.subscribed", {"type": "a.b-c.d_e"}),
    ({"action": "subscribe", "since": "1-0"}, "system.subscribed", {"recovered": False, "replayed": 0}),
    ({"action": "subscribe", "since": "99999999999999999999-0"}, "system.subscribed", {"recovered": False}),
    ({"action": "unsubscribe"}, "system.unsubscribed", {"type": "*", "contentType": "*", "removed": 0}),
    ({"action": "unsubscribe", "type": "content.*"}, "system.unsubscribed", {"type": "content.*", "removed": 0}),
    ({"action": "heartbeat"}, "system.heartbeat", {}),
    ({"action": "authenticate", "token": token()}, "system.authenticated", {"userId": "ana"}),
    ({"action": "authenticate", "token": token(42)}, "system.authenticated", {"userId": "42"}),
    ({"action": "editStart", "contentType": "posts", "entryId": "1"}, "system.editing", {"conflict": False}),
    ({"action": "editStop", "contentType": "posts", "entryId": "1"}, "system.editing", {"editors": []}),
    ({"action": "presence"}, "system.presence", {"entries": []}),
]


@pytest.mark.parametrize(("message", "answer", "payload"), ANSWERS, ids=lambda value: json.dumps(value)[:60])
def test_answer(server: Server, message: dict[str, Any], answer: str, payload: dict[str, Any]) -> None:
    """Every action has the answer of the table, with `ref` and without."""
    with server.client() as client:
        for ref in (None, 0, 1.5, "", "a ref"):
            client.send(**message, **({} if ref is None else {"ref": ref}))
            got = client.receive(heartbeats=True)
            assert got["type"] == answer
            assert got["payload"].items() >= payload.items()
            assert got.get("ref") == ref
            assert ("ref" in got) == (ref is not None)
            assert "id" not in got


ERRORS = [
    ("{", "invalid_json", "not JSON"),
    ("", "invalid_json", "not JSON"),
    ("[" * 50000, "invalid_json", "nested too deep"),
    ('{"action": NaN}', "invalid_json", "NaN"),
    ("1" * 5000, "invalid_json", "not JSON"),
    ("[]", "invalid_message", "an array"),
    ("null", "invalid_message", "null"),
    ('"subscribe"', "invalid_message", "the string"),
    (b"\x00\x01", "invalid_message", "binary"),
    ({}, "invalid_message", "`action`"),
    ({"acton": "subscribe"}, "invalid_message", "did you mean `acton`?"),
    ({"action": 7}, "invalid_message", "the number 7"),
    ({"action": "subscribe", "ref": {}}, "invalid_message", "`ref`"),
    ({"action": "subscribe", "ref": True}, "invalid_message", "the boolean true"),
    ({"action": "subscribe", "ref": None}, "invalid_message", "null"),
    ({"action": "subscrbe"}, "unknown_action", "did you mean `subscribe`?"),
    ({"action": "fly"}, "unknown_action", "unsubscribe"),
    ({"action": "subscribe", "type": "con*"}, "invalid_type", "`type`"),
    ({"action": "subscribe", "type": "*.created"}, "invalid_type", "prefix"),
    ({"action": "subscribe", "type": "a.*.b"}, "invalid_type", "prefix"),
    ({"action": "subscribe", "type": "a..b"}, "invalid_type", "prefix"),
    ({"action": "subscribe", "type": ".*"}, "invalid_type", "prefix"),
    ({"action": "subscribe", "type": "a\n"}, "invalid_type", "prefix"),
    ({"action": "subscribe", "type": "a" * 200}, "invalid_type", "128 characters"),
    ({"action": "subscribe", "type": ""}, "invalid_type", 'the string ""'),
    ({"action": "subscribe", "type": None}, "invalid_type", "null"),
    ({"action": "subscribe", "contentType": ["posts"]}, "invalid_type", "`contentType`"),
    ({"action": "subscribe", "contentType": "posts.*"}, "invalid_type", "`contentType`"),
    ({"action": "unsubscribe", "type": 5}, "invalid_type", "the number 5"),
    ({"action": "subscribe", "since": "yesterday"}, "invalid_since", "1763832000123-0"),
    ({"action": "subscribe", "since": "-1-0"}, "invalid_since", "`since`"),
    ({"action": "subscribe", "since": "9" * 30 + "-0"}, "invalid_since", "`since`"),
    ({"action": "subscribe", "since": "\u0661-0"}, "invalid_since", "`since`"),
    ({"action": "subscribe", "since": 5}, "invalid_since", "the number 5"),
    ({"action": "authenticate"}, "invalid_message", "`token`"),
    ({"action": "authenticate", "tokn": "x"}, "invalid_message", "did you mean `tokn`?"),
    ({"action": "authenticate", "token": 5}, "invalid_message", "a string"),
    ({"action": "authenticate", "token": "nonsense"}, "invalid_token", "JWT"),
    ({"action": "authenticate", "token": token(key="k" * 32)}, "invalid_token", "key"),
    ({"action": "authenticate", "token": token(expires_in=-5)}, "token_expired", "fresh"),
    ({"action": "authenticate", "token": token(algorithm="HS384")}, "invalid_token", "HS256"),
    ({"action": "authenticate", "token": token(aud="elsewhere")}, "invalid_token", "aud"),
    ({"action": "authenticate", "token": token(user="")}, "invalid_token", "JWT"),
    ({"action": "authenticate", "token": token(user=True)}, "invalid_token", "JWT"),
    ({"action": "authenticate", "token": token(user=None)}, "invalid_token", "sub"),
    ({"action": "authenticate", "token": jwt.encode({"sub": "ana"}, KEY)}, "invalid_token", "exp"),
    ({"action": "authenticate", "token": token(nbf=time.time() + 900)}, "invalid_token", "clocks"),
    ({"action": "authenticate", "token": unsigned_token()}, "invalid_token", "HS256"),
    ({"action": "editStart", "contentType": "posts"}, "invalid_message", "`entryId`"),
    ({"action": "editStart", "contentType": "posts", "entryID": "1"}, "invalid_message", "did you mean `entryID`?"),
    ({"action": "editStart", "contentType": "*", "entryId": "1"}, "invalid_type", "not *"),
    ({"action": "editStart", "entryId": "1"}, "invalid_message", "`contentType`"),
    ({"action": "editStart", "contentType": "posts", "entryId": ""}, "invalid_message", "1 to 128"),
    ({"action": "editStart", "contentType": "posts", "entryId": 5}, "invalid_message", "the number 5"),
    ({"action": "editChange", "contentType": "posts", "entryId": "1", "payload": 1}, "not_editing", "editStart"),
    ({"action": "editChange", "contentType": "posts", "entryId": "1"}, "invalid_message", "`payload`"),
    ({"action": "presence", "entryId": 5}, "invalid_message", "`entryId`"),
    ({"action": "presence", "contentType": 5}, "invalid_type", "`contentType`"),
]


@pytest.mark.parametrize(("message", "code", "hint"), ERRORS, ids=lambda value: repr(value)[:60])
def test_error(server: Server, message: Any, code: str, hint: str) -> None:
    """Bad input is answered with its code and a sentence that helps, and the connection stays."""
    with server.client() as client:
        client.send_raw(message if isinstance(message, (str, bytes)) else json.dumps(message))
        error = client.receive()
        assert error["type"] == "system.error"
        assert error["payload"].keys() == {"code", "message", "action"}
        assert error["payload"]["code"] == code
        assert hint in error["payload"]["message"]
        action = message.get("action") if isinstance(message, dict) else None
        assert error["payload"]["action"] == (action if isinstance(action, str) else None)
        if isinstance(message, dict) and isinstance(message.get("token"), str):
            assert message["token"] not in json.dumps(error)
        assert client.subscribe()["recovered"] is True


def test_auth_not_configured() -> None:
    """Without a key a token cannot be checked, and the error says what sets one."""

    def without_key(app: Flask, hub: Hub) -> None:
        app.secret_key = None

    with Server(without_key) as server, server.client() as client:
        error = client.authenticate(token())["payload"]
        assert error["code"] == "auth_not_configured"
        assert "SWIFTCMS_WS_JWT_KEY" in error["message"]
        with pytest.raises(ValueError, match="SECRET_KEY"):
            server.hub.issue_token("ana")


MATCHES = [
    ("*", "*", True),
    ("*", "posts", True),
    ("*", "pages", False),
    ("content.*", "*", True),
    ("content.media.*", "*", True),
    ("content.media.added", "posts", True),
    ("content.media.added.*", "*", False),
    ("content", "*", False),
    ("content.media", "*", False),
    ("cont", "*", False),
    ("order.*", "posts", False),
]


def test_patterns(server: Server) -> None:
    """A pattern gets what it matches, and nothing else."""
    with contextlib.ExitStack() as stack:
        clients = [(stack.enter_context(server.client()), *match) for match in MATCHES]
        for client, pattern, content_type, _ in clients:
            client.subscribe(pattern, content_type)
        server.publish(1, "content.media.added")
        for client, pattern, content_type, matches in clients:
            got = [message["payload"] for message in client.rest()]
            assert got == ([{"n": 1}] if matches else []), (pattern, content_type)


def test_overlapping_subscriptions_deliver_once_and_can_be_left(server: Server) -> None:
    """An event that matches several subscriptions comes once; twice the same subscription is one."""
    with server.client() as client:
        for pattern in ("*", "content.*", "content.created", "content.created"):
            client.subscribe(pattern)
        client.subscribe("content.created", "posts")
        assert server.hub.stats()["subscriptions"] == 4
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}
        client.nothing_more()
        assert client.ask("unsubscribe", type="content.created")["payload"]["removed"] == 1
        assert client.ask("unsubscribe", type="content.created")["payload"]["removed"] == 0
        server.publish(2)
        assert client.receive()["payload"] == {"n": 2}
        assert client.ask("unsubscribe")["payload"] == {"type": "*", "contentType": "*", "removed": 3}
        server.publish(3)
        client.nothing_more()
        assert server.hub.stats()["subscriptions"] == 0


def test_authenticate_again_and_running_out() -> None:
    """A fresh token moves the end; when it comes, token_expired and 4401 do."""
    with Server() as server, server.client() as client:
        answer = client.authenticate(token(expires_in=600))
        expected = datetime.fromtimestamp(time.time() + 600, timezone.utc)
        expires_at = datetime.fromisoformat(answer["payload"]["expiresAt"].replace("Z", "+00:00"))
        assert abs((expires_at - expected).total_seconds()) < PATIENCE
        other = client.authenticate(token("eve"))["payload"]
        assert (other["code"], "another user" in other["message"]) == ("invalid_token", True)
        assert client.authenticate(server.hub.issue_token("ana", expires_in=1))["payload"]["userId"] == "ana"
        error = client.receive()
        assert (error["type"], error["payload"]["code"]) == ("system.error", "token_expired")
        closed = client.closing()
        assert (closed.code, "token" in (closed.reason or "")) == (4401, True)


def test_token_in_the_handshake(server: Server) -> None:
    """A token in the address or in a header signs in; a bad one is a 401 in JSON."""
    good = server.hub.issue_token("ana", role="editor")
    for options in ({"path": f"/ws?token={good}"}, {"headers": {"Authorization": f"Bearer {good}"}}):
        with server.client(**options) as client:
            assert client.hello["payload"]["userId"] == "ana"
    for bad, code in ((token(key="k" * 32), "invalid_token"), (token(expires_in=-1), "token_expired")):
        status, headers, body = server.handshake(f"/ws?token={bad}")
        assert (status, body["code"], headers["WWW-Authenticate"]) == (401, code, "Bearer")
        assert bad not in body["message"]
        assert server.handshake(Authorization=f"Bearer {bad}")[0] == 401


def test_audience_issuer_and_other_algorithms() -> None:
    """Audience and issuer are demanded once they are configured, and are in what issue_token signs."""
    with Server(JWT_AUDIENCE="cms", JWT_ISSUER="site", JWT_ALGORITHMS=["HS512"], JWT_KEY="j" * 64) as server:
        sign = lambda **claims: token(key="j" * 64, algorithm="HS512", **claims)  # noqa: E731
        with server.client() as client:
            right = {"aud": "cms", "iss": "site"}
            for claims in ({}, {"aud": "cms"}, {"iss": "site"}, {**right, "aud": "x"}, {**right, "iss": "x"}):
                assert client.authenticate(sign(**claims))["payload"]["code"] == "invalid_token"
            assert client.authenticate(sign(aud=["x", "cms"], iss="site"))["payload"]["userId"] == "ana"
            assert client.authenticate(server.hub.issue_token("ana"))["type"] == "system.authenticated"


def test_heartbeats_and_silence() -> None:
    """Everyone gets both kinds of heartbeat; who answers neither is ended with 4408, others stay."""
    with Server(HEARTBEAT=0.3) as server, server.client() as alive, server.client() as silent:
        assert alive.hello["payload"]["heartbeat"] == 0.3
        until(lambda: server.hub.stats()["connections"] == 2)
        while server.hub.stats()["connections"] == 2:
            assert alive.receive(heartbeats=True)["type"] == "system.heartbeat"
        assert alive.pings >= 2
        assert silent.closing().code == 4408
        alive.nothing_more()


def test_http_answers() -> None:
    """What is no handshake, or one that cannot be served, is answered over HTTP with a JSON sentence."""
    with Server(MAX_CONNECTIONS=2) as server:
        status, _, body = server.get("/ws")
        assert (status, json.loads(body)["code"]) == (426, "upgrade_required")
        assert "WebSocket" in json.loads(body)["message"]
        assert server.handshake(Origin="http://evil.example")[0] == 403
        for broken in (
            {"Sec_WebSocket_Key": None},
            {"Sec_WebSocket_Version": None},
            {"Sec_WebSocket_Version": "7"},
        ):
            status, _, body = server.handshake(**broken)
            assert status in (400, 426), broken
            assert body["code"] in ("bad_handshake", "upgrade_required")
        with server.client(), server.client():
            status, headers, body = server.handshake()
            assert (status, body["code"]) == (503, "too_many_connections")
            assert int(headers["Retry-After"]) > 0
        until(lambda: server.handshake()[0] == 101, "a free place")
        assert server.hub.stats()["refused_503"] >= 1


def test_server_without_a_socket(server: Server) -> None:
    """Where the WSGI server gives no socket, or has one thread, 501 names the servers that do."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    answer = server.app.test_client().get("/ws", headers=upgrade)
    assert (answer.status_code, answer.json["code"]) == (501, "not_supported")
    assert "gunicorn" in answer.json["message"]


def test_compression_is_refused_for_our_route_alone() -> None:
    """permessage-deflate is declined here; another flask-sock route of the site still accepts it."""
    with Server(lambda app, hub: Sock(app).route("/echo")(lambda ws: ws.send(ws.receive()))) as server:
        offer = {"Sec_WebSocket_Extensions": "permessage-deflate; client_max_window_bits"}
        assert "Sec-WebSocket-Extensions" not in server.handshake("/ws", **offer)[1]
        assert "permessage-deflate" in server.handshake("/echo", **offer)[1]["Sec-WebSocket-Extensions"]


# ---------------------------------------------------------------------------------------------------
# publish
# ---------------------------------------------------------------------------------------------------


def test_publish_from_anywhere(server: Server) -> None:
    """No context, no client and no thread of its own is needed; ids grow as numbers do."""
    first = server.publish(1)
    with server.client() as client:
        assert client.hello["payload"]["lastId"] == first
        client.subscribe()
        ids = [first]
        threading.Thread(target=lambda: ids.append(server.publish(2))).start()
        assert client.receive()["payload"] == {"n": 2}
        ids += [server.publish(n) for n in range(50)]
        assert [message["id"] for message in client.receive_many(50)] == ids[2:]
    numbers = [tuple(map(int, each.split("-"))) for each in ids]
    assert numbers == sorted(set(numbers))


def test_publish_serialises_as_the_app_does(server: Server) -> None:
    """Dates, UUIDs, Decimals and dataclasses go through app.json, as in the site's other answers."""
    with server.client() as client:
        client.subscribe()
        server.hub.publish("user.login", "users", {"a": date(2026, 1, 2), "b": UUID(int=7), "c": Decimal("1.5")})
        assert client.receive()["payload"] == {
            "a": "Fri, 02 Jan 2026 00:00:00 GMT",
            "b": str(UUID(int=7)),
            "c": "1.5",
        }
        for payload in (None, [], "text", 5, "☃ \u2028 </script>"):
            server.hub.publish("notification", "users", payload)
            assert client.receive()["payload"] == payload


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((5, "posts", {}), TypeError, "event_type"),
        (("", "posts", {}), ValueError, "event_type"),
        (("content.*", "posts", {}), ValueError, "event_type"),
        (("a b", "posts", {}), ValueError, "event_type"),
        (("x" * 200, "posts", {}), ValueError, "event_type"),
        (("system.connected", "posts", {}), ValueError, "event_type"),
        (("system", "posts", {}), ValueError, "event_type"),
        (("content.created", None, {}), TypeError, "content_type"),
        (("content.created", "*", {}), ValueError, "content_type"),
        (("content.created", "posts", len), TypeError, "payload"),
        (("content.created", "posts", {"x": float("nan")}), TypeError, "payload"),
        (("content.created", "posts", {1: 1, "a": 2}), TypeError, "payload"),
        (("content.created", "posts", {}, 5.5), TypeError, "to"),
        (("content.created", "posts", {}, ""), ValueError, "to"),
        (("content.created", "posts", {}, [None]), TypeError, "to"),
        (("content.created", "posts", {}, {"ana": 1}), TypeError, "to"),
    ],
    ids=repr,
)
def test_publish_refuses_in_the_caller(
    server: Server, arguments: tuple[Any, ...], error: type[Exception], named: str
) -> None:
    """A programmer's mistake raises at once, names the argument, and nothing is sent."""
    with server.client() as client:
        client.subscribe()
        with pytest.raises(error, match=f"^{named} "):
            server.hub.publish(*arguments[:3], to=arguments[3] if len(arguments) > 3 else None)
        client.nothing_more()
        assert server.hub.stats()["published"] == 0


def test_publish_refuses_what_would_cut_everyone() -> None:
    """A payload larger than any client's queue raises, instead of ending all who do not take it at once."""
    with Server(MAX_QUEUE=1000) as server, server.client() as client:
        client.subscribe()
        with pytest.raises(ValueError, match=r"^payload has .*SWIFTCMS_WS_MAX_QUEUE"):
            server.publish(1, padding="x" * 1000)
        client.nothing_more()


def test_publish_to_some(server: Server) -> None:
    """`to=` reaches the named users in all their tabs, and nobody else."""
    names = ["ana", "ana", "bob", "7", None]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in names]
        for client, name in zip(clients, names, strict=True):
            if name:
                client.authenticate(token(name))
            client.subscribe("notification")
        for number, to in enumerate(["ana", ["bob", 7], {"nobody"}, []]):
            server.publish(number, "notification", to=to)
        for client, name in zip(clients, names, strict=True):
            assert [m["payload"]["n"] for m in client.rest()] == {"ana": [0], "bob": [1], "7": [1], None: []}[name]


def test_one_order_for_all_under_load(server: Server) -> None:
    """Eight threads publish to twenty clients that ping and re-subscribe: each has all, once, in order.

    The clients do as the seed's Swift example: authenticate, subscribe, pong to heartbeats.
    """
    publishers, each, names = 8, 60, 20
    start = threading.Barrier(publishers + names)
    got: list[list[dict[str, Any]]] = [[] for _ in range(names)]

    def listen(index: int) -> None:
        with server.client() as client:
            client.send(action="authenticate", token=token(f"user-{index}"))
            client.send(action="subscribe", type="content.*", contentType="posts")
            assert client.receive_many(2)[1]["type"] == "system.subscribed"
            start.wait(PATIENCE)
            while len(got[index]) < publishers * each:
                message = client.receive(heartbeats=True)
                if message["type"] == "system.heartbeat":
                    client.send(action="pong")
                elif message["type"].startswith("content."):
                    got[index].append(message)
                    if len(got[index]) % 40 == 0:
                        client.sock.sendall(client._ws.send(Ping(b"are you there")))
                        client.send(action="subscribe", type="content.*", contentType="posts")
            assert client.close(1001).code == 1001

    def publish(index: int) -> None:
        start.wait(PATIENCE)
        for number in range(each):
            kind = ("created", "updated", "deleted", "published")[number % 4]
            server.publish(number, f"content.{kind}", by=index)

    run_all([*(lambda i=i: listen(i) for i in range(names)), *(lambda i=i: publish(i) for i in range(publishers))])
    order = [message["id"] for message in got[0]]
    assert order == sorted(set(order), key=lambda text: tuple(map(int, text.split("-"))))
    assert len(order) == publishers * each
    for messages in got:
        assert [message["id"] for message in messages] == order
    for index in range(publishers):
        assert [m["payload"]["n"] for m in got[0] if m["payload"]["by"] == index] == list(range(each))


@contextlib.contextmanager
def running(tasks: list[Callable[[], None]], timeout: float = 60) -> Iterator[None]:
    """Run each task in a thread beside the body; then wait for all, and raise what the first of them raised."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    yield
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


def run_all(tasks: list[Callable[[], None]], timeout: float = 60) -> None:
    with running(tasks, timeout):
        pass


# ---------------------------------------------------------------------------------------------------
# Flask: factory, hooks, configuration, signals, the end
# ---------------------------------------------------------------------------------------------------


def test_two_hubs_prefixes_and_the_ready_made_one() -> None:
    """Several hubs in a process keep their events apart; url_prefix moves the address."""
    other = Hub()

    def configure(app: Flask, hub: Hub) -> None:
        other.init_app(app, url_prefix="/shop", name="shop")
        app.register_blueprint(swiftcms_ws.blueprint, url_prefix="/ready", name="ready")

    with Server(configure) as server, server.client() as first:
        with server.client(path="/shop/ws") as second, server.client(path="/ready/ws") as third:
            for client in (first, second, third):
                client.subscribe()
            server.publish(1)
            other.publish("order.paid", "orders", {"n": 2})
            swiftcms_ws.publish("user.login", "users", {"n": 3})
            for number, client in enumerate((first, second, third), 1):
                assert client.receive()["payload"] == {"n": number}
                client.nothing_more()
        other.close()
        swiftcms_ws.hub.close()


def test_a_factory_called_twice_starts_anew() -> None:
    """A test suite makes an app for every test; the ready-made hub serves the latest."""
    for number in range(3):
        with Server(lambda app, hub: app.register_blueprint(swiftcms_ws.blueprint, name="ready", url_prefix="/r")) as s:
            with s.client(path="/r/ws") as client:
                client.subscribe()
                swiftcms_ws.publish("notification", "users", number)
                assert client.receive()["payload"] == number
                client.close()
            assert swiftcms_ws.hub.stats()["published"] == 1


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("HEARTBEET", 5, "did you mean `SWIFTCMS_WS_HEARTBEAT`"),
        ("HEARTBEAT", "25", "seconds"),
        ("HEARTBEAT", 0, "seconds"),
        ("HEARTBEAT", True, "seconds"),
        ("HISTORY", -1, "whole number"),
        ("MAX_QUEUE", 1.5, "whole number"),
        ("AUTH", "yes", '"required"'),
        ("ORIGINS", "https://a.example", "list"),
        ("ORIGINS", ["*"], "list"),
        ("ORIGINS", ["https://a.example/path"], "list"),
        ("HEARTBEAT", float("inf"), "seconds"),
        ("PORT", 8080, "there is no config key SWIFTCMS_WS_PORT; there are SWIFTCMS_WS_JWT_KEY"),
        ("JWT_ALGORITHMS", ["none"], "one family"),
        ("JWT_ALGORITHMS", ["HS256", "RS256"], "one family"),
        ("JWT_ALGORITHMS", [], "one family"),
        ("JWT_KEY", "", "not empty"),
        ("INSPECTOR", "no", "True or False"),
        ("RATE", 0, "messages a second"),
    ],
)
def test_a_wrong_config_key_raises_at_registration(key: str, value: object, hint: str) -> None:
    """A config key that does not exist, or a value of the wrong kind, is named at once."""
    app = Flask("site")
    app.config[f"SWIFTCMS_WS_{key}"] = value
    with pytest.raises(ValueError, match=re.escape(hint)) as caught:
        Hub().init_app(app)
    assert f"SWIFTCMS_WS_{key}" in str(caught.value)


def test_a_key_that_does_not_fit_its_algorithm_raises() -> None:
    """With a text for RS256 every good token would be refused as a bad one; so it raises, at once or at first use."""
    app = Flask("site")
    app.config.update(SWIFTCMS_WS_JWT_ALGORITHMS=["RS256"], SWIFTCMS_WS_JWT_KEY=KEY)
    with pytest.raises(ValueError, match="SWIFTCMS_WS_JWT_KEY must be a key for RS256"):
        Hub().init_app(app)
    other, hub = Flask("other"), Hub()
    other.config.update(SWIFTCMS_WS_JWT_ALGORITHMS=["RS256"], SECRET_KEY=KEY)
    hub.init_app(other)
    with pytest.raises(ValueError, match="SWIFTCMS_WS_JWT_KEY must be a key for RS256"):
        hub.publish("content.created", "posts", {})


def test_a_token_is_signed_with_the_key_that_checks_it(server: Server) -> None:
    """A SECRET_KEY that is changed while the site runs does not part what signs from what checks."""
    with server.client() as client:
        server.app.secret_key = KEY[::-1]
        assert client.authenticate(server.hub.issue_token("ana"))["type"] == "system.authenticated"


def test_a_config_key_set_too_late_raises_at_first_use() -> None:
    """What is set after registration would be ignored, so it raises; SECRET_KEY may come late."""
    hub, app = Hub(), Flask("site")
    hub.init_app(app)
    app.config["SWIFTCMS_WS_HISTORY"] = 5
    with pytest.raises(ValueError, match="SWIFTCMS_WS_HISTORY was set after"):
        hub.publish("content.created", "posts", {})
    del app.config["SWIFTCMS_WS_HISTORY"]
    app.secret_key = KEY
    assert hub.issue_token("ana")
    assert hub.publish("content.created", "posts", {})
    hub.close()


def test_identify_takes_the_sites_own_login() -> None:
    """The identify hook reads the session cookie of the handshake, in a context that ends with it."""
    seen: list[str] = []

    def configure(app: Flask, hub: Hub) -> None:
        @app.post("/login/<name>")
        def login(name: str) -> str:
            session["user"] = name
            return name

        @hub.identify
        def identify() -> str | None:
            g.seen = True
            return session.get("user")

        @app.teardown_appcontext
        def note(error: BaseException | None) -> None:
            if "seen" in g:
                seen.append("torn down")

    with Server(configure) as server:
        cookie = http(f"http://127.0.0.1:{server.port}/login/ana", "POST")[1]["Set-Cookie"].split(";")[0]
        with server.client(headers={"Cookie": cookie}) as client, server.client() as stranger:
            assert client.hello["payload"]["userId"] == "ana"
            assert stranger.hello["payload"]["userId"] is None
            assert seen == ["torn down", "torn down"]


def test_authorize_sees_the_pattern_and_a_context() -> None:
    """The authorize hook decides each subscription, as asked for, in a request context of its own."""
    asked: list[tuple[Any, ...]] = []

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: swiftcms_ws.User | None, event_type: str, content_type: str) -> bool:
            asked.append((user and user.id, user and user.claims.get("role"), event_type, content_type, request.path))
            return content_type == "posts" or bool(user and user.claims["role"] == "editor")

    with Server(configure) as server, server.client() as client:
        client.subscribe("content.*", "posts")
        refused = client.ask("subscribe", type="content.*")["payload"]
        assert (refused["code"], "content.*" in refused["message"]) == ("forbidden", True)
        assert client.ask("editStart", contentType="pages", entryId="1")["payload"]["code"] == "forbidden"
        assert client.ask("presence")["payload"]["code"] == "forbidden"
        client.authenticate(server.hub.issue_token("ana", role="editor"))
        client.subscribe("content.*")
        assert asked == [
            (None, None, "content.*", "posts", "/ws"),
            (None, None, "content.*", "*", "/ws"),
            (None, None, "user.editing", "pages", "/ws"),
            (None, None, "user.editing", "*", "/ws"),
            ("ana", "editor", "content.*", "*", "/ws"),
        ]


def test_who_waits_for_a_slow_hook_is_not_taken_for_dead() -> None:
    """While its own message is carried out nothing can be heard from a client: that is not its silence."""
    gate = threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            return gate.wait(PATIENCE)

    with Server(configure, HEARTBEAT=0.3) as server, server.client() as busy, server.client() as silent:
        silent._ws.send = lambda event: b""  # type: ignore[assignment,method-assign]  # it answers no ping
        busy.send(action="subscribe", ref=1)
        assert silent.closing().code == 4408
        gate.set()
        assert busy.receive()["type"] == "system.subscribed"


def test_a_hook_that_fails_is_logged_and_closes_with_1011(caplog: pytest.LogCaptureFixture) -> None:
    """A failure inside is logged with its traceback, and only that connection ends."""

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            return 1 / (0 if event_type == "broken" else 1) > 0

    with Server(configure) as server, server.client() as other, server.client() as client:
        other.subscribe()
        client.send(action="subscribe", type="broken")
        assert client.closing().code == 1011
        other.nothing_more()
    records = [record for record in caplog.records if record.name == "swiftcms_ws"]
    assert [record.levelname for record in records] == ["ERROR"]
    assert "ZeroDivisionError" in caplog.text


def test_signals() -> None:
    """Connections and events are told to whoever listens, which a site's own tests can do."""
    told: list[tuple[str, Any]] = []

    def on_connected(app: Flask, hub: Hub, client_id: str, user: Any) -> None:
        told.append(("connected", client_id))

    def on_disconnected(app: Flask, hub: Hub, client_id: str, user: Any) -> None:
        told.append(("disconnected", client_id))

    def on_published(app: Flask, hub: Hub, **event: Any) -> None:
        told.append(("published", event))

    with Server() as server, contextlib.ExitStack() as stack:
        stack.enter_context(swiftcms_ws.client_connected.connected_to(on_connected, server.app))
        stack.enter_context(swiftcms_ws.client_disconnected.connected_to(on_disconnected, server.app))
        stack.enter_context(swiftcms_ws.event_published.connected_to(on_published, server.app))
        with server.client() as client:
            client_id = client.hello["payload"]["clientId"]
            until(lambda: told, "the first signal")
            event_id = server.publish(1, to="ana")
            client.close()
        until(lambda: len(told) == 3, "all signals")
    event = {"id": event_id, "type": "content.created", "content_type": "posts", "payload": {"n": 1}, "to": "ana"}
    assert told == [("connected", client_id), ("published", event), ("disconnected", client_id)]


@pytest.mark.parametrize("action", ["subscribe", "editStart"])
def test_a_hook_that_exits_ends_that_client_alone(caplog: pytest.LogCaptureFixture, action: str) -> None:
    """SystemExit out of a hook is a failure as any other: logged, 1011, and no editor is left behind."""

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: Any, event_type: str, content_type: str) -> bool:
            return sys.exit("no") if content_type == "secrets" else True

    with Server(configure) as server, server.client() as client:
        client.ask("editStart", **POST)
        client.send(action=action, contentType="secrets", entryId="1")
        assert client.closing().code == 1011
        until(lambda: server.hub.stats()["connections"] == 0)
        until(lambda: not server.hub.editors("posts", "42"))
    assert "SystemExit" in caplog.text


def test_flush_waits_for_what_is_dispatched_while_the_hub_closes(server: Server) -> None:
    """flush() does not take a hub that is closing for one that has delivered all."""
    gate = threading.Event()
    engine = server.hub._running()
    engine.broker.in_order(gate.wait)  # the dispatcher is busy
    server.publish(1)
    closing = threading.Thread(target=server.hub.close)
    closing.start()
    assert engine.closing.wait(PATIENCE)
    until(lambda: engine.broker.in_order(bool).cancelled())
    assert server.hub.flush(0.1) is False
    gate.set()
    assert server.hub.flush(PATIENCE) is True
    closing.join(PATIENCE)


def test_a_log_handler_may_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that shows its log live publishes each line: also the warnings with which the hub itself starts."""
    hub, app = Hub(), Flask("site")
    app.secret_key = "short"
    hub.init_app(app)

    class Publishing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            published.append(hub.publish("log.line", "site", record.getMessage()))

    published: list[str] = []
    monkeypatch.setattr(logging.getLogger("swiftcms_ws"), "handlers", [Publishing()])
    run_all([lambda: published.append(hub.last_id())], timeout=PATIENCE)
    assert len(published) == 2
    hub.close()


def test_refusals_are_answers_where_a_site_traps_http_exceptions() -> None:
    """TRAP_HTTP_EXCEPTIONS is for the site's own; a refused handshake is no failure."""

    def configure(app: Flask, hub: Hub) -> None:
        app.config["TRAP_HTTP_EXCEPTIONS"] = True

    with Server(configure) as server:
        assert server.handshake(Origin="https://elsewhere.example")[0] == 403


def test_a_start_that_fails_leaves_no_threads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has no thread left for us, publish() says so, and leaves those alone that it got."""
    before, start = threading.active_count(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "heartbeat" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="new thread"):
            server.publish(1)
    until(lambda: threading.active_count() == before)
    monkeypatch.undo()
    server.publish(2)


def test_disconnect_reaches_who_is_just_coming() -> None:
    """A user who was asked for before a ban, and is connected after it, is ended as all others of hers."""
    asked, go_on = threading.Event(), threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @hub.identify
        def identify() -> str:
            user = "ana"  # who was not banned when this was looked up
            asked.set()
            assert go_on.wait(PATIENCE)
            return user

    with Server(configure) as server:

        def come() -> None:
            with server.client() as ana:
                assert ana.closing().code == 4401

        with running([come]):
            assert asked.wait(PATIENCE)
            assert server.hub.disconnect("ana") == 0
            go_on.set()
        with server.client() as later:
            assert later.ask("heartbeat")["type"] == "system.heartbeat"


def test_disconnect_flush_stats_and_close() -> None:
    """What a site calls: a user's connections end with 4401, all others with 1001 in the end."""
    with Server() as server, server.client() as ana, server.client() as bob:
        ana.authenticate(server.hub.issue_token("ana"))
        for client in (ana, bob):
            client.subscribe("content.*")
        server.publish(1)
        assert server.hub.flush()
        stats = server.hub.stats()
        assert (stats["connections"], stats["subscriptions"]) == (2, 2)
        assert (stats["published"], stats["delivered"], stats["queue_length"], stats["waiting_bytes"]) == (1, 2, 0, 0)
        assert server.hub.disconnect("ana") == 1
        assert ana.receive()["payload"] == {"n": 1}
        assert ana.closing().code == 4401
        until(lambda: server.hub.stats()["connections"] == 1)
        assert server.hub.disconnect("ana") == 0
        closer = threading.Thread(target=server.hub.close)
        closer.start()
        assert bob.closing().code == 1001
        closer.join(PATIENCE)
        assert server.handshake()[0] == 503
        until(lambda: server.hub.stats()["connections"] == 0)
        server.publish(2)  # a request that outlives the hub is not to fail


# ---------------------------------------------------------------------------------------------------
# The connection: one writer, clean ends, slow clients
# ---------------------------------------------------------------------------------------------------


def test_who_comes_while_the_hub_closes_is_cut_too(server: Server) -> None:
    """A handshake that close() has not waited for to the end gets 1001, and goes even if it does not want to."""
    gate = threading.Event()
    server.app.teardown_request(lambda error: (gate.wait(PATIENCE), None)[1])
    registry = server.hub._running().registry
    with open_raw(server.port) as lingers:
        until(lambda: registry.places == 1)
        assert not server.hub.close(timeout=0.1)
        gate.set()
        assert close_code(read_to_the_end(lingers)) == 1001
        until(lambda: registry.places == 0, "its end, though it never answered")


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_a_client_that_closes_gets_its_close_frame_and_then_the_end(server: Server, code: int) -> None:
    """The close code comes back, then the stream ends: no HTTP response after it (the client checks)."""
    with server.client() as client:
        client.subscribe()
        assert client.close(code).code == code
    until(lambda: server.hub.stats()["connections"] == 0)


def test_a_client_that_vanishes_leaves_nothing(server: Server) -> None:
    """A reset, an end without a close frame and a half-closed socket all free what they held."""
    before = threading.active_count()
    for end in (Client.reset, lambda c: c.sock.close(), lambda c: c.sock.shutdown(socket.SHUT_WR)):
        client = server.client()
        client.subscribe()
        client.ask("editStart", contentType="posts", entryId="1")
        end(client)
        until(lambda: server.hub.stats()["connections"] == 0)
        until(lambda: not server.hub.editors("posts", "1"))
        client.sock.close()
    until(lambda: threading.active_count() <= before + 3, "the end of all threads but the hub's three")
    assert server.hub.stats()["subscriptions"] == 0


def test_pongs_and_events_are_never_mixed(server: Server) -> None:
    """The library's own pongs go between frames, not into them, with large frames and a slow reader."""
    with server.client(receive_buffer=4096) as client:
        client.subscribe()
        expected = 60
        publisher = threading.Thread(
            target=lambda: [server.publish(n, padding="x" * 15_000) for n in range(expected)]
        )
        publisher.start()
        got = []
        while len(got) < expected:
            client.sock.sendall(Frames.masked(0x9, b"p" * 100))
            got.append(client.receive()["payload"]["n"])
        assert got == list(range(expected))
        publisher.join(PATIENCE)


def stuck_reader(server: Server) -> Client:
    client = server.client(receive_buffer=2048)
    client.subscribe()
    return client


def test_a_stuck_reader_costs_the_others_nothing_and_is_cut() -> None:
    """One that never reads is ended with 1013; the others have everything, and publish never waits for it.

    What it reads afterwards is whole and in order: events from the first on, then the close frame.
    """
    with Server(MAX_QUEUE=200_000) as server, stuck_reader(server) as stuck, server.client() as healthy:
        healthy.subscribe()
        for number in range(400):
            server.publish(number, padding="x" * 4000)
        assert [message["payload"]["n"] for message in healthy.receive_many(400)] == list(range(400))
        until(lambda: server.hub.stats()["slow_clients"] == 1 or stuck_is_ending(server))
        got = []
        with pytest.raises(Closed) as closed:
            while True:
                got.append(stuck.receive()["payload"]["n"])
        assert closed.value.code == 1013
        assert got == list(range(len(got)))
        assert 0 < len(got) < 400
        until(lambda: server.hub.stats()["slow_clients"] == 1)
        assert server.hub.flush()
        healthy.nothing_more()


def stuck_is_ending(server: Server) -> bool:
    assert server.hub._engine is not None
    return any(connection.is_ending for connection in server.hub._engine.registry.connections())


def test_bytes_split_by_a_full_socket_arrive_whole_and_in_order() -> None:
    """A slow reader inside its queue loses nothing; flush() waits for what the kernel has not taken."""
    with Server(MAX_QUEUE=50_000_000) as server, stuck_reader(server) as slow:
        count, padding = 500, "x" * 20_000
        for number in range(count):
            server.publish(number, padding=padding)
        assert server.hub.flush(0.2) is False
        assert server.hub.stats()["waiting_bytes"] > 0
        flushed: list[bool] = []
        waiter = threading.Thread(target=lambda: flushed.append(server.hub.flush(PATIENCE)))
        waiter.start()
        messages = slow.receive_many(count)
        assert [message["payload"]["n"] for message in messages] == list(range(count))
        assert all(message["payload"]["padding"] == padding for message in messages)
        waiter.join(PATIENCE)
        assert flushed == [True]
        assert server.hub.stats()["waiting_bytes"] == 0
        assert slow.ask("heartbeat")["type"] == "system.heartbeat"


def test_a_slow_reader_is_served_where_no_descriptor_is_left(server: Server) -> None:
    """With `ulimit -n` used up, as by a thousand clients, what waits for a slow one is written all the same."""
    with stuck_reader(server) as client:
        client.subscribe()
        for number in range(200):
            server.publish(number, text="x" * 4000)
        until(lambda: server.hub.stats()["waiting_bytes"] > 0)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert [message["payload"]["n"] for message in client.receive_many(200)] == list(range(200))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_reader_that_wakes_up_holds_nobody_up() -> None:
    """Thousands of small events that wait for one client go to it in few calls, and not all at one blow.

    Whoever publishes to it meanwhile waits for its lock, and with the dispatcher all other clients.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        calls: list[int] = []

        class Counting:
            def send(self, data: bytes) -> int:
                calls.append(len(data))
                return len(data) if is_awake else ours.send(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(ours, name)

        is_awake = False
        attended: list[Any] = []
        connection = swiftcms_ws.Connection("c", Counting(), 50_000_000, attended.append)  # type: ignore[arg-type]
        until(lambda: connection.send(b"x" * 500) or attended)
        for _ in range(10_000):
            connection.send(b"x" * 500)
        is_awake = True
        calls.clear()
        rounds = 1
        while connection.go_on(time.monotonic()):
            rounds += 1
        assert connection.waiting_bytes == 0
        assert len(calls) < 10_000 * 500 / swiftcms_ws.BATCH_BYTES * 1.2
        assert rounds > 10_000 * 500 / swiftcms_ws.ROUND_BYTES / 2


def test_a_slow_reader_is_still_heard() -> None:
    """While its queue is full of events, a client's own messages are carried out."""
    with Server(MAX_QUEUE=50_000_000) as server, stuck_reader(server) as slow:
        for number in range(200):
            server.publish(number, padding="x" * 20_000)
        until(lambda: server.hub.stats()["waiting_bytes"] > 0)
        slow.send(action="unsubscribe")
        until(lambda: server.hub.stats()["subscriptions"] == 0)


def test_publish_waits_for_a_dispatcher_that_is_far_behind(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backlog is bounded: publish() waits for room, and then nothing is lost or out of order."""
    monkeypatch.setattr(swiftcms_ws, "BACKLOG_BYTES", 20_000)
    with server.client() as client:
        client.subscribe()
        engine = server.hub._running()
        gate, published = threading.Event(), []
        engine.broker.in_order(lambda: gate.wait(PATIENCE))
        publisher = threading.Thread(target=lambda: published.extend(server.publish(n) for n in range(100)))
        publisher.start()
        until(lambda: server.hub.stats()["queue_length"] >= 15)
        publisher.join(0.2)
        assert publisher.is_alive()
        assert server.hub.stats()["queue_length"] <= 21
        gate.set()
        assert [message["payload"]["n"] for message in client.receive_many(100)] == list(range(100))
        publisher.join(PATIENCE)
        assert len(published) == 100


def self_signed(directory: Path) -> tuple[str, str]:
    """Make a certificate for 127.0.0.1 with openssl."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


def tls(tmp_path: Path) -> tuple[Callable[[Flask, Hub], None], ssl.SSLContext]:
    """Return what has a Server speak TLS, and a context for its clients."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    certificate = self_signed(tmp_path)

    def configure(app: Flask, hub: Hub) -> None:
        app.config["TEST_SSL"] = certificate

    return configure, trusting


def test_tls_a_burst_is_not_taken_for_a_slow_client(tmp_path: Path) -> None:
    """What a kernel has room for does not wait with TLS either: twice the queue at once ends nobody."""
    configure, trusting = tls(tmp_path)
    with (
        Server(configure) as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as plain,
        Client(server.port, sock=trusting.wrap_socket(plain)) as client,
    ):
        client.subscribe()
        for number in range(2000):
            server.publish(number, padding="x" * 1000)
        assert [message["payload"]["n"] for message in client.receive_many(2000)] == list(range(2000))


def test_tls_in_the_process(tmp_path: Path) -> None:
    """`flask run --cert` works: every byte goes through the same place, and a slow reader loses nothing."""
    configure, trusting = tls(tmp_path)
    with Server(configure, MAX_QUEUE=50_000_000) as server:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(PATIENCE)
        plain.connect(("127.0.0.1", server.port))
        with Client(server.port, sock=trusting.wrap_socket(plain)) as client:
            client.subscribe()
            for number in range(300):
                server.publish(number, padding="x" * 20_000)
            until(lambda: server.hub.stats()["waiting_bytes"] > 0)
            assert [message["payload"]["n"] for message in client.receive_many(300)] == list(range(300))
            client.subscribe()
            server.publish(padding="x" * 9_000_000)
            until(lambda: server.hub.stats()["waiting_bytes"] > 6_000_000)
            left = server.hub.stats()["waiting_bytes"]
            for _ in range(100):
                client._read(PATIENCE)
            what = "that what a client has read of a large event counts as waiting no more"
            until(lambda: server.hub.stats()["waiting_bytes"] < left - 100_000, what)
        until(lambda: server.hub.stats()["connections"] == 0)


# ---------------------------------------------------------------------------------------------------
# History: resume with `since`
# ---------------------------------------------------------------------------------------------------


def test_resume_replays_what_was_missed_and_goes_live(server: Server) -> None:
    """`since` brings exactly what came after it for this subscription, then what is new."""
    with server.client() as client:
        start = client.hello["payload"]["lastId"]
    ids = [server.publish(n) for n in range(4)]
    server.hub.publish("order.paid", "orders", {})
    for number, (since, missed) in enumerate([(start, [0, 1, 2, 3]), (ids[1], [2, 3, 4]), (ids[3], [4, 5])], 4):
        with server.client() as client:
            answer = client.subscribe("content.*", since=since)
            assert (answer["recovered"], answer["replayed"]) == (True, len(missed))
            server.publish(number)
            assert [m["payload"]["n"] for m in client.rest()] == [*missed, number]


def test_resume_beyond_the_history_is_told() -> None:
    """What the history does not reach, an id of the future or of another process: recovered is false."""
    with Server(HISTORY=50) as server:
        ids = [server.publish(n) for n in range(100)]
        for since, count in ((ids[0], None), (ids[48], None), (ids[49], 50), (ids[98], 1), (ids[99], 0)):
            with server.client() as client:
                answer = client.subscribe(since=since)
                assert (answer["recovered"], answer["replayed"]) == (count is not None, count or 0)
                client.nothing_more() if not count else client.receive_many(count)
        milliseconds, counter = map(int, ids[99].split("-"))
        for unknown in ("0-0", f"{milliseconds}-{counter + 1}", f"{milliseconds + 9}-0", f"{milliseconds - 9**9}-0"):
            with server.client() as client:
                assert client.subscribe(since=unknown)["recovered"] is False
                client.nothing_more()
    with Server(HISTORY=0) as server, server.client() as client:
        first = server.publish(0)
        assert client.subscribe("content.*", since=first)["recovered"] is True
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}
        assert client.subscribe(since=first)["recovered"] is False


def test_resume_respects_to_and_who_is_signed_in() -> None:
    """Replay shows a user what was sent to her while she was away, and nobody else's."""
    with Server() as server:
        start = server.publish(0)
        server.publish(1, "notification", to="ana")
        server.publish(2, "notification", to="bob")
        for user, numbers in (("ana", [1]), ("bob", [2]), ("eve", [])):
            with server.client() as client:
                client.authenticate(token(user))
                assert client.subscribe("notification", since=start)["replayed"] == len(numbers)
                assert [m["payload"]["n"] for m in client.receive_many(len(numbers))] == numbers
                client.nothing_more()
        with server.client() as client:
            client.subscribe("notification")
            event = server.publish(3, "notification", to="ana")
            client.authenticate(token("ana"))
            assert client.subscribe("notification", since=start)["replayed"] == 2
            assert [m["payload"]["n"] for m in client.receive_many(2)] == [1, 3]
            server.publish(4, "notification", to="ana")
            assert client.receive()["payload"]["n"] == 4
            assert client.subscribe("notification", since=event)["replayed"] == 0
            client.nothing_more()


def test_overlapping_subscriptions_resumed_together_deliver_once() -> None:
    """What an earlier subscription of the connection has brought is not replayed by a later one."""
    with Server() as server:
        start = server.publish(0)
        for n in range(1, 5):
            server.publish(n, ("content.created", "user.login")[n % 2])
        with server.client() as client:
            assert client.subscribe("content.*", since=start)["replayed"] == 2
            assert client.subscribe("*", since=start)["replayed"] == 2
            assert client.subscribe("user.login", since=start)["replayed"] == 0
            assert sorted(m["payload"]["n"] for m in client.receive_many(4)) == [1, 2, 3, 4]
            server.publish(5)
            assert client.receive()["payload"]["n"] == 5
            client.nothing_more()


def test_who_replays_again_and_again_is_limited(server: Server) -> None:
    """A replay is work for the dispatcher, for which all others wait: the whole history counts as 20 messages."""
    with server.client() as client:
        since = client.hello["payload"]["lastId"]
        for number in range(1000):
            server.publish(number)
        codes = []
        for _ in range(20):
            client.ask("unsubscribe")
            codes.append(client.ask("subscribe", since=since)["payload"].get("code"))
        assert codes[:3] == [None] * 3
        assert "rate_limited" in codes


def test_a_long_replay_is_not_taken_for_a_slow_client() -> None:
    """A history larger than MAX_QUEUE can still be resumed, or its client would be cut for ever."""
    with Server(MAX_QUEUE=50_000) as server:
        start = server.publish(0)
        for n in range(1, 200):
            server.publish(n, padding="x" * 20_000)
        with server.client(receive_buffer=4096) as client:
            client.send(action="subscribe", since=start)
            assert client.receive()["payload"]["replayed"] == 199
            server.publish(200)
            assert [m["payload"]["n"] for m in client.receive_many(200)] == list(range(1, 201))


class Proxy:
    """A TCP relay before a server that can reset whatever goes through it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # the server is down
                    near.close()
                    continue
                with self._lock:
                    self._pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset every connection, both ways."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for sock in itertools.chain(*pairs):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()
        self.cut()


def publish_steadily(publish: Callable[[int], object], stop: threading.Event, rate: int = 500) -> list[int]:
    """Publish numbers at a steady rate until `stop`; return them."""
    numbers = []
    began = time.monotonic()
    while not stop.wait(max(0, began + len(numbers) / rate - time.monotonic())):
        publish(len(numbers))
        numbers.append(len(numbers))
    return numbers


def test_thirty_cuts_at_random_points_lose_nothing() -> None:
    """A client whose line is reset 30 times under 500 events a second has each once, in order."""
    chance = random.Random(7)
    stop, published = threading.Event(), []
    got: list[int] = []
    with Server(RATE=1000) as server, Proxy(server.port) as proxy:
        last = server.publish(-1)
        publisher = threading.Thread(target=lambda: published.extend(publish_steadily(server.publish, stop)))
        publisher.start()
        cuts = 0
        while not (cuts == 30 and stop.is_set() and len(got) == len(published)):
            with contextlib.suppress(Closed, OSError), Client(proxy.port) as client:
                cutter = threading.Timer(chance.uniform(0, 0.08), proxy.cut)
                if cuts < 30:
                    cuts += 1
                    cutter.start()
                else:
                    stop.set()
                    publisher.join(PATIENCE)
                client.send(action="subscribe", type="content.*", since=last)
                while not (stop.is_set() and len(got) == len(published)):
                    message = client.receive()
                    if message["type"] == "system.subscribed":
                        assert message["payload"]["recovered"] is True
                    else:
                        got.append(message["payload"]["n"])
                        last = message["id"]
    assert got == published


# ---------------------------------------------------------------------------------------------------
# Web servers: Werkzeug, flask run, gunicorn; and their ends
# ---------------------------------------------------------------------------------------------------

# A busy machine makes everything slower, the bound of two seconds included.
SLOWNESS = 3 if os.environ.get("CI") else 1

SITE = """
import os
from flask import Flask, request
from swiftcms_ws import blueprint, hub, publish

app = Flask(__name__)
app.secret_key = "a key of more than thirty-two bytes, for tests"
app.config["SWIFTCMS_WS_MAX_CONNECTIONS"] = 500
app.config["SWIFTCMS_WS_HEARTBEAT"] = float(os.environ.get("TEST_HEARTBEAT", 25))
app.register_blueprint(blueprint)

@app.post("/publish")
def publish_it():
    return {"id": publish("content.created", "posts", request.json)}

if __name__ == "__main__":
    import sys
    app.run(port=int(sys.argv[1]))
"""
WERKZEUG = ("{python}", "site_app.py", "{port}")
FLASK_RUN = ("{python}", "-m", "flask", "--app", "site_app", "run", "--port", "{port}")
GUNICORN = ("{python}", "-m", "gunicorn", "site_app:app", "--bind", "127.0.0.1:{port}")
GTHREAD = (*GUNICORN, "--worker-class", "gthread", "--threads", "501")
SERVERS = {"werkzeug": WERKZEUG, "flask run": FLASK_RUN, "gunicorn gthread": GTHREAD}


def site(tmp_path: Path, command: tuple[str, ...], *more: str, **environ: str) -> Process:
    (tmp_path / "site_app.py").write_text(SITE)
    port = free_port()
    filled = [part.format(python=sys.executable, port=port) for part in (*command, *more)]
    return Process(*filled, cwd=tmp_path, port=port, **environ)


def publish_over_http(process: Process, **payload: Any) -> str:
    status, _, body = http(f"http://127.0.0.1:{process.port}/publish", "POST", payload)
    assert status == 200, body
    return str(json.loads(body)["id"])


def talk(process: Process) -> None:
    """The smoke test: greet, subscribe, publish from a view, answer, close."""
    with process.client() as client:
        client.subscribe("content.*", "posts")
        event_id = publish_over_http(process, n=1)
        message = client.receive()
        assert (message["id"], message["payload"]) == (event_id, {"n": 1})
        assert client.ask("heartbeat")["type"] == "system.heartbeat"
        assert client.close().code == 1000


@pytest.mark.parametrize("server_name", SERVERS)
def test_servers(tmp_path: Path, server_name: str) -> None:
    """The same conversation under each server, with nothing in its log that looks like trouble."""
    with site(tmp_path, SERVERS[server_name]) as process:
        talk(process)
        log = process.output()
    assert "Traceback" not in log
    assert "ERROR" not in log.upper()


@pytest.mark.parametrize("server_name", SERVERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends(tmp_path: Path, server_name: str, number: int) -> None:
    """A signal ends the server within two seconds, and each of two hundred clients hears 1001 first."""
    with site(tmp_path, SERVERS[server_name]) as process, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(process.client()) for _ in range(200)]
        # A signal that comes while a thread is given its client is not for us: Werkzeug closes that client's
        # socket, gunicorn waits for a lock that it holds itself. Both are past it when they end a later request.
        with socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE) as later:
            later.sendall(b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while later.recv(4096):
                pass
        began = time.monotonic()
        process.popen.send_signal(number)
        for client in clients:
            assert client.closing().code == 1001
            client.sock.close()
        process.popen.wait(PATIENCE)
        took = time.monotonic() - began
        log = process.output()
    assert took < 2 * SLOWNESS, log
    assert "Traceback" not in log


def test_gunicorn_recycles_a_worker(tmp_path: Path) -> None:
    """A worker that --max-requests replaces says 1001, and its clients come back to the next one."""
    with site(tmp_path, GTHREAD, "--max-requests", "5") as process:
        with process.client() as client:
            for number in range(5):
                publish_over_http(process, n=number)
            assert client.closing().code == 1001
        talk(process)


def test_gunicorn_preloads(tmp_path: Path) -> None:
    """With --preload the module is loaded before the fork; the threads start after it."""
    with site(tmp_path, GTHREAD, "--preload") as process:
        talk(process)


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (GUNICORN, "gthread"),
        (("{python}", "-m", "waitress", "--listen=127.0.0.1:{port}", "site_app:app"), "gunicorn"),
    ],
    ids=["gunicorn sync", "waitress"],
)
def test_servers_that_cannot(tmp_path: Path, command: tuple[str, ...], hint: str) -> None:
    """A server without threads or without a socket refuses, naming those that can; it does not hang."""
    with site(tmp_path, command) as process:
        with pytest.raises(Refused, match="501"):
            process.client()
        publish_over_http(process, n=1)
        until(lambda: hint in process.output())


def test_warnings_about_a_deployment(tmp_path: Path) -> None:
    """Several processes, or more connections allowed than threads, are told once, with the cure."""
    with site(tmp_path, GUNICORN, "--worker-class", "gthread", "--threads", "40", "--workers", "2") as process:
        for _ in range(12):
            with process.client() as client:
                client.close()
        log = process.output()
    assert 1 <= log.count("several server processes") <= 2, log
    assert 1 <= log.count("below --threads") <= 2, log


# ---------------------------------------------------------------------------------------------------
# Presence: who is editing, conflicts, live changes
# ---------------------------------------------------------------------------------------------------

POST = {"contentType": "posts", "entryId": "42"}


def names(message: dict[str, Any]) -> list[Any]:
    return [editor["userId"] for editor in message["payload"]["editors"]]


def test_editing_is_told_conflicts_come_and_go() -> None:
    """Each editor is told of the other, both of the conflict, and the one who remains that it is over."""
    with Server() as server, server.client() as ana, server.client() as bob, server.client() as reader:
        for client, name in ((ana, "ana"), (bob, "bob")):
            client.authenticate(token(name))
        for client in (ana, bob, reader):
            client.subscribe("user.*", "posts")
        answer = ana.ask("editStart", **POST)
        assert (answer["type"], answer["contentType"]) == ("system.editing", "posts")
        assert answer["payload"].keys() == {"entryId", "editors", "conflict"}
        assert answer["payload"]["editors"][0].keys() == {"clientId", "userId", "since"}
        assert (names(answer), answer["payload"]["conflict"]) == (["ana"], False)
        assert bob.ask("editStart", **POST)["payload"]["conflict"] is True
        assert [editor["userId"] for editor in server.hub.editors("posts", 42)] == ["ana", "bob"]
        for client in (ana, bob, reader):
            first, second = client.receive(), client.receive()
            assert (first["type"], second["type"]) == ("user.editing", "user.editing")
            assert first["payload"].keys() == {"entryId", "editor", "editors", "conflict"}
            assert (names(first), first["payload"]["conflict"]) == (["ana"], False)
            assert (names(second), second["payload"]["conflict"]) == (["ana", "bob"], True)
            assert second["payload"]["editor"]["userId"] == "bob"
            assert "id" not in second
        assert ana.ask("editStart", **POST)["payload"]["conflict"] is True
        ana.reset()
        for client in (bob, reader):
            left = client.receive()
            assert (left["type"], names(left), left["payload"]["conflict"]) == ("user.stoppedEditing", ["bob"], False)
            assert left["payload"]["editor"]["userId"] == "ana"
        entries = reader.ask("presence", contentType="posts")["payload"]["entries"]
        assert [(e["contentType"], e["entryId"], len(e["editors"])) for e in entries] == [("posts", "42", 1)]
        assert reader.ask("presence", entryId="43")["payload"]["entries"] == []
        assert reader.ask("presence", contentType="pages")["payload"]["entries"] == []
        assert names(bob.ask("editStop", **POST)) == []
        assert reader.receive()["payload"]["editors"] == []
        for client in (bob, reader):
            client.rest()
        with server.client() as late:
            assert late.subscribe(since=late.hello["payload"]["lastId"])["replayed"] == 0
            late.nothing_more()


def test_changes_reach_the_other_editors_in_order_and_nobody_else() -> None:
    """What is typed goes to the entry's other editors, subscribed or not, at typing speed, and is not kept."""
    with Server(RATE=10_000) as server, contextlib.ExitStack() as stack:
        ana, bob, eve, reader = (stack.enter_context(server.client()) for _ in range(4))
        reader.subscribe()
        for client in (ana, bob):
            client.ask("editStart", **POST)
        eve.ask("editStart", contentType="posts", entryId="43")
        reader.rest()
        for number in range(300):
            ana.send(action="editChange", payload={"n": number, "any": [None, "☃"]}, **POST)
        messages = bob.receive_many(300)
        assert [message["payload"]["change"]["n"] for message in messages] == list(range(300))
        assert messages[0]["type"] == "user.edited"
        assert messages[0]["contentType"] == "posts"
        assert messages[0]["payload"].keys() == {"entryId", "editor", "change"}
        assert messages[0]["payload"]["editor"]["clientId"] == ana.hello["payload"]["clientId"]
        for client in (ana, eve, reader):
            client.nothing_more()


def test_all_orders_of_coming_and_going_end_empty() -> None:
    """Three clients, every order of start, stop and disconnect: conflict is true exactly while there are two."""
    steps = [(who, what) for who in range(3) for what in ("start", "end")]
    orders = [
        order
        for order in itertools.permutations(steps)
        if all(order.index((who, "start")) < order.index((who, "end")) for who in range(3))
    ]
    assert len(orders) == 90
    with Server(RATE=10_000) as server, server.client() as watcher:
        watcher.subscribe("user.*", "posts")
        for number, order in enumerate(orders):
            entry = {"contentType": "posts", "entryId": str(number)}
            clients = [server.client() for _ in range(3)]
            editing: set[int] = set()
            for step, (who, what) in enumerate(order):
                if what == "start":
                    editing.add(who)
                    assert clients[who].ask("editStart", **entry)["payload"]["conflict"] == (len(editing) > 1)
                else:
                    editing.discard(who)
                    match (number + step) % 3:
                        case 0:
                            clients[who].ask("editStop", **entry)
                        case 1:
                            clients[who].close()
                        case 2:
                            clients[who].reset()
                told = watcher.receive()["payload"]
                assert (len(told["editors"]), told["conflict"]) == (len(editing), len(editing) > 1)
            for client in clients:
                client.sock.close()
        assert watcher.ask("presence")["payload"]["entries"] == []


def test_coming_and_going_at_once_from_many_threads_ends_empty() -> None:
    """Starts, stops and ends at the same moment leave nobody behind, and the last word is no conflict."""
    with Server(RATE=10_000, MAX_QUEUE=50_000_000) as server, server.client() as watcher:
        watcher.subscribe("user.*", "posts")

        def come_and_go(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(6):
                with server.client() as client:
                    for _ in range(chance.randrange(1, 6)):
                        client.send(action=chance.choice(["editStart", "editStop"]), **POST)
                    if chance.random() < 0.5:
                        client.rest()
                    chance.choice([client.reset, client.close, lambda: None])()

        run_all([lambda seed=seed: come_and_go(seed) for seed in range(12)])
        until(lambda: server.hub.stats()["connections"] == 1)
        until(lambda: not server.hub.editors("posts", "42"))
        messages = watcher.rest()
        for message in messages:
            assert message["payload"]["conflict"] == (len(message["payload"]["editors"]) > 1)
        assert messages[-1]["payload"]["editors"] == []


# ---------------------------------------------------------------------------------------------------
# Redis: several processes
# ---------------------------------------------------------------------------------------------------

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis = pytest.mark.skipif(REDIS is None, reason="there is no redis-server on this machine")


class Redis:
    """A redis-server of our own, which can die, hang and come back, with its data or without."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        assert REDIS is not None
        self.popen = subprocess.Popen(
            [REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory),
             "--appendonly", "yes", "--appendfsync", "always", "--save", ""],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        until(self._answers, "the start of Redis")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
            sock.settimeout(1)
            sock.sendall(b"PING\r\n")
            return sock.recv(100).startswith(b"+PONG")
        return False

    def kill(self, forget: bool = False) -> None:
        self.popen.kill()
        self.popen.wait(PATIENCE)
        if forget:
            shutil.rmtree(self._directory / "appendonlydir", ignore_errors=True)

    def send(self, command: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock:
            sock.sendall(f"{command}\r\n".encode())
            assert sock.recv(1000)[:1] in b"+:$", command


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    yield server
    server.popen.send_signal(signal.SIGCONT)
    server.kill()


@needs_redis
def test_redis_one_order_for_two_processes(redis: Redis) -> None:
    """What either publishes reaches the clients of both, once, in one order; `to=` and lists too."""
    with Server(REDIS_URL=redis.url) as first, Server(REDIS_URL=redis.url) as second:
        servers = (first, second)
        with first.client() as one, second.client() as two:
            for client in (one, two):
                client.authenticate(token())
                client.subscribe()
            run_all([lambda s=s: [s.publish(n) for n in range(100)] for s in servers])
            messages = one.receive_many(200)
            assert messages == two.receive_many(200)
            ids = [tuple(map(int, message["id"].split("-"))) for message in messages]
            assert ids == sorted(set(ids))
            batch = first.hub.publish_many([("content.created", "posts", n, "ana") for n in range(500)])
            second.publish(0, to="eve")
            assert [message["id"] for message in two.receive_many(500)] == batch
            assert second.hub.flush()
            assert first.hub.flush()
            two.nothing_more()
        with second.client() as other:
            assert other.subscribe(since=messages[150]["id"])["replayed"] == 49
            assert [message["id"] for message in other.receive_many(49)] == [m["id"] for m in messages[151:]]


@needs_redis
def test_redis_resume_after_every_process_was_restarted(redis: Redis) -> None:
    """`since` is answered from the stream where no process remembers it; and no further than HISTORY."""
    with Server(REDIS_URL=redis.url, HISTORY=50) as server:
        ids = [server.publish(n) for n in range(60)]
    with Server(REDIS_URL=redis.url, HISTORY=50) as server:
        with server.client() as client:
            assert client.hello["payload"]["lastId"] == ids[-1]
            for since, missed in ((ids[20], 39), (ids[9], 50), (ids[59], 0)):
                with server.client() as back:
                    server.hub.publish("order.paid", "orders", {})
                    answer = back.subscribe("content.*", since=since)
                    assert (answer["recovered"], answer["replayed"]) == (True, missed if missed < 50 else 0) or (
                        since == ids[9] and answer["recovered"] is False
                    )
        for unknown in (ids[0], "5-5", "99999999999999-0"):
            with server.client() as back:
                assert back.subscribe(since=unknown)["recovered"] is False


@needs_redis
def test_redis_hopping_between_processes_under_load_loses_nothing(redis: Redis) -> None:
    """A client that changes process 30 times while both publish has every event once, in order."""
    stop, published = threading.Event(), []
    got: list[tuple[int, int]] = []
    chance = random.Random(3)
    with Server(REDIS_URL=redis.url) as first, Server(REDIS_URL=redis.url) as second:
        servers = (first, second)
        last = first.publish(-1)

        def publish(index: int) -> None:
            numbers = publish_steadily(lambda n: servers[index].publish(n, by=index), stop, rate=250)
            published.extend((index, number) for number in numbers)

        publishers = [threading.Thread(target=publish, args=(index,)) for index in range(2)]
        for publisher in publishers:
            publisher.start()
        for hop in range(31):
            with servers[hop % 2].client() as client:
                answer = client.subscribe("content.*", since=last)
                assert answer["recovered"] is True
                if hop == 30:
                    stop.set()
                    for publisher in publishers:
                        publisher.join(PATIENCE)
                messages = 10**9 if hop == 30 else chance.randrange(1, 60)
                while messages and not (stop.is_set() and len(got) == len(published)):
                    message = client.receive()
                    got.append((message["payload"]["by"], message["payload"]["n"]))
                    last = message["id"]
                    messages -= 1
    assert sorted(got) == sorted(published)
    for index in range(2):
        assert [number for by, number in got if by == index] == sorted(n for by, n in published if by == index)


@needs_redis
def test_redis_dies_and_comes_back_with_its_data(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """publish() raises soon, the site goes on, clients stay and miss nothing; the log says it twice."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}
        redis.kill()
        began = time.monotonic()
        with pytest.raises(swiftcms_ws.PublishError, match="Redis"):
            server.publish(2)
        assert time.monotonic() - began < 2 * SLOWNESS
        assert server.get("/ws")[0] == 426
        assert client.ask("heartbeat")["type"] == "system.heartbeat"
        client.send(action="subscribe", since="5-5")
        assert client.closing().code == 1001
        with server.client() as patient:
            patient.subscribe()
            redis.start()
            until(lambda: "Redis is back" in caplog.text)
            server.publish(3)
            assert patient.receive()["payload"] == {"n": 3}
    complaints = [record.message for record in caplog.records if record.name == "swiftcms_ws"]
    assert len(complaints) == 2, complaints


@needs_redis
def test_redis_hangs_for_a_while(redis: Redis) -> None:
    """A Redis that is stopped and goes on: publish() raises within two seconds, then all is as before."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        server.publish(0)
        client.receive()
        redis.popen.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(swiftcms_ws.PublishError):
            server.publish(1)
        assert time.monotonic() - began < 2 * SLOWNESS
        redis.popen.send_signal(signal.SIGCONT)
        until(lambda: does_publish(server, 2))
        numbers = [client.receive()["payload"]["n"]]
        while numbers[-1] != 2:
            numbers.append(client.receive()["payload"]["n"])
        assert numbers in ([2], [1, 2])  # the one that hung may have been taken


def does_publish(server: Server, number: int) -> bool:
    with contextlib.suppress(swiftcms_ws.PublishError):
        server.publish(number)
        return True
    return False


@needs_redis
def test_redis_is_replaced_by_an_empty_one(redis: Redis) -> None:
    """After a failover that lost the stream, clients are sent away, come back and are told."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        last = server.publish(0)
        client.receive()
        redis.kill(forget=True)
        redis.start()
        assert client.closing().code == 1001
        until(lambda: does_publish(server, 1))
        with server.client() as back:
            assert back.subscribe(since=last)["recovered"] is False
            server.publish(2)
            while back.receive()["payload"] != {"n": 2}:  # 1 may still be on its way
                pass


@needs_redis
def test_redis_refuses_writes_and_is_away_at_the_start(redis: Redis) -> None:
    """A Redis that takes no writes is told by its own words; one that is not there yet is waited for."""
    with Server(REDIS_URL=redis.url) as server:
        server.publish(0)
        redis.send("CONFIG SET maxmemory 1")
        with pytest.raises(swiftcms_ws.PublishError, match="maxmemory"):
            server.publish(1)
        redis.send("CONFIG SET maxmemory 0")
        server.publish(2)
    redis.kill()
    with Server(REDIS_URL=redis.url) as server:
        with server.client() as early:
            early.subscribe()
            with pytest.raises(swiftcms_ws.PublishError):
                server.publish(3)
            redis.start()
            assert early.closing().code == 1001  # what it missed is not known
        with server.client() as client:
            client.subscribe()
            server.publish(4)
            assert client.receive()["payload"] == {"n": 4}


@needs_redis
def test_redis_an_entry_that_is_no_text_harms_nobody(redis: Redis) -> None:
    """What a stranger writes into the stream, bytes that are no UTF-8 too, is skipped; what follows is delivered."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        with socket.create_connection(("127.0.0.1", redis.port), PATIENCE) as sock:
            sock.sendall(b"*5\r\n$4\r\nXADD\r\n$18\r\nswiftcms_ws:events\r\n$1\r\n*\r\n$2\r\n\xff\xfe\r\n$2\r\n\xff\xfe\r\n")
            assert sock.recv(1000).startswith(b"$")
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}


@needs_redis
def test_redis_log_handlers_that_fail_stop_nothing(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site's log filter that raises where there is no request must not end the threads that log without one."""

    def fail(record: logging.LogRecord) -> bool:
        return bool(request.path)

    handler = logging.StreamHandler()
    handler.addFilter(fail)
    monkeypatch.setattr(logging.getLogger("swiftcms_ws"), "handlers", [handler])
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        redis.kill()
        with pytest.raises(swiftcms_ws.PublishError):
            server.publish(1)
        until(lambda: "Working outside of request context" in capsys.readouterr().err)
        redis.start()
        server.publish(2)
        assert client.receive()["payload"] == {"n": 2}


@needs_redis
def test_redis_nonsense_between_processes_is_logged(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """What another engine tells, and this one cannot carry out, is logged with its traceback; the rest goes on."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        server.hub._running().broker.tell_others({"do": "start", "process": "another", "changes": 1, "editor": {}})
        until(lambda: any(record.exc_info for record in caplog.records), "a traceback in the log")
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}


@needs_redis
def test_redis_an_editor_who_left_does_not_come_back(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of all editors that was made before one of them left, and sent after, is not believed."""
    config = {"REDIS_URL": redis.url, "HEARTBEAT": 25}
    with Server(**config) as first, Server(**config) as second, first.client() as ana, second.client() as bob:
        bob.subscribe("user.*")
        ana.ask("editStart", **POST)
        until(lambda: second.hub.editors("posts", "42"))
        engine = first.hub._running()
        everything, looked, go_on = engine.presence.everything, threading.Event(), threading.Event()
        tell, told_of = engine.broker.tell_others, []

        def slowly(process: str | None = None) -> Any:
            found = everything(process)
            if process == engine.process:
                looked.set()
                assert go_on.wait(PATIENCE)
            return found

        def tell_and_note(message: dict[str, Any]) -> None:
            tell(message)
            told_of.append(message["do"])

        monkeypatch.setattr(engine.presence, "everything", slowly)
        monkeypatch.setattr(engine.broker, "tell_others", tell_and_note)
        with Server(**config) as third:  # whose hello has it sent
            third.hub.last_id()
            assert looked.wait(PATIENCE)
            ana.ask("editStop", **POST)
            until(lambda: not second.hub.editors("posts", "42"))
            go_on.set()
            until(lambda: "presence" in told_of)
            ana.ask("editStart", contentType="posts", entryId="7")
            until(lambda: second.hub.editors("posts", "7"))
        told = [(message["type"], message["payload"]["entryId"]) for message in bob.rest()]
        assert told == [("user.editing", "42"), ("user.stoppedEditing", "42"), ("user.editing", "7")]


@needs_redis
def test_redis_presence_and_disconnect_across_processes(redis: Redis) -> None:
    """Editors of another process count, are told of, and get what is typed; so does a sign-out."""
    config = {"REDIS_URL": redis.url, "HEARTBEAT": 1}
    with Server(**config) as first, Server(**config) as second, first.client() as ana, second.client() as bob:
        for client, name in ((ana, "ana"), (bob, "bob")):
            client.authenticate(token(name))
            client.subscribe("user.*")
        ana.ask("editStart", **POST)
        assert names(bob.receive()) == ["ana"]
        assert bob.ask("editStart", **POST)["payload"]["conflict"] is True
        until(lambda: len(first.hub.editors("posts", "42")) == 2)
        assert [names(message) for message in ana.rest()] == [["ana"], ["ana", "bob"]]
        bob.rest()
        bob.send(action="editChange", payload="x", **POST)
        assert ana.receive()["payload"]["change"] == "x"
        with Server(**config) as third:
            until(lambda: len(third.hub.editors("posts", "42")) == 2, "a new process learns who edits")
        assert second.hub.disconnect("ana") == 0
        assert ana.closing().code == 4401
        left = bob.receive()
        assert (left["type"], names(left), left["payload"]["conflict"]) == ("user.stoppedEditing", ["bob"], False)


@needs_redis
def test_redis_editors_of_a_killed_process_vanish(redis: Redis, tmp_path: Path) -> None:
    """kill -9 of a process: within three heartbeats its editors are gone for the others, who are told."""
    heartbeat = 0.5
    environ = {"SWIFTCMS_WS_REDIS_URL": redis.url, "TEST_HEARTBEAT": str(heartbeat)}
    with (
        Server(REDIS_URL=redis.url, HEARTBEAT=heartbeat) as server,
        site(tmp_path, WERKZEUG, **environ) as process,
        server.client() as watcher,  # only now, for it must answer heartbeats
        process.client() as client,
    ):
        watcher.subscribe("user.*")
        client.ask("editStart", **POST)
        assert len(watcher.receive()["payload"]["editors"]) == 1
        process.popen.kill()
        killed = time.monotonic()
        assert watcher.receive()["payload"]["editors"] == []
        assert time.monotonic() - killed < 3 * heartbeat + swiftcms_ws.LOOK_SECONDS + 0.5 * SLOWNESS


@needs_redis
def test_redis_a_process_that_was_held_up_misses_nothing(redis: Redis, tmp_path: Path) -> None:
    """A process stopped for a while (SIGSTOP) delivers on return all that others published meanwhile."""
    with Server(REDIS_URL=redis.url) as server:
        environ = {"SWIFTCMS_WS_REDIS_URL": redis.url}
        with site(tmp_path, WERKZEUG, **environ) as process, process.client() as client:
            client.subscribe()
            process.popen.send_signal(signal.SIGSTOP)
            stop = threading.Event()
            threading.Timer(5, stop.set).start()
            numbers = publish_steadily(server.publish, stop, rate=400)
            process.popen.send_signal(signal.SIGCONT)
            assert [message["payload"]["n"] for message in client.receive_many(len(numbers))] == numbers


@needs_redis
def test_redis_without_flask(redis: Redis) -> None:
    """A script or a task queue publishes with a hub that has no app."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        script = f"from swiftcms_ws import Hub; print(Hub({redis.url!r}).publish('content.created', 'posts', 1))"
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert client.receive()["id"] == run.stdout.strip()


@needs_redis
def test_redis_under_gunicorn_with_two_workers_and_preload(redis: Redis, tmp_path: Path) -> None:
    """The deployment recipe: clients spread over two workers each get what a view in either publishes."""
    environ = {"SWIFTCMS_WS_REDIS_URL": redis.url}
    command = (*GTHREAD, "--workers", "2", "--preload")
    with site(tmp_path, command, **environ) as process, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(process.client()) for _ in range(12)]
        for client in clients:
            client.subscribe()
        ids = [publish_over_http(process, n=n) for n in range(20)]
        for client in clients:
            assert [message["id"] for message in client.receive_many(20)] == ids
        assert "several server processes" not in process.output()


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="there is no nginx on this machine")
def test_behind_nginx_with_tls_past_its_time_out(tmp_path: Path) -> None:
    """README's nginx lines work with wss://, and heartbeats keep a line that nginx would cut for silence.

    nginx's time-out and the heartbeat are both thirty times shorter here than by default (60 and 25).
    """
    readme = (HERE / "README.md").read_text()
    block = re.search(r"```nginx\n(.*?)```", readme, re.S)
    assert block is not None
    in_http, location = block[1].split("\n\n")
    certificate, key = self_signed(tmp_path)
    with Server(HEARTBEAT=0.8) as server:
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"""
            daemon off; error_log stderr; pid {tmp_path}/nginx.pid;
            events {{}}
            http {{
              access_log off;
              {in_http}
              server {{
                listen 127.0.0.1:{port} ssl;
                ssl_certificate {certificate}; ssl_certificate_key {key};
                proxy_read_timeout 2s;
                {location.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")}
              }}
            }}"""
        )
        assert NGINX is not None
        with Process(NGINX, "-c", str(tmp_path / "nginx.conf"), cwd=tmp_path, port=port) as nginx:
            trusting = ssl.create_default_context()
            trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
            secure = trusting.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE))
            headers = {"Origin": f"https://127.0.0.1:{port}"}
            with Client(port, sock=secure, headers=headers) as client:
                client.subscribe()
                began = time.monotonic()
                while time.monotonic() < began + 5:
                    assert client.receive(heartbeats=True)["type"] == "system.heartbeat"
                server.publish(1)
                assert client.receive()["payload"] == {"n": 1}
                assert client.close().code == 1000
            nginx.popen.terminate()
            nginx.popen.wait(PATIENCE)


# ---------------------------------------------------------------------------------------------------
# The browser: the seed's example, README's, client.js, the inspector and the demo
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


def html(body: str) -> str:
    return f'<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>test</title><body>{body}</html>'


@needs_chromium
def test_the_seeds_example_verbatim(browser: Browser) -> None:
    """The seed's JavaScript, as it stands: created posts, and heartbeats. Its port 8080 is led to a free one."""
    if not SEED.exists():
        pytest.skip(f"{SEED} is not beside this checkout")
    example = re.search(r"```javascript\n(.*?)```", SEED.read_text(), re.S)
    assert example is not None
    handler = "var created = []; function handleContentCreated(payload) { created.push(payload) }"
    page_html = html(f"<script>{handler}\n{example[1]}</script>")
    app, hub = Flask("site"), Hub()
    app.config["SWIFTCMS_WS_HEARTBEAT"] = 0.5
    app.add_url_rule("/", view_func=lambda: page_html)
    hub.init_app(app)
    http_server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    port = http_server.server_port
    led = f"super(url.replace('ws://localhost:8080/', 'ws://localhost:{port}/'))"
    try:
        page = browser.page(
            f"http://localhost:{port}/",
            before=f"WebSocket = class extends WebSocket {{ constructor(url) {{ {led} }} }}",
        )
        until(lambda: hub.stats()["subscriptions"] == 1)
        hub.publish("content.created", "pages", {"id": 1})
        hub.publish("content.updated", "posts", {"id": 2})
        hub.publish("content.created", "posts", {"id": 3})
        page.wait("created.length")
        assert page.js("created") == [{"id": 3}]
        page.js("var beats = 0; ws.addEventListener('message', e => beats += e.data.includes('system.heartbeat'))")
        page.wait("beats")
        page.js("ws.close()")
        until(lambda: hub.stats()["connections"] == 0)
        page.wait("ws.readyState === 3")
        assert page.complaints() == []
        assert any("system.heartbeat" in line or "Received" in line for line in page.console)
        page.close()
    finally:
        hub.close()
        http_server.shutdown()
        http_server.server_close()


def test_what_the_seeds_swift_example_sends() -> None:
    """authenticate, subscribe to content.*, pong to each heartbeat, close with 1001: all as it expects."""
    with Server(HEARTBEAT=0.2) as server, server.client(greeted=False) as client:
        client.send(action="authenticate", token=server.hub.issue_token("ana"))
        client.send(action="subscribe", type="content.*", contentType="posts")
        types = []
        published = iter(("created", "updated", "deleted", "published"))
        while len(types) < 12:
            message = client.receive(heartbeats=True)
            types.append(message["type"])
            if message["type"] == "system.heartbeat":
                client.send(action="pong")
                server.publish(1, f"content.{next(published, 'created')}")
        assert types[:3] == ["system.connected", "system.authenticated", "system.subscribed"]
        events = [each for each in types if each.startswith("content.")]
        assert events[:4] == ["content.created", "content.updated", "content.deleted", "content.published"]
        assert client.close(1001).code == 1001


README = (HERE / "README.md").read_text()


def readme_example(name: str) -> str:
    found = re.search(rf"<!-- browser example: {re.escape(name)} -->\n```html\n(.*?)```", README, re.S)
    assert found is not None
    return html(found[1])


@needs_chromium
@pytest.mark.parametrize(("name", "place"), [("raw", "#news"), ("client.js", "#posts")])
def test_readme_browser_examples(browser: Browser, name: str, place: str) -> None:
    """README's pages show what is published, and leave the console empty."""

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", view_func=lambda: readme_example(name))

    with Server(configure, HEARTBEAT=0.5) as server:
        page = browser.page(f"http://localhost:{server.port}/")
        until(lambda: server.hub.stats()["subscriptions"] == 1)
        server.publish(title="Good news")
        page.wait(f"document.querySelector('{place}').textContent.includes('Good news')")
        assert page.complaints() == []
        page.close()


def test_readme_python_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """README's Python runs, one block after the other, and its test of a site passes."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README, re.S | re.M)
    assert len(blocks) >= 8
    found: dict[str, Any] = {"__name__": "readme"}
    for indent, block in blocks:
        code = "\n".join(line.removeprefix(indent) for line in block.splitlines())
        # A factory makes a site of its own; keys are shown where they matter, after this app's registration.
        exec(compile(code, "README.md", "exec"), dict(found) if "create_app" in code else found)
        for key in [key for key in found["app"].config if key.startswith("SWIFTCMS_WS_")]:
            del found["app"].config[key]
    found["test_creating_a_post_is_published"]()
    client = found["app"].test_client()
    stale = {"title": "x", "version": 1}
    assert client.put("/posts/42", json=stale).status_code == 409
    assert client.put("/posts/42", json={**stale, "version": 3}).json["version"] == 4
    assert client.get("/posts").json["lastId"]
    found["tell"]("content.created", "posts", {})
    assert found["hub"].stats()["published"] == 3

    def refuse(*event: Any) -> str:
        raise swiftcms_ws.PublishError("Redis is away")

    found["publish"] = refuse
    found["tell"]("content.created", "posts", {})
    assert "saved, but nobody was told" in caplog.text
    found["hub"].close()


LIVE_SITE = """
import os, sys
from flask import Flask, request
from swiftcms_ws import blueprint, hub, publish

app = Flask(__name__)
app.secret_key = "a key of more than thirty-two bytes, for tests"
app.config["SWIFTCMS_WS_HEARTBEAT"] = 1
app.register_blueprint(blueprint)

@app.get("/")
def page():
    return '''<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>live</title>
      <script src="/ws/client.js"></script><script>
        let got = [], also = [], statuses = [], gaps = [], tokens = 0;
        const cms = new SwiftCMS(location.hash ? {token: async () => {
          tokens++;
          return (await fetch("/token")).text();
        }} : {});
        cms.onstatus = status => statuses.push(status);
        cms.ongap = ({type, contentType}) => gaps.push(`${type} ${contentType}`);
        cms.subscribe("content.*", "posts", ({payload}) => {
          got.push(payload.n);
          if (payload.n === 13) throw new Error("thirteen");
        });
        cms.subscribe("content.created", "*", ({payload}) => also.push(payload.n));
      </script>'''

@app.get("/token")
def token():
    return hub.issue_token("ana", expires_in=2)

@app.post("/publish")
def publish_it():
    return {"id": publish("content.created", "posts", request.json)}

app.run(port=int(sys.argv[1]))
"""


class LiveSite:
    """A site whose page uses client.js, behind a proxy; it can be killed and started again."""

    def __init__(self, tmp_path: Path) -> None:
        self._path = tmp_path
        (tmp_path / "live_app.py").write_text(LIVE_SITE)
        self._port = free_port()
        self.proxy = Proxy(self._port)
        self.start()

    def start(self) -> None:
        command = (sys.executable, "live_app.py", str(self._port))
        self.process = Process(*command, cwd=self._path, port=self._port).__enter__()

    def end(self, number: int) -> None:
        self.process.popen.send_signal(number)
        self.process.popen.wait(PATIENCE)
        self.process.__exit__()

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            publish_over_http(self.process, n=number)

    def __enter__(self) -> LiveSite:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.__exit__()
        self.proxy.__exit__()


@needs_chromium
def test_client_js_through_thick_and_thin(browser: Browser, tmp_path: Path) -> None:
    """Line cut, server killed, server stopped, network gone: in the end the page has what the server published."""
    with LiveSite(tmp_path) as live:
        page = browser.page(f"http://localhost:{live.proxy.port}/")
        page.wait("statuses.at(-1) === 'online'")
        live.publish(1, 2, 3)
        page.wait("got.length === 3 && also.length === 3")

        live.proxy.cut()
        live.publish(4, 5, 6)
        page.wait("got.length === 6 && also.length === 6")
        assert page.js("[got, also, gaps]") == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], []]
        assert page.js("statuses") == ["connecting", "online", "offline", "connecting", "online"]

        live.publish(13, 14)
        page.wait("also.length === 8 && got.length === 8")
        assert any("thirteen" in line for line in page.complaints())

        page.be_offline(True)
        live.proxy.cut()
        page.wait("statuses.at(-1) === 'offline'")
        live.publish(15, 16)
        page.be_offline(False)
        page.wait("got.length === 10")
        assert page.js("[got.slice(8), gaps]") == [[15, 16], []]

        for number in (signal.SIGKILL, signal.SIGTERM):
            page.js("gaps.length = 0")
            live.end(number)
            page.wait("statuses.at(-1) !== 'online'")
            live.start()
            page.wait("gaps.length === 2 && statuses.at(-1) === 'online'", timeout=45)
            assert page.js("gaps.toSorted()") == ["content.* posts", "content.created *"]
            page.js("got.length = also.length = 0")
            live.publish(int(number))
            page.wait("got.length && also.length")
            assert page.js("[got, also]") == [[int(number)], [int(number)]]
        page.js("cms.close()")
        assert page.js("statuses.at(-1)") == "offline"
        page.close()


@needs_chromium
def test_client_js_renews_its_token(browser: Browser, tmp_path: Path) -> None:
    """A token that runs out after two seconds is renewed on the open line, which never breaks for it."""
    with LiveSite(tmp_path) as live:
        page = browser.page(f"http://localhost:{live.proxy.port}/#token")
        page.wait("tokens >= 4")
        live.publish(1)
        page.wait("got.length === 1")
        assert page.js("statuses") == ["connecting", "online"]
        assert page.complaints() == []
        page.close()


@needs_chromium
def test_client_js_is_cached_and_changes_are_noticed(server: Server) -> None:
    """An ETag and Cache-Control: asked for again, and not sent again."""
    status, headers, body = server.get("/ws/client.js")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/javascript")
    assert b"SwiftCMS" in body
    assert headers["Cache-Control"] == "no-cache"
    assert server.get("/ws/client.js", If_None_Match=headers["ETag"])[0] == 304


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Process]:
    """The lone file, copied to an empty folder and run."""
    shutil.copy(HERE / "swiftcms_ws.py", tmp_path)
    port = free_port()
    command = (sys.executable, "swiftcms_ws.py", "--port", str(port))
    with Process(*command, cwd=tmp_path, port=port, PYTHONPATH="") as process:
        yield process


@pytest.mark.parametrize("jwt", ["none", "another"])
def test_the_lone_file_says_what_to_install(tmp_path: Path, jwt: str) -> None:
    """Where its packages are missing, or there is the wrong one of PyPI's two called jwt: all four, by name."""
    shutil.copy(HERE / "swiftcms_ws.py", tmp_path)
    options = []
    if jwt == "none":
        options = ["-S"]  # without the site's packages
    else:
        (tmp_path / "jwt.py").write_text("")
    command = [sys.executable, *options, "swiftcms_ws.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, "pip install flask flask-sock simple-websocket pyjwt" in run.stderr) == (1, True)


def demo_api(demo: Process, method: str, path: str, data: Any = None) -> tuple[int, Any]:
    status, _, body = http(f"http://localhost:{demo.port}/api/{path}", method, data)
    return status, json.loads(body)


def test_demo_api(demo: Process) -> None:
    """The tiny CMS: each change is committed, then published; bad input and stale saves get a sentence."""
    with demo.client() as client:
        client.subscribe("content.*")
        status, entry = demo_api(demo, "POST", "posts", {"title": "New"})
        assert (status, entry["title"], entry["state"], entry["version"]) == (201, "New", "draft", 1)
        path = f"posts/{entry['id']}"
        assert demo_api(demo, "PUT", path, {"title": "Newer", "body": "text", "version": 1})[1]["version"] == 2
        status, refusal = demo_api(demo, "PUT", path, {"title": "Stale", "body": "", "version": 1})
        assert (status, refusal["entry"]["title"]) == (409, "Newer")
        assert demo_api(demo, "POST", f"{path}/publish", {})[1]["state"] == "published"
        assert demo_api(demo, "DELETE", path)[0] == 200
        assert demo_api(demo, "GET", path)[0] == 404
        assert demo_api(demo, "POST", "posts", {"title": ""})[0] == 400
        assert demo_api(demo, "POST", "posts", [])[0] == 400
        kinds = [message["type"] for message in client.receive_many(4)]
        assert kinds == ["content.created", "content.updated", "content.published", "content.deleted"]
        client.nothing_more()
        token_of_ana = demo_api(demo, "GET", "token?user=ana")[1]["token"]
        assert client.authenticate(token_of_ana)["payload"]["userId"] == "ana"
        client.subscribe("notification")
        demo_api(demo, "POST", "notices", {"to": "bob", "text": "not for ana"})
        demo_api(demo, "POST", "notices", {"to": "ana", "text": "hello"})
        assert client.receive()["payload"]["text"] == "hello"


def test_readme_stuck_reader(demo: Process) -> None:
    """The lesson's stuck reader ends as the lesson says, and another client has everything."""
    found: dict[str, Any] = {}
    block = next(b for _, b in re.findall(r"^( *)```python\n(.*?)^ *```", README, re.S | re.M) if "stuck_reader" in b)
    exec(compile("\n".join(line.removeprefix("  ") for line in block.splitlines()), "README.md", "exec"), found)
    with demo.client() as client:
        client.subscribe("content.created")
        line = found["stuck_reader"](port=demo.port)
        client.receive_many(400)
        until(lambda: "with 1013" in demo.output())
        line.close()


def test_demo_says_that_the_port_is_taken(demo: Process) -> None:
    """One clear sentence, and no traceback."""
    command = [sys.executable, "swiftcms_ws.py", "--port", str(demo.port)]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "--port" in run.stderr


def subscribed_inspector(browser: Browser, url: str) -> Page:
    page = browser.page(url)
    page.wait("document.querySelector('#state').textContent === 'online'")
    page.js("document.querySelector('#subscriptions').requestSubmit(document.querySelector('[value=subscribe]'))")
    page.wait("document.querySelector('#log').innerText.includes('system.subscribed')")
    return page


@needs_chromium
@pytest.mark.parametrize("path", ["/", "/ws"])
def test_inspector(browser: Browser, demo: Process, path: str) -> None:
    """The inspector shows every frame as it went over the wire, and its forms say what they mean."""
    page = subscribed_inspector(browser, f"http://localhost:{demo.port}{path}")
    demo_api(demo, "POST", "posts", {"title": "<b>On the wire</b>"})
    page.wait("document.querySelector('#log').innerText.includes('<b>On the wire</b>')")
    page.js("document.querySelector('#free').elements.text.value = 'nonsense'")
    page.js("document.querySelector('#free').requestSubmit()")
    page.wait("document.querySelector('#log').innerText.includes('invalid_json')")
    page.js("document.querySelector('#toggle').click()")
    page.wait("document.querySelector('#log').innerText.includes('closed with 1000')")
    assert page.complaints() == []
    page.close()


@needs_chromium
def test_the_inspector_keeps_up_with_a_burst(browser: Browser, demo: Process) -> None:
    """Hundreds of long frames are on the screen at once: a page that jams would be cut for its silence."""
    page = subscribed_inspector(browser, f"http://localhost:{demo.port}/")
    for number in range(400):
        demo_api(demo, "POST", "posts", {"title": f"long {number}", "body": "x" * 10_000})
    page.wait("document.querySelectorAll('#log li.in').length >= 402")
    page.js("document.querySelector('#log li:last-child button').click()")
    page.wait("document.querySelector('#log li:last-child').innerText.includes('x'.repeat(10_000))")
    assert page.complaints() == []
    page.close()


@needs_chromium
def test_client_js_names_the_mistakes_of_a_page(browser: Browser, demo: Process) -> None:
    """A misspelt option, a forgotten handler, a token that cannot be fetched: said at once, in words."""
    page = browser.page(f"http://localhost:{demo.port}/")
    page.wait("document.querySelector('#line').textContent === 'online'")
    attempt = "(() => {{ try {{ {} }} catch (error) {{ return error.message; }} }})()"
    assert "no option tokn" in page.js(attempt.format("new SwiftCMS({tokn: 1})"))
    assert "handler must be a function" in page.js(attempt.format("cms.subscribe('content.*', 'posts')"))
    page.js("other = new SwiftCMS({token: () => Promise.reject(new Error('nobody is signed in'))}); 0")
    until(lambda: page.js("1") and any("no token came" in line for line in page.console))
    page.js("other.close()")
    page.close()


def sign_in(page: Page, name: str) -> None:
    page.js(f"document.querySelector('#sign-in').elements.user.value = '{name}'")
    page.js("document.querySelector('#sign-in').requestSubmit()")
    page.wait("document.querySelector('#line').textContent === 'online'")
    page.wait("document.querySelectorAll('#posts li').length >= 2")


def open_first_post(page: Page) -> None:
    page.js("[...document.querySelectorAll('#posts li:last-child button')].find(b => b.textContent === 'Edit').click()")


@needs_chromium
def test_demo_two_people_edit_one_post(browser: Browser, demo: Process) -> None:
    """Each sees the other, what he types, and is asked before his work is overwritten; a killed browser lets go."""
    ana = browser.page(f"http://localhost:{demo.port}/")
    with Browser() as other_browser:
        bob = other_browser.page(f"http://localhost:{demo.port}/")
        for page, name in ((ana, "ana"), (bob, "bob")):
            sign_in(page, name)
            open_first_post(page)
        ana.wait("document.querySelector('#editors').innerText.includes('bob')")
        bob.wait("document.querySelector('#editors').innerText.includes('ana')")
        bob.js("document.querySelector('#editor').elements.title.value = 'Bob was here'")
        bob.js("document.querySelector('#editor').dispatchEvent(new Event('input', {bubbles: true}))")
        ana.wait("document.querySelector('#typing').innerText.includes('Bob was here')")
        bob.js("document.querySelector('#editor').requestSubmit()")
        ana.wait("document.querySelector('#posts').innerText.includes('Bob was here')")
        ana.js("document.querySelector('#editor').requestSubmit()")
        ana.wait("!document.querySelector('#conflict').hidden")
        assert "bob" in ana.js("document.querySelector('#conflict').innerText")
        ana.js("document.querySelector('#take').click()")
        assert ana.js("document.querySelector('#editor').elements.title.value") == "Bob was here"
        open_first_post(bob)
        ana.wait("document.querySelector('#editors').innerText.includes('bob')")
        other_browser.kill()
        ana.wait("!document.querySelector('#editors').innerText.includes('bob')")
    assert [line for line in ana.complaints() if "409" not in line] == []
    ana.close()


@needs_chromium
def test_demo_cut_line_and_notices(browser: Browser, demo: Process) -> None:
    """The cut line comes back and says what was replayed; a notice reaches the one it is for."""
    page = browser.page(f"http://localhost:{demo.port}/")
    sign_in(page, "ana")
    page.js("document.querySelector('#cut').click()")
    page.wait("document.querySelector('#line').textContent !== 'online'")
    demo_api(demo, "POST", "posts", {"title": "While you were away"})
    demo_api(demo, "POST", "notices", {"to": "ana", "text": "tea is ready"})
    demo_api(demo, "POST", "notices", {"to": "bob", "text": "a secret"})
    page.wait("document.querySelector('#news').innerText.includes('2 events replayed')", timeout=40)
    assert "While you were away" in page.js("document.querySelector('#posts').innerText")
    assert "tea is ready" in page.js("document.querySelector('#notices').innerText")
    assert "a secret" not in page.js("document.body.innerText")
    assert [line for line in page.complaints() if "WebSocket connection" not in line] == []
    page.close()


@needs_redis
def test_demo_twice_on_one_redis(redis: Redis, tmp_path: Path) -> None:
    """--redis on two ports: what is changed in one demo is seen, and can be edited, in the other."""
    ports = [free_port(), free_port()]
    with contextlib.ExitStack() as stack:
        demos = [
            stack.enter_context(
                Process(
                    sys.executable, str(HERE / "swiftcms_ws.py"), "--port", str(port), "--redis", redis.url,
                    cwd=tmp_path, port=port, TMPDIR=str(tmp_path),
                )
            )
            for port in ports
        ]
        client = stack.enter_context(demos[1].client())
        client.subscribe("content.*")
        entry = demo_api(demos[0], "POST", "posts", {"title": "Shared"})[1]
        assert client.receive()["payload"]["title"] == "Shared"
        path = f"posts/{entry['id']}"
        assert demo_api(demos[1], "PUT", path, {"title": "Changed", "body": "", "version": 1})[0] == 200
        assert demo_api(demos[0], "PUT", path, {"title": "Stale", "body": "", "version": 1})[0] == 409


# ---------------------------------------------------------------------------------------------------
# The command line: listen, token, check
# ---------------------------------------------------------------------------------------------------


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "swiftcms_ws.py"), *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_listen_prints_reconnects_and_resumes() -> None:
    """One JSON line for each event, also for those that were published while the line was down."""
    with Server() as server, Proxy(server.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws"
        arguments = ("listen", url, "--type", "content.*", "--content-type", "posts", "--token", token())
        listener = subprocess.Popen(
            [sys.executable, str(HERE / "swiftcms_ws.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert listener.stdout is not None
            until(lambda: server.hub.stats()["subscriptions"] == 1)
            server.publish(1)
            server.hub.publish("content.created", "pages", {"n": 99})
            assert json.loads(listener.stdout.readline())["payload"] == {"n": 1}
            proxy.cut()
            server.publish(2)
            server.publish(3, to="ana")
            assert [json.loads(listener.stdout.readline())["payload"]["n"] for _ in range(2)] == [2, 3]
            listener.send_signal(signal.SIGINT)
            assert listener.wait(PATIENCE) == 130
        finally:
            listener.kill()
            listener.wait(PATIENCE)
            assert listener.stdout is not None
            listener.stdout.close()


def test_listen_gives_up_where_coming_back_would_not_help(server: Server) -> None:
    """A bad token or pattern is told on stderr, in the server's words, and ends it."""
    url = f"ws://127.0.0.1:{server.port}/ws"
    run = command("listen", url, "--token", "nonsense")
    assert (run.returncode, "not a valid JWT" in run.stderr) == (1, True)
    run = command("listen", url, "--type", "con*")
    assert (run.returncode, "prefix" in run.stderr) == (1, True)
    run = command("listen", f"{url}/elsewhere")
    assert (run.returncode, "Is this the address" in run.stderr) == (1, True)


def test_token_is_one_that_the_server_takes(server: Server) -> None:
    """`token USER` signs with the key in the environment; without one it says which to set."""
    run = command("token", "ana", "--expires-in", "60", SECRET_KEY=KEY, SWIFTCMS_WS_JWT_KEY="")
    with server.client() as client:
        assert client.authenticate(run.stdout.strip())["payload"]["userId"] == "ana"
    for wrong in (["", "--expires-in", "60"], ["ana", "--expires-in", "-1"]):
        run = command("token", *wrong, SECRET_KEY=KEY)
        assert (run.returncode, run.stdout) == (1, "")
    run = command("token", "ana", SECRET_KEY="", SWIFTCMS_WS_JWT_KEY="")
    assert (run.returncode, "SWIFTCMS_WS_JWT_KEY" in run.stderr) == (1, True)


def test_check_is_content_with_a_good_site(server: Server) -> None:
    """Every line a tick, and exit code 0."""
    run = command("check", f"ws://127.0.0.1:{server.port}/ws")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("✓") == 7
    assert "✗" not in run.stdout


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """Open origins, a proxy that changes the Host, several processes without Redis: a cross each, with the cure."""
    with Server(ORIGINS="*") as server:
        run = command("check", f"ws://127.0.0.1:{server.port}/ws")
        assert run.returncode == 1
        assert "SWIFTCMS_WS_ORIGINS" in run.stdout
        run = command("check", f"ws://127.0.0.1:{server.port}/elsewhere")
        assert (run.returncode, "Is this the address" in run.stdout) == (1, True)
    with Server(ORIGINS=["https://example.org"]) as server:  # as behind a proxy that changes the Host
        run = command("check", f"ws://127.0.0.1:{server.port}/ws")
        assert (run.returncode, "pass the Host header on" in run.stdout) == (1, True)
    with site(tmp_path, (*GUNICORN, "--worker-class", "sync")) as process:
        run = command("check", f"ws://127.0.0.1:{process.port}/ws")
        assert (run.returncode, "-k gthread" in run.stdout) == (1, True)
    with site(tmp_path, GTHREAD, "--workers", "4") as process:
        until(lambda: "SWIFTCMS_WS_REDIS_URL" in command("check", f"ws://127.0.0.1:{process.port}/ws").stdout)


CROWD = "✗ of 20 clients at once 4, beside this one, are let in"


def test_check_finds_a_server_that_is_too_small(tmp_path: Path) -> None:
    """Clients that are refused, and clients that no thread is left for, are a cross with the key to set."""
    with Server(MAX_CONNECTIONS=5) as server:
        run = command("check", f"ws://127.0.0.1:{server.port}/ws")
        assert (run.returncode, run.stderr, CROWD in run.stdout) == (1, "", True)
        assert "SWIFTCMS_WS_MAX_CONNECTIONS are taken" in run.stdout
    with (
        site(tmp_path, (*GUNICORN, "--worker-class", "gthread", "--threads", "5")) as process,
        impatient("check", f"127.0.0.1:{process.port}", name="REPLY_SECONDS", seconds=4) as popen,
    ):
        out, _ = popen.communicate(timeout=60)
        assert (popen.returncode, CROWD in out, "--threads" in out) == (1, True, True)


def test_check_finds_that_it_is_something_else() -> None:
    """Nothing there, another WebSocket, no HTTP at all, or no word: a cross, and no traceback."""
    with Server(lambda app, hub: Sock(app).route("/other")(lambda ws: ws.receive())) as server:
        with impatient("check", f"127.0.0.1:{server.port}/other", name="REPLY_SECONDS", seconds=0.3) as popen:
            out, _ = popen.communicate(timeout=60)
        assert (popen.returncode, "no swiftcms-ws" in out) == (1, True)
    run = command("check", f"ws://127.0.0.1:{free_port()}/ws")
    assert (run.returncode, run.stderr, "Does the site run" in run.stdout) == (1, "", True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with impatient("check", address, name="REPLY_SECONDS", seconds=0.3) as popen:
            out, _ = popen.communicate(timeout=60)
        assert (popen.returncode, "are all taken?" in out) == (1, True)
        listener.accept()[0].close()

        def greet() -> None:
            with listener.accept()[0] as line:
                line.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                line.recv(1024)

        answer = threading.Thread(target=greet)
        answer.start()
        run = command("check", address)
        answer.join(PATIENCE)
    assert (run.returncode, run.stderr, "is this the port" in run.stdout) == (1, "", True)


@needs_redis
def test_check_is_content_with_processes_that_share_redis(redis: Redis, tmp_path: Path) -> None:
    """Several processes are no cross where they have their events in common; one where their Redis is dead."""
    environ = {"SWIFTCMS_WS_REDIS_URL": redis.url}
    with site(tmp_path, (*GTHREAD, "--workers", "3"), **environ) as process:
        run = command("check", f"ws://127.0.0.1:{process.port}/ws")
        assert run.returncode == 0, run.stdout + run.stderr
        redis.kill()
        run = command("check", f"ws://127.0.0.1:{process.port}/ws")
        assert (run.returncode, "Does Redis run" in run.stdout) == (1, True), run.stdout


def impatient(*arguments: str, name: str = "LONG_SECONDS", seconds: float = 1.0) -> subprocess.Popen[str]:
    """Start a command that takes a second for as long as it usually takes 75 for, or 10 for an answer."""
    code = f"import sys, swiftcms_ws; swiftcms_ws.{name} = {seconds}; sys.exit(swiftcms_ws.main())"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_check_waits_past_a_time_out() -> None:
    """With --long a line that something cuts while it is silent is a cross; one that lives is a tick."""
    with Server() as server, Proxy(server.port) as proxy:
        with impatient("check", f"127.0.0.1:{server.port}", "--long") as run:
            out, _ = run.communicate(timeout=60)
        assert (run.returncode, "✓ a line that sends nothing" in out) == (0, True)
        with impatient("check", f"127.0.0.1:{proxy.port}", "--long") as run:
            assert run.stdout is not None
            while not run.stdout.readline().startswith("✓ server processes seen"):
                pass
            proxy.cut()
            out, _ = run.communicate(timeout=60)
        assert (run.returncode, "raise its time-out" in out) == (1, True)


# ---------------------------------------------------------------------------------------------------
# README: every block that is no Python and no page
# ---------------------------------------------------------------------------------------------------

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where a shell finds this environment's commands


def readme_block(language: str, words: str) -> str:
    """Return README's one block that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)
    (found,) = [block for block in blocks if words in block]
    return str(found)


def readme_site(tmp_path: Path) -> None:
    """Write README's first application to app.py."""
    (tmp_path / "app.py").write_text(re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)[0])


def test_every_readme_block_is_run() -> None:
    """A block that is added to README without a test that runs it is noticed here."""
    blocks = re.findall(r"^ *```(\w+)\n(.*?)^ *```", README, re.S | re.M)
    own_tests = ["bin/swiftcms-ws\n", "bin/pytest", "curl", "pip install gunicorn", "[Service]", "proxy_pass"]
    own_tests += ["edit.stop()", "Y.Doc", "swiftcms-ws listen"]
    others = [block for language, block in blocks if language not in ("python", "html")]
    assert [[words in block for words in own_tests].count(True) for block in others] == [1] * len(own_tests)
    assert README.count("<!-- browser example:") == [language for language, _ in blocks].count("html")


def can_install(tmp_path: Path) -> bool:
    """Return whether pip finds packages from here: there may be no network."""
    download = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "flask-sock")
    return subprocess.run(download, check=False, capture_output=True, timeout=60).returncode == 0


def test_readme_from_the_source_distribution_to_the_demo(tmp_path: Path) -> None:
    """README's first lines, run where only the source distribution is, install from it and serve the demo.

    It takes what it needs from the network, as the test command did.
    """
    if not can_install(tmp_path):
        pytest.skip("pip finds no packages from here")
    shutil.copytree(HERE, tmp_path / "checkout", ignore=shutil.ignore_patterns(".git", ".venv", "dist"))
    build = "import sys; from flit_core import buildapi; print(buildapi.build_sdist(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=tmp_path / "checkout",
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    archive = built.stdout.strip()
    subprocess.run(["tar", "-xzf", archive], cwd=tmp_path, check=True, timeout=PATIENCE)
    unpacked = tmp_path / archive.removesuffix(".tar.gz")
    assert unpacked.name == f"swiftcms_ws-{swiftcms_ws.__version__}"
    port = free_port()
    line = readme_block("sh", "bin/swiftcms-ws\n").strip()
    script = f"{line} --port {port}"
    with Process("bash", "-c", script, cwd=unpacked, port=port, PYTHONPATH="") as demo:
        assert b"A tiny CMS" in http(f"http://127.0.0.1:{port}/")[2]
        with demo.client() as client:
            client.subscribe()
    files = {path.name for path in (unpacked / ".venv").rglob("swiftcms_ws*") if path.suffix != ".pyc"}
    assert files == {"swiftcms_ws.py", f"swiftcms_ws-{swiftcms_ws.__version__}.dist-info"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_readme_maintainer_listens_and_creates_a_post(tmp_path: Path) -> None:
    """README's app.py under `flask run`, with its `listen` and its curl line: the post comes as a line of JSON."""
    readme_site(tmp_path)
    port = free_port()
    run = (sys.executable, "-m", "flask", "run", "--port", str(port))
    with Process(*run, cwd=tmp_path, port=port) as process:
        assert "swiftcms-ws listen localhost:5000" in README
        listener = subprocess.Popen(
            [sys.executable, str(HERE / "swiftcms_ws.py"), "listen", f"localhost:{port}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert listener.stdout is not None and listener.stderr is not None
            assert "listening" in listener.stderr.readline()
            curl = readme_block("sh", "curl").replace("5000", str(port))
            subprocess.run(["bash", "-c", curl], check=True, capture_output=True, timeout=PATIENCE)
            event = json.loads(listener.stdout.readline())
            assert (event["type"], event["payload"]) == ("content.created", {"id": 7, "title": "Hi"})
        finally:
            listener.kill()
            listener.communicate(timeout=PATIENCE)
        assert "Traceback" not in process.output()


@pytest.mark.parametrize("block", ["sh", "ini"])
def test_readme_gunicorn_commands(tmp_path: Path, block: str) -> None:
    """README's gunicorn line, and the one in its systemd unit, serve WebSockets as they stand."""
    readme_site(tmp_path)
    if block == "sh":
        line = readme_block("sh", "gunicorn app:app").splitlines()[-1]
    else:
        unit = configparser.ConfigParser()
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(readme_block("ini", "[Service]"))
        line = unit["Service"]["ExecStart"].replace(unit["Service"]["WorkingDirectory"] + "/.venv/bin/", "")
    port = free_port()
    line = line.replace("8000", str(port))
    with Process("bash", "-c", f"exec {line}", cwd=tmp_path, port=port, PATH=PATH) as process, process.client() as client:
        client.subscribe()
        assert http(f"http://127.0.0.1:{port}/posts", "POST", {"title": "Hi"})[0] == 200
        assert client.receive()["payload"]["title"] == "Hi"


@needs_redis
def test_readme_command_lines(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """README's command lines do what is said beside them, but for the addresses as they stand."""
    lines = [shlex.split(line, comments=True)[1:] for line in readme_block("sh", "swiftcms-ws listen").splitlines()]
    listen, sign, check, demo = lines
    monkeypatch.setenv("SECRET_KEY", KEY)
    port = free_port()
    demo = [{"8081": str(port), "redis://localhost:6379/0": redis.url}.get(word, word) for word in demo]
    with Process(sys.executable, str(HERE / "swiftcms_ws.py"), *demo, cwd=tmp_path, port=port):
        words = [f"ws://localhost:{port}/ws" if word.startswith("wss://") else word for word in check]
        with impatient(*words) as run:
            out, _ = run.communicate(timeout=60)
        assert (run.returncode, out.count("✓")) == (0, 8)
    with Server() as server:
        assert swiftcms_ws.main(sign) == 0
        signed = capsys.readouterr().out.strip()
        places = {"ws://localhost:8080/ws": f"ws://127.0.0.1:{server.port}/ws", "…": signed}
        words = [places.get(word, word) for word in listen]
        listener = subprocess.Popen(
            [sys.executable, str(HERE / "swiftcms_ws.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            until(lambda: server.hub.stats()["subscriptions"] == 1)
            server.publish(1, to="ana")
            assert listener.stdout is not None
            assert json.loads(listener.stdout.readline())["payload"] == {"n": 1}
        finally:
            listener.kill()
            listener.communicate(timeout=PATIENCE)


def editing_page(script: str) -> str:
    return html(f"<script src='/ws/client.js'></script><script>const cms = new SwiftCMS(); {script}</script>")


@needs_chromium
def test_readme_editing(browser: Browser) -> None:
    """README's lines for two editors: who else is there, what they type, what I type, and leaving."""
    *lines, send, stop = readme_block("js", "edit.stop()").strip().splitlines()
    script = "const shown = [], applied = [], show = (...all) => shown.push(all), apply = change => applied.push(change);"
    page_text = editing_page(script + "\n".join(lines))

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", view_func=lambda: page_text)

    with Server(configure) as server, server.client() as other:
        entry = {"contentType": "posts", "entryId": "42"}
        page = browser.page(f"http://localhost:{server.port}/")
        until(lambda: len(server.hub.editors("posts", "42")) == 1)
        assert other.ask("editStart", **entry)["payload"]["conflict"]
        page.wait("JSON.stringify(shown.at(-1)) === '[[null,null],true]'")
        page.js(send)
        assert other.receive()["payload"]["change"] == {"title": "Hello"}
        other.send(action="editChange", **entry, payload={"title": "Hello, you"})
        page.wait("applied.length === 1 && applied[0].title === 'Hello, you'")
        page.js(stop)
        until(lambda: len(server.hub.editors("posts", "42")) == 1)
        assert page.complaints() == []
        page.close()


# What README needs of Yjs, which is an npm package: a document that only ever gains lines.
STAND_IN_FOR_YJS = """
const Y = {
  Doc: class {
    lines = new Set();
    on(type, handler) { this.handler = handler; }
    write(line) { Y.applyUpdate(this, new TextEncoder().encode(JSON.stringify([line])), "own"); }
  },
  applyUpdate(doc, update, origin) {
    for (const line of JSON.parse(new TextDecoder().decode(update))) doc.lines.add(line);
    doc.handler?.(update, origin);
  },
  encodeStateAsUpdate: doc => new TextEncoder().encode(JSON.stringify([...doc.lines])),
};
const edit = cms.edit("posts", "42");
"""


@needs_chromium
def test_readme_collaborative_text(browser: Browser) -> None:
    """README's lines for Yjs bring two texts together, whoever comes first, and after a cut line too."""
    page_text = editing_page(STAND_IN_FOR_YJS + readme_block("js", "Y.Doc"))

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", view_func=lambda: page_text)

    with Server(configure) as server, Proxy(server.port) as proxy:
        lines = "[...text.lines].sort().join()"
        first = browser.page(f"http://localhost:{server.port}/")
        until(lambda: len(server.hub.editors("posts", "42")) == 1)
        first.js("text.write('one – é')")
        second = browser.page(f"http://localhost:{proxy.port}/")
        second.wait(f"{lines} === 'one – é'")  # who comes later has all
        second.js("cms.onstatus = status => { if (status === 'offline') text.write('three'); }")
        second.js("text.write('two')")
        first.wait(f"{lines} === 'one – é,two'")
        proxy.cut()  # and what is typed then, arrives once the line is back
        first.wait(f"{lines} === 'one – é,three,two'")
        assert first.complaints() == []
        first.close()
        second.close()


# ---------------------------------------------------------------------------------------------------
# Hostile clients: limits
# ---------------------------------------------------------------------------------------------------


def log_lines(caplog: pytest.LogCaptureFixture, word: str = "") -> list[str]:
    """Return what swiftcms_ws has logged, of the lines that have `word` in them."""
    lines = [record.getMessage() for record in caplog.records if record.name == "swiftcms_ws"]
    return [line for line in lines if word in line]


def stat(server: Server, name: str) -> int:
    return server.hub.stats().get(name, 0)


def resident() -> int:
    """Return this process's memory in bytes: server and clients are both in it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    gc.collect()  # Werkzeug leaves an epoll file in a cycle after each refusal
    return len(os.listdir("/proc/self/fd"))


def upgrade_request(port: int, path: str = "/ws", *more: str) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==",
        "Sec-WebSocket-Version: 13",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def open_raw(port: int) -> socket.socket:
    """Open a connection with nothing between a test and its bytes. What the server says is unread."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(upgrade_request(port))
    read_to(sock, b"\r\n\r\n")
    return sock


def read_to(sock: socket.socket, words: bytes) -> bytes:
    """Read until `words` have come; what came may end after them."""
    data = b""
    while words not in data:
        more = sock.recv(65536)
        assert more, f"the line ended before {words!r} came, after {data[-200:]!r}"
        data += more
    return data


def read_to_the_end(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def close_code(data: bytes) -> int | None:
    """Return the code of the close frame that what a server sent ends with, if it does."""
    for start in range(max(0, len(data) - 127), len(data) - 3):
        if data[start] == 0x88 and data[start + 1] == len(data) - start - 2:
            return int(struct.unpack("!H", data[start + 2 : start + 4])[0])
    return None


def vanish(sock: socket.socket) -> None:
    """Let the kernel send RST: no close frame, no end of the stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def text(**message: Any) -> bytes:
    return Frames.masked(0x1, json.dumps(message).encode())


def padded(size: int, filling: str = "x") -> bytes:
    """Return a message of exactly `size` bytes."""
    frame = json.dumps({"action": "heartbeat", "padding": ""}).encode()
    return frame[:-2] + (filling * size).encode()[: size - len(frame)] + frame[-2:]


def fragments(data: bytes, size: int) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    last = len(parts) - 1
    return b"".join(Frames.masked(0x0 if n else 0x1, part, fin=n == last) for n, part in enumerate(parts))


TOO_BIG = {
    "one frame": Frames.masked(0x1, padded(1001)),
    "binary": Frames.masked(0x2, b"\0" * 1001),
    "fragments": fragments(padded(1001), 90),
    "tiny fragments": fragments(padded(1001), 1),
    "bytes, not characters": Frames.masked(0x1, padded(1002, "é")),
    "fragments of characters": fragments(padded(1002, "é"), 333),
    "a frame without an end": Frames.masked(0x1, b"x" * 5000, length=1 << 40),
    "fragments without an end": Frames.masked(0x1, b"x", fin=False)
    + Frames.masked(0x0, b"x" * 500, fin=False) * 9,
}


def test_a_message_over_the_limit_is_told_and_ends_with_1009(caplog: pytest.LogCaptureFixture) -> None:
    """The limit counts bytes, however they are cut up, and also of a message that never ends.

    The error comes before the close frame, other clients stay, and the log says which key it is, once.
    """
    with Server(MAX_MESSAGE=1000, RATE=100_000) as server, server.client() as other:
        for data in (Frames.masked(0x1, padded(1000)), fragments(padded(1000, "é"), 7)):
            other.sock.sendall(data)
            assert other.receive(heartbeats=True)["type"] == "system.heartbeat"
        for kind, data in TOO_BIG.items():
            with server.client() as client:
                client.sock.sendall(data)
                assert client.receive()["payload"]["code"] == "message_too_big", kind
                closed = client.closing()
                assert (closed.code, "1000 bytes" in (closed.reason or "")) == (1009, True), kind
        assert other.ask("heartbeat")["type"] == "system.heartbeat"
        until(lambda: stat(server, "closed_1009") == len(TOO_BIG), "the count of all ends")
        assert stat(server, "error_message_too_big") == len(TOO_BIG)
    assert len(log_lines(caplog, "SWIFTCMS_WS_MAX_MESSAGE")) == len(log_lines(caplog)) == 1


def test_an_endless_message_takes_no_memory(server: Server) -> None:
    """Who goes on with one fragmented message, and does not hear the 1009, is cut; nothing piles up."""
    piece = Frames.masked(0x0, b"x" * 60_000, fin=False)
    with open_raw(server.port) as sock:
        before, sent = resident(), 0
        sock.sendall(Frames.masked(0x1, b"x", fin=False))
        with contextlib.suppress(OSError):
            for _ in range(2000):
                sock.sendall(piece)
                sent += len(piece)
                assert resident() - before < 25_000_000, f"after {sent} bytes"
    until(lambda: stat(server, "connections") == 0)


def test_a_busy_server_does_not_read_ahead() -> None:
    """While a hook is at work for a client, what that client pushes waits in the kernel, not in memory."""
    gate, is_asked = threading.Event(), threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            is_asked.set()
            return event_type != "slow" or gate.wait(PATIENCE)

    with Server(configure) as server, server.client() as other, open_raw(server.port) as pusher:
        pusher.sendall(text(action="subscribe", type="slow"))
        assert is_asked.wait(PATIENCE)
        pusher.settimeout(0.4)  # the kernel's buffers are full when they take nothing for so long
        block, pushed, before = text(action="heartbeat") * 2000, 0, resident()
        try:
            while pushed < 60_000_000:
                pushed += pusher.send(block)
        except TimeoutError:
            pass
        assert pushed < 30_000_000, "the server takes all"
        assert resident() - before < 15_000_000
        other.subscribe()
        server.publish(1)
        assert other.receive()["payload"] == {"n": 1}
        gate.set()
        assert b"rate_limited" in read_to(pusher, b"\x11M")  # a close frame's code: 4429
        pusher.close()
        until(lambda: stat(server, "closed_4429") == 1, "the end of the flood")


def test_a_burst_is_let_through_and_more_is_rate_limited_then_4429(caplog: pytest.LogCaptureFixture) -> None:
    """Two seconds' worth may come at once; the next as many are answered with an error; then it is over."""
    with Server(RATE=20) as server:
        for _ in range(3):
            with server.client() as client:
                began = time.monotonic()
                client.sock.sendall(text(action="heartbeat", ref=1) * 200)
                got: Counter[str] = Counter()
                with pytest.raises(Closed) as closed:
                    while True:
                        message = client.receive(heartbeats=True)
                        got[message["payload"].get("code", message["type"])] += 1
                refilled = 20 * (time.monotonic() - began) + 2
                assert closed.value.code == 4429
                assert set(got) == {"system.heartbeat", "rate_limited"}
                assert 40 <= got["system.heartbeat"] <= 40 + refilled
                assert 40 <= got["rate_limited"] <= 41 + refilled
        until(lambda: stat(server, "closed_4429") == 3, "the count")
        assert stat(server, "error_rate_limited") >= 120
    assert len(log_lines(caplog, "SWIFTCMS_WS_RATE")) == len(log_lines(caplog)) == 1


def test_who_keeps_to_the_rate_is_not_limited() -> None:
    """Bursts are filled up again with time, so that a client that pauses may come with another."""
    with Server(RATE=100) as server, server.client() as client:
        pause = threading.Event()
        for _ in range(3):
            client.sock.sendall(text(action="heartbeat", ref=1) * 50)
            assert {client.receive(heartbeats=True)["type"] for _ in range(50)} == {"system.heartbeat"}
            pause.wait(0.3)
        assert stat(server, "errors") == 0


FLOODS = {
    "pings": (b"", Frames.masked(0x9, b"p" * 10)),
    "pongs": (b"", Frames.masked(0xA)),
    "empty fragments": (Frames.masked(0x1, b"{", fin=False), Frames.masked(0x0, fin=False)),
    "invalid messages": (b"", Frames.masked(0x1, b"{")),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_frames_of_every_kind_count_against_the_rate(kind: str) -> None:
    """What costs the server as much as a message is limited as one: also frames that never make one."""
    first, frame = FLOODS[kind]
    with Server(RATE=20) as server, open_raw(server.port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(first + frame * 500)
            assert b"rate_limited" in read_to(sock, b"\x11M")  # a close frame's code: 4429
        sock.close()
        until(lambda: stat(server, "closed_4429") == 1, "4429", timeout=5)


def test_the_limit_of_subscriptions(caplog: pytest.LogCaptureFixture) -> None:
    """So many and not one more; the same twice is one, and one that is left makes room."""
    with Server(MAX_SUBSCRIPTIONS=5) as server:
        for _ in range(2):
            with server.client() as client:
                for number in [0, 1, 2, 3, 4, 4, 0]:
                    client.subscribe(f"a.b{number}")
                assert client.ask("subscribe", type="a.b5")["payload"]["code"] == "too_many_subscriptions"
                assert (
                    client.ask("subscribe", type="a.b5", since="1-0")["payload"]["code"]
                    == "too_many_subscriptions"
                )
                assert client.ask("unsubscribe", type="a.b5")["payload"]["removed"] == 0
                assert stat(server, "subscriptions") == 5
                server.publish(1, "a.b5")
                client.nothing_more()
                assert client.ask("unsubscribe", type="a.b0")["payload"]["removed"] == 1
                client.subscribe("a.b5")
                for number in range(5):
                    client.ask("editStart", contentType="posts", entryId=str(number))
                over = client.ask("editStart", contentType="posts", entryId="5")
                assert over["payload"]["code"] == "too_many_subscriptions"
            until(lambda: stat(server, "connections") == 0)
        assert (stat(server, "error_too_many_subscriptions"), stat(server, "subscriptions")) == (6, 0)
    assert len(log_lines(caplog, "SWIFTCMS_WS_MAX_SUBSCRIPTIONS")) == len(log_lines(caplog)) == 1


def test_the_limit_of_connections_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    """Of 30 handshakes at once so many are let in as there are places, and again when those are free."""
    together = threading.Barrier(30)

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: together.wait(PATIENCE) and None)

    with Server(configure, MAX_CONNECTIONS=7) as server:
        for count in (1, 2):
            answers: list[int] = []
            held: list[socket.socket] = []

            def knock(answers: list[int] = answers, held: list[socket.socket] = held) -> None:
                sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
                held.append(sock)
                sock.sendall(upgrade_request(server.port))
                head = read_to(sock, b"\r\n\r\n")
                answers.append(int(head.split()[1]))
                assert (b"\r\nRetry-After: " in head) == (answers[-1] == 503 or b" 503 " in head)

            run_all([knock] * 30)
            assert Counter(answers) == {101: 7, 503: 23}
            assert stat(server, "refused_503") == 23 * count
            until(lambda: stat(server, "connections") == 7)
            for sock in held:
                vanish(sock)
            until(lambda: server.hub._running().registry.places == 0, "free places")
    assert len(log_lines(caplog, "SWIFTCMS_WS_MAX_CONNECTIONS")) == len(log_lines(caplog)) == 1


def test_the_time_to_sign_in(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Who does not sign in in time is told and ended, however lively; who does stays."""
    monkeypatch.setattr(swiftcms_ws, "SIGN_IN_SECONDS", 0.3)
    with Server(AUTH="required") as server, server.client() as signed_in:
        signed_in.authenticate(token())
        with server.client() as idle, server.client() as lively:
            lively.sock.sendall(Frames.masked(0x9) + text(action="authenticate", token="x"))
            assert lively.receive()["payload"]["code"] == "invalid_token"
            for client in (idle, lively):
                error = client.receive()
                assert (error["type"], error["payload"]["code"]) == ("system.error", "auth_required")
                assert client.closing().code == 4401
        until(lambda: stat(server, "closed_4401") == 2)
        assert stat(server, "error_auth_required") == 2
        assert signed_in.ask("heartbeat")["type"] == "system.heartbeat"
    assert len(log_lines(caplog, "SWIFTCMS_WS_AUTH")) == len(log_lines(caplog)) == 1


def test_silent_peers_are_counted_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Sockets whose other side is gone without a trace do not stay; one who drips bytes is alive."""
    drip = itertools.cycle(Frames.masked(0xA))
    with Server(HEARTBEAT=0.4) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(open_raw(server.port)) for _ in range(10)]
        alive = stack.enter_context(open_raw(server.port))

        def take_close_frame(sock: socket.socket) -> None:
            read_to(sock, struct.pack("!H", 4408) + b"nothing heard")
            sock.close()

        def all_but_one() -> bool:
            alive.sendall(bytes([next(drip)]))
            threading.Event().wait(0.05)
            return stat(server, "connections") == 1

        for sock in silent:
            threading.Thread(target=take_close_frame, args=(sock,)).start()
        until(all_but_one, "the end of the silent")
        until(lambda: stat(server, "closed_4408") == 10, "the count of all ends")
    assert len(log_lines(caplog, "SWIFTCMS_WS_HEARTBEAT")) == len(log_lines(caplog)) == 1


def test_a_replay_is_no_way_round_the_limit_of_the_queue() -> None:
    """Who has the history sent again and again, and never reads, is cut as every slow client."""
    with Server(MAX_QUEUE=100_000, HISTORY=200) as server, server.client() as first:
        since = first.hello["payload"]["lastId"]
        for number in range(200):
            server.publish(number, padding="x" * 2000)
        assert server.hub.flush()
        with server.client(receive_buffer=2048) as stuck:
            for _ in range(40):
                stuck.send(action="subscribe", since=since)
                stuck.send(action="unsubscribe")
            assert stuck.closing().code == 1013
        assert first.ask("heartbeat")["type"] == "system.heartbeat"


def test_a_change_cannot_push_another_editor_out() -> None:
    """Large changes from one editor are limited before they fill the queue of another, who reads slowly."""
    with Server() as server, server.client() as pushing, server.client(receive_buffer=65536) as slow:
        for client in (slow, pushing):
            client.ask("editStart", contentType="posts", entryId="1")
        change = json.dumps(
            {"action": "editChange", "contentType": "posts", "entryId": "1", "payload": "x" * 65_000}
        )
        with contextlib.suppress(OSError):
            for _ in range(90):
                pushing.sock.sendall(Frames.masked(0x1, change.encode()))
        until(lambda: stat(server, "error_rate_limited") > 0, "the limit", timeout=5)
        assert slow.ask("heartbeat")["type"] == "system.heartbeat"
        assert {message["type"] for message in slow.messages} <= {"user.edited", "user.stoppedEditing"}
        assert stat(server, "slow_clients") == 0


def test_suggestions_cost_no_time(server: Server) -> None:
    """A suggestion is for a person's slip: a large message made of near misses must not hold up the site."""
    near = ",".join(f'"{"".join(letters)}":0' for letters in itertools.permutations("actionx"))[:63_000]
    costly = [
        "{" + near.rpartition(",")[0] + "}",
        json.dumps({"action": "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))}, ensure_ascii=False),
        json.dumps({"action": "subscribe" * 7000}),
    ]
    with server.client() as client:
        for message in costly:
            began = time.process_time()
            for _ in range(4):
                client.send_raw(message)
                assert client.receive()["payload"]["code"] in ("invalid_message", "unknown_action")
            assert (time.process_time() - began) / 4 < 0.025


def test_a_handshake_with_huge_headers_is_refused(server: Server) -> None:
    """A handshake's headers stay in memory as long as the connection: they must be of a sane size."""
    status, _, body = server.handshake(**{f"X_{number}": "x" * 4000 for number in range(40)})
    assert (status, body["code"]) == (431, "bad_handshake")
    assert server.handshake(Cookie="x" * 8000)[0] == 101


# ---------------------------------------------------------------------------------------------------
# Hostile clients: who may see what
# ---------------------------------------------------------------------------------------------------


def test_nothing_works_before_signing_in_where_that_is_required() -> None:
    """AUTH = "required": every action but authenticate is refused, and nothing is told or delivered."""
    everything = {
        "type": "*",
        "contentType": "posts",
        "entryId": "1",
        "payload": 1,
        "since": "1-0",
        "token": token(),
    }
    with Server(AUTH="required") as server, server.client() as stranger, server.client() as ana:
        ana.authenticate(token())
        ana.ask("editStart", contentType="posts", entryId="1")
        ana.subscribe()
        for bad in ("x", token(expires_in=-1), token(key="k" * 64)):
            assert stranger.authenticate(bad)["type"] == "system.error"
        for action in swiftcms_ws.ACTIONS.keys() - {"authenticate"}:
            error = stranger.ask(action, **everything)
            assert (error["type"], error["payload"]["code"]) == ("system.error", "auth_required"), action
            assert "ana" not in json.dumps(error)
        server.publish(1)
        server.publish(2, to="ana")
        assert server.hub.flush()
        assert [message["payload"]["n"] for message in ana.receive_many(2)] == [1, 2]
        assert [message["type"] for message in stranger.messages] == []
        assert stat(server, "subscriptions") == 1
        assert [editor["userId"] for editor in server.hub.editors("posts", "1")] == ["ana"]
        stranger.authenticate(token("bob"))
        assert stranger.subscribe(since=stranger.hello["payload"]["lastId"])["replayed"] == 1
        assert [message["payload"]["n"] for message in stranger.rest()] == [1]


def test_what_authorize_refuses_comes_by_no_other_way() -> None:
    """Not by a wider pattern, a re-subscription, a replay, presence, nor a word that looks the same."""
    allowed = {("content.published", "posts"), ("user.*", "pages"), ("user.editing", "pages")}

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            return (event_type, content_type) in allowed

    with Server(configure) as server, server.client() as client, server.client() as other:
        since = client.hello["payload"]["lastId"]
        server.publish(1, "content.published")
        server.publish(2, "content.updated")
        server.hub.publish("content.published", "drafts", {"n": 3})
        for pattern in (
            "*",
            "content.*",
            "content.published",
            "content.published.*",
            "content.updated",
            "user.*",
        ):
            for content_type in ("*", "posts", "drafts", "Posts", "p\u043ests"):
                if (pattern, content_type) in allowed:
                    continue
                for more in (
                    {},
                    {"since": since},
                    {"type": pattern, "payload": 1, "user": "ana", "to": "ana"},
                ):
                    message = {"type": pattern, "contentType": content_type, **more}
                    assert client.ask("subscribe", **message)["payload"]["code"] == "forbidden", message
        assert client.subscribe("content.published", "posts", since=since)["replayed"] == 1
        assert client.receive()["payload"] == {"n": 1}
        allowed.clear()  # the hook changes its mind: what was granted stays, nothing more is
        assert (
            client.ask("subscribe", type="content.published", contentType="posts")["payload"]["code"]
            == "forbidden"
        )
        allowed.update({("user.editing", "pages"), ("user.editing", "posts")})
        other.ask("editStart", contentType="posts", entryId="1")
        allowed.remove(("user.editing", "posts"))
        for action in ("editStart", "editStop", "editChange", "presence"):
            for entry in (
                {"contentType": "posts", "entryId": "1", "payload": 1},
                {"contentType": "posts", "entryId": "2"},
            ):
                error = client.ask(action, **entry)["payload"]
                assert error["code"] == "forbidden" or (action == "editChange" and "payload" not in entry)
                assert other.hello["payload"]["clientId"] not in json.dumps(error)
        for wider in ({}, {"entryId": "1"}, {"contentType": "*"}):
            assert client.ask("presence", **wider)["payload"]["code"] == "forbidden"
        assert client.ask("presence", contentType="pages")["payload"]["entries"] == []
        server.publish(4, "content.updated")
        server.publish(5, "content.published")
        assert server.hub.flush()
        assert [message["payload"]["n"] for message in client.rest() if "n" in message["payload"]] == [5]
        other.nothing_more()


LOOKALIKES = [
    "ana",
    "Ana",
    "an",
    "ana ",
    " ana",
    "anab",
    "\u0430na",
    "ana\u200b",
    "ana\0",
    "ana,bob",
    "*",
    "ana.*",
    "7",
    "07",
]


def test_an_event_for_one_user_reaches_no_lookalike() -> None:
    """`to=` compares whole ids, live and in a replay; nobody signed in gets none, whatever they ask for."""
    with Server() as server, contextlib.ExitStack() as stack:
        clients: dict[str, Client] = {}
        for name in LOOKALIKES:
            clients[name] = stack.enter_context(
                server.client(headers={"Authorization": f"Bearer {token(name)}"})
            )
            clients[name].subscribe()
            assert clients[name].hello["payload"]["userId"] == name
        stranger = stack.enter_context(server.client())
        stranger.subscribe()
        since = stranger.hello["payload"]["lastId"]
        expected: dict[str, list[int]] = {name: [] for name in LOOKALIKES}
        for number, to in enumerate([*LOOKALIKES, 7, ["ana", "7"], ("an", "*"), {"ana", "Ana"}, []]):
            server.publish(number, to=to)
            for name in {str(each) for each in (to if isinstance(to, (list, tuple, set)) else [to])}:
                expected[name].append(number)
        for name, client in clients.items():
            assert [message["payload"]["n"] for message in client.rest()] == expected[name], name
            with server.client() as again:
                again.authenticate(token(name))
                again.subscribe(since=since)
                assert [message["payload"]["n"] for message in again.rest()] == expected[name], name
        stranger.nothing_more()
        assert stranger.ask("unsubscribe")["payload"]["removed"] == 1
        stranger.send(action="subscribe", since=since, userId="ana", to="ana", user={"id": "ana"}, sub="ana")
        assert stranger.receive()["payload"]["replayed"] == 0


def test_a_token_that_runs_out_ends_what_it_opened(caplog: pytest.LogCaptureFixture) -> None:
    """It makes no difference how it came, or how lively its owner is; others stay."""
    with Server(AUTH="required") as server, server.client() as lasting:
        lasting.authenticate(token("ana", expires_in=600))
        lasting.subscribe()
        short = token("ana", expires_in=2)
        by_path, by_header = (
            server.client(path=f"/ws?token={short}"),
            server.client(headers={"Authorization": f"Bearer {short}"}),
        )
        with by_path, by_header, server.client() as by_message:
            by_message.authenticate(short)
            for client in (by_path, by_header, by_message):
                client.subscribe()
            for client in (by_path, by_header, by_message):
                while (message := client.receive())["type"] != "system.error":
                    pass
                assert message["payload"]["code"] == "token_expired"
                assert client.closing().code == 4401
        until(lambda: stat(server, "connections") == 1)
        server.publish(1, to="ana")
        assert lasting.receive()["payload"] == {"n": 1}
        until(lambda: stat(server, "closed_4401") == 3, "the count of all ends")
        assert stat(server, "error_token_expired") == 3
    assert len(log_lines(caplog)) == 1


STRANGE_ENDS = [
    "9999999999",
    1e300,
    10**30,
    int(time.time() * 1000) + 10**9,
    -(10**30),
    4e9 + 0.5,
    True,
    None,
    [],
]


def test_tokens_with_a_strange_end_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Another system's token may have its `exp` in milliseconds, as text, or beyond all calendars.

    It is taken or refused; in no case does it stop the heartbeat, which watches over everyone's end.
    """
    with Server(HEARTBEAT=1.2) as server, contextlib.ExitStack() as stack:
        watched = stack.enter_context(server.client())
        watched.authenticate(token(expires_in=2))
        for exp in STRANGE_ENDS:
            strange = jwt.encode({"sub": "eve", "exp": exp}, KEY)
            with contextlib.suppress(Refused):
                stack.enter_context(server.client(path=f"/ws?token={strange}"))
            client = stack.enter_context(server.client())
            answer = client.authenticate(strange)
            codes = ("invalid_token", "token_expired")
            assert answer["type"] == "system.authenticated" or answer["payload"]["code"] in codes, exp
        assert watched.receive()["payload"]["code"] == "token_expired"
        assert watched.pings > 0
        assert watched.closing().code == 4401
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_connection_stays_with_its_first_user() -> None:
    """A token of someone else is refused however the first user came, and nothing of theirs arrives."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: request.headers.get("X-User"))

    ways: list[dict[str, Any]] = [
        {"headers": {"X-User": "7"}},
        {"path": f"/ws?token={token(7)}", "headers": {"X-User": "eve"}},
        {"headers": {"Authorization": f"Bearer {token('7')}"}},
        {},
    ]
    with Server(configure) as server:
        for way in ways:
            with server.client(**way) as client:
                if not way:
                    client.authenticate(token(7))
                client.subscribe()
                for other in ("eve", "70", "7 ", "\uff17"):
                    assert client.authenticate(token(other))["payload"]["code"] == "invalid_token"
                    server.publish(1, to=other)
                assert client.authenticate(token("7"))["payload"]["userId"] == "7"
                server.publish(2, to=7)
                assert [message["payload"]["n"] for message in client.rest()] == [2]


def test_disconnect_ends_all_of_one_user_and_nobody_else() -> None:
    """A ban reaches every tab, however it signed in; what is published or sent afterwards has no effect."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: request.headers.get("X-User"))

    with Server(configure) as server, contextlib.ExitStack() as stack:
        ways: list[dict[str, Any]] = [{"headers": {"X-User": "7"}}, {"path": f"/ws?token={token(7)}"}, {}]
        banned = [stack.enter_context(server.client(**way)) for way in ways]
        banned[-1].authenticate(token(7))
        others = [
            stack.enter_context(server.client(headers={"X-User": name})) for name in ("70", "07", "eve")
        ]
        for client in (*banned, *others):
            client.subscribe()
            client.ask("editStart", contentType="posts", entryId="1")
        for client in banned:
            client.rest()
        assert server.hub.disconnect(7) == 3
        server.publish(1)
        for client in banned:
            with contextlib.suppress(OSError):
                client.send(action="subscribe", type="content.*")
            assert client.closing().code == 4401
            assert [message for message in client.messages if "n" in message["payload"]] == []
            client.sock.close()
        until(lambda: stat(server, "connections") == 3)
        until(lambda: len(server.hub.editors("posts", "1")) == 3)
        for client in others:
            assert [message["payload"]["n"] for message in client.rest() if "n" in message["payload"]] == [1]


SAME_HOST = [  # Origin, Host, may it?
    ("http://site.example", "site.example", True),
    ("https://site.example", "site.example", True),  # TLS may end at a proxy
    ("HTTP://SITE.Example", "site.example", True),
    ("http://site.example:80", "site.example", True),
    ("https://site.example", "site.example:443", True),
    ("http://site.example:8080", "site.example:8080", True),
    ("http://[::1]:8080", "[::1]:8080", True),
    (None, "site.example", True),
    ("http://site.example:8081", "site.example:8080", False),
    ("http://site.example:8080", "site.example", False),
    ("https://site.example:80", "site.example", False),
    ("http://evil.example", "site.example", False),
    ("http://site.example.evil.example", "site.example", False),
    ("http://evil-site.example", "site.example", False),
    ("http://www.site.example", "site.example", False),
    ("http://site.example.", "site.example", False),
    ("http://site.example@evil.example", "site.example", False),
    ("http://evil.example@site.example", "site.example", False),
    ("http://site.example:80@evil.example", "site.example", False),
    ("http://evil.example#@site.example", "site.example", False),
    ("http://evil.example?http://site.example", "site.example", False),
    ("http://evil.example/http://site.example", "site.example", False),
    ("http://evil.example\\@site.example", "site.example", False),
    ("http://site.example http://evil.example", "site.example", False),
    ("site.example", "site.example", False),
    ("//site.example", "site.example", False),
    ("://site.example", "site.example", False),
    ("1", "site.example", False),
    ("", "site.example", False),
    ("9p://evil.example", "site.example", False),
    ("not_a_scheme://evil.example", "site.example", False),
    ("null", "site.example", False),
    ("null", "not a host", False),
    ("null", "", False),
    ("file://", "site.example", False),
    ("http://", "site.example", False),
    ("http://[evil", "site.example", False),
    ("http://site.example:99999", "site.example", False),
    ("http://site.example:x", "site.example", False),
    ("http://s\u00efte.example", "site.example", False),
    ("http://" + "a" * 5000, "site.example", False),
]


def test_origins_of_the_same_host(caplog: pytest.LogCaptureFixture) -> None:
    """By default the page must come from the host and port that it connects to; all tricks are a 403."""
    with Server() as server:
        for origin, host, may in SAME_HOST:
            assert (server.handshake(Origin=origin, Host=host)[0] == 101) is may, (origin, host)
        status, _, body = server.handshake(Origin="http://evil.example")
        assert (status, body["code"]) == (403, "forbidden")
        assert stat(server, "refused_403") > 20
    assert len(log_lines(caplog, "SWIFTCMS_WS_ORIGINS")) == len(log_lines(caplog)) == 1


def test_origins_that_are_named() -> None:
    """A list names the only ones; "*" lets every page in; no Origin is no browser, and may always."""
    listed = ["https://site.example", "http://Local.example:3000/"]
    with Server(ORIGINS=listed) as server:
        for origin in ("https://site.example", "HTTPS://Site.Example", "http://local.example:3000", None):
            assert server.handshake(Origin=origin)[0] == 101, origin
        for origin in (
            "http://site.example",
            "https://site.example:8443",
            "https://site.example.evil.example",
            "https://site.example@evil.example",
            "http://local.example",
            f"http://127.0.0.1:{server.port}",
            "null",
            "",
            "*",
        ):
            assert server.handshake(Origin=origin)[0] == 403, origin
    with Server(ORIGINS="*") as server:
        for origin in ("http://evil.example", "null", "", None):
            assert server.handshake(Origin=origin)[0] == 101
    with Server(ORIGINS=[]) as server:
        assert server.handshake(Origin=f"http://127.0.0.1:{server.port}")[0] == 403


def test_a_token_is_written_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not into a log, an access log included, nor an answer, an error, a close reason or an HTTP body."""
    caplog.set_level(logging.DEBUG)
    heard: list[Any] = []
    tokens = {
        "good": token(),
        "short-lived": token(expires_in=2),
        "other": token("eve"),
        "expired": token(expires_in=-5),
        "forged": token(key="k" * 64),
        "of another kind": token(algorithm="HS512"),
    }
    with Server(HEARTBEAT=0.3) as server:
        for name, secret in tokens.items():
            for path in (
                f"/ws?token={secret}",
                f"/ws?a=b&token={secret}&c=d",
                f"/ws?%74oken={secret}",
                f"/ws?token={secret}%20",
            ):
                heard.append(server.handshake(path))
            heard.append(server.handshake(Authorization=f"Bearer {secret}"))
            heard.append(server.get(f"/ws?token={secret}"))
            heard.append(http(f"http://127.0.0.1:{server.port}/ws?token={secret}", "POST"))
            heard.append(server.get(f"/ws/client.js?token={secret}"))
            heard.append(server.get(f"/elsewhere?token={secret}")[0])
            for line in (
                f"GET /ws?token={secret} one two",
                f"GET /ws?token={secret} HTTP/7.0",
                f"X /ws?token={secret} HTTP/1.1",
            ):
                with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
                    sock.sendall(f"{line}\r\nHost: x\r\n\r\n".encode())
                    heard.append(read_to_the_end(sock).replace(line.encode(), b""))
            with server.client() as client:
                heard.append(client.authenticate(secret))
                for message in (
                    {"action": "authenticate", "tokn": secret},
                    {"action": "authenticate", "token": [secret]},
                    {"action": "authenticate", "token": secret + "x"},
                    {"action": "authenticate", "token": {"token": secret}},
                    {"action": "subscribe", "type": "*", "token": secret},
                ):
                    client.send(**message)
                    heard.append(client.receive(heartbeats=False))
                client.send_raw('{"action": "authenticate", "token": "' + secret)
                heard.append(client.receive())
                if name == "short-lived":
                    client.authenticate(secret)
                    closed = client.closing()
                    heard.append([*client.messages, closed.code, closed.reason])
                    assert closed.code == 4401
    everything = caplog.text + repr([record.__dict__ for record in caplog.records]) + repr(heard)
    assert "GET /ws?token=" in everything
    for name, secret in tokens.items():
        for part in secret.split(".")[1:]:
            assert part not in everything, (name, everything[everything.index(part) - 300 :][:400])


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
def test_a_short_key_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A key that can be guessed is warned of, with the cure, once; a long one is not; neither is shown."""
    for key, length in (("hunter2-hunter2", 15), ("é" * 16, None), (b"\xff" * 31, 31)):
        caplog.clear()
        with Server(JWT_KEY=key) as server:
            for _ in range(3):
                with server.client() as client:
                    client.authenticate(server.hub.issue_token("ana"))
            server.publish(1)
        lines = log_lines(caplog, "SWIFTCMS_WS_JWT_KEY")
        assert len(lines) == len(log_lines(caplog)) == (length is not None)
        assert all(
            f"{length} bytes" in line and "hunter2" not in line and "secrets" in line for line in lines
        )


def forged(header: dict[str, Any], key: bytes, sub: str = "root") -> str:
    """Return a token signed with HMAC by hand, for PyJWT refuses to do it with such keys."""

    def part(value: Any) -> str:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = f"{part(header)}.{part({'sub': sub, 'exp': int(time.time()) + 600})}"
    digest = (
        {"256": hashlib.sha256, "384": hashlib.sha384, "512": hashlib.sha512}[header["alg"][-3:]]
        if key
        else None
    )
    return f"{signed}.{part(hmac.new(key, signed.encode(), digest).digest()) if digest else ''}"


def test_a_public_key_signs_nothing() -> None:
    """With RS256, a token that is HMAC-signed with the public key's text, or not at all, is refused."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = {"sub": "ana", "exp": time.time() + 600}
    attacks = [
        *(forged({"alg": alg, "typ": "JWT", **more}, public) for alg in ("HS256", "HS512") for more in (
            {}, {"kid": "../../dev/null"}, {"jwk": {"kty": "oct", "k": "AA"}}, {"jku": "http://127.0.0.1:1/"}
        )),
        forged({"alg": "HS256"}, public.strip()),
        forged({"alg": "HS256"}, b"\0"),
        *(forged({"alg": alg}, b"") for alg in ("none", "None", "NONE", "nOnE", "", "RS256")),
        jwt.encode(claims, rsa.generate_private_key(public_exponent=65537, key_size=2048), algorithm="RS256"),
        jwt.encode(claims, private, algorithm="RS512"),
        jwt.encode(claims, private, algorithm="PS256"),
    ]  # fmt: skip
    with Server(JWT_ALGORITHMS=["RS256"], JWT_KEY=public.decode()) as server, server.client() as client:
        for attack in attacks:
            assert client.authenticate(attack)["payload"]["code"] == "invalid_token", (
                jwt.get_unverified_header(attack)
            )
            assert server.handshake(f"/ws?token={attack}")[0] == 401
        with pytest.raises(ValueError, match="private key"):
            server.hub.issue_token("ana")
        good = jwt.encode(claims, private, algorithm="RS256")
        assert client.authenticate(good)["payload"]["userId"] == "ana"
    for mixed in (["RS256", "HS256"], ["none"], ["HS256", "none"], []):
        with pytest.raises(ValueError, match="JWT_ALGORITHMS"):
            Server(JWT_ALGORITHMS=mixed)


@pytest.mark.parametrize(
    "header",
    [{"alg": "none"}, {"alg": "NONE"}, {"alg": "HS384"}, {"alg": "HS256", "crit": ["b64"], "b64": False}],
)
def test_a_token_cannot_choose_how_it_is_checked(server: Server, header: dict[str, Any]) -> None:
    """The algorithm is the site's choice: none, another one and unknown demands are all invalid_token."""
    with server.client() as client:
        for key in (KEY.encode(), b""):
            attack = forged(header, key if header["alg"].startswith("HS") else b"")
            assert client.authenticate(attack)["payload"]["code"] == "invalid_token"
            assert server.handshake(f"/ws?token={attack}")[2]["code"] == "invalid_token"


# ---------------------------------------------------------------------------------------------------
# Careless sites: hooks with a database, functions of their own around every request
# ---------------------------------------------------------------------------------------------------


def test_sixty_sockets_hold_no_database_connection(tmp_path: Path) -> None:
    """A pool of 5 serves a site whose every hook queries the database, with 60 sockets open."""
    pytest.importorskip("flask_sqlalchemy")
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy import text as sql
    from sqlalchemy.pool import QueuePool

    db = SQLAlchemy()
    queries: Counter[str] = Counter()

    def ask_the_database(who: str) -> bool:
        queries[who] += 1
        return bool(db.session.execute(sql("SELECT 1")).scalar())

    def configure(app: Flask, hub: Hub) -> None:
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'site.db'}"
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "poolclass": QueuePool, "pool_size": 5, "max_overflow": 0, "pool_timeout": 3,
        }  # fmt: skip
        db.init_app(app)
        app.before_request(lambda: ask_the_database("before_request") and None)
        hub.identify(lambda: "ana" if ask_the_database("identify") else None)
        hub.authorize(lambda user, event_type, content_type: ask_the_database("authorize"))
        app.get("/page")(lambda: str(ask_the_database("view")))

    with Server(configure) as server, contextlib.ExitStack() as stack:
        with server.app.app_context():
            pool = db.engine.pool
            stack.callback(db.engine.dispose)
        assert isinstance(pool, QueuePool)
        clients: list[Client] = []

        def join() -> None:
            for _ in range(10):
                client = stack.enter_context(server.client())
                client.subscribe()
                clients.append(client)

        run_all([join] * 6)
        assert stat(server, "connections") == 60
        until(lambda: pool.checkedout() == 0, "all connections back in the pool", timeout=5)
        for _ in range(10):
            assert server.get("/page")[0::2] == (200, b"True")
        run_all([lambda: clients[0].ask("presence") and None, *[lambda: server.get("/page") and None] * 8])
        server.publish(1)
        for client in clients:
            assert client.receive()["payload"] == {"n": 1}
        for client in clients[:30]:
            client.close()
        assert server.get("/page")[0] == 200
        until(lambda: stat(server, "connections") == 30)
        until(lambda: pool.checkedout() == 0, "all connections back in the pool", timeout=5)
        assert queries["identify"] == 60
        assert queries["before_request"] == 60 + 10 + 8 + 1


def test_what_a_site_keeps_in_g_is_there_when_the_socket_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A site may note something before each request and read it after; a socket's request is none other."""
    seen: list[str] = []

    def configure(app: Flask, hub: Hub) -> None:
        @app.before_request
        def note() -> None:
            g.path = request.path

        @app.after_request
        def read(response: Any) -> Any:
            seen.append(g.path)
            return response

    with Server(configure) as server:
        with server.client() as client:
            client.close()
        until(lambda: seen, "the end of the request", timeout=5)
    assert seen == ["/ws"]
    assert "Traceback" not in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sites_failing_teardown_leaves_no_thread_and_takes_no_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the site's own clean-up fails (its database is down), its client ends, and nothing else stays."""

    def configure(app: Flask, hub: Hub) -> None:
        @app.teardown_request
        def clean_up(error: BaseException | None) -> None:
            if request.args.get("break"):
                raise RuntimeError("the database is down")

    threads = threading.active_count()
    with Server(configure, MAX_CONNECTIONS=3) as server:
        for _ in range(4):
            with contextlib.suppress(Closed, AssertionError):
                server.client(path="/ws?break=1").sock.close()
        until(lambda: server.hub._running().registry.places == 0, "free places", timeout=5)
        with server.client() as client:
            assert client.subscribe()["recovered"]
    until(lambda: threading.active_count() <= threads, "the end of all threads", timeout=5)
    assert "the database is down" in caplog.text


def test_a_signals_receiver_that_fails_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A site's own function for connects or disconnects may fail: it is logged, and the place is free."""

    def fail(app: Flask, hub: Hub, **more: Any) -> None:
        raise RuntimeError("the receiver failed")

    with Server(MAX_CONNECTIONS=1) as server:
        for signal_ in (swiftcms_ws.client_connected, swiftcms_ws.client_disconnected):
            with signal_.connected_to(fail, server.app):
                with server.client() as client:
                    is_let_in = signal_ is swiftcms_ws.client_disconnected
                    assert (client.close() if is_let_in else client.closing()).code == (
                        1000 if is_let_in else 1011
                    )
                until(lambda: server.hub._running().registry.places == 0, "a free place", timeout=5)
                until(lambda: "the receiver failed" in caplog.text, "a line in the log", timeout=5)
            caplog.clear()
        with server.client() as client:
            assert client.subscribe()["recovered"]


def test_a_failure_of_the_library_ends_one_client_and_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were wsproto to raise, it is logged, and the client does not go on editing for ever."""

    class Fails(swiftcms_ws.FrameParser):
        def receive_data(self, data: bytes | None) -> None:
            if data and len(data) > 1000:
                raise RuntimeError("the parser failed")
            super().receive_data(data)

    monkeypatch.setattr(swiftcms_ws, "FrameParser", Fails)
    with server.client() as client, server.client() as other:
        client.ask("editStart", **POST)
        assert server.hub.editors("posts", "42")
        client.send(action="heartbeat", padding="x" * 2000)
        until(lambda: not server.hub.editors("posts", "42"), "the end of its editing", timeout=5)
        assert "the parser failed" in caplog.text
        assert other.ask("heartbeat")["type"] == "system.heartbeat"


def test_a_sites_options_for_its_other_sockets_do_no_harm() -> None:
    """SOCK_SERVER_OPTIONS are for all of flask-sock; with its own pings on, messages are answered at once."""

    def configure(app: Flask, hub: Hub) -> None:
        app.config["SOCK_SERVER_OPTIONS"] = {"ping_interval": 2, "max_message_size": 10, "receive_bytes": 100}

    with Server(configure) as server, server.client() as client:
        began = time.monotonic()
        for _ in range(5):
            client.subscribe()
        assert time.monotonic() - began < 1.5
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}


def test_what_comes_with_a_close_frame_is_carried_out(server: Server) -> None:
    """A client may say its last word and leave in one breath: the word counts."""
    with server.client() as stays, server.client() as leaves:
        for client in (stays, leaves):
            client.ask("editStart", contentType="posts", entryId="1")
        last_word = text(action="editChange", contentType="posts", entryId="1", payload="the last word")
        leaves.sock.sendall(last_word + Frames.masked(0x8, struct.pack("!H", 1000)))
        assert leaves.closing().code == 1000
        until(lambda: len(server.hub.editors("posts", "1")) == 1)
        assert [message["payload"]["change"] for message in stays.rest()] == ["the last word"]


# ---------------------------------------------------------------------------------------------------
# The fuzzer: seeded, bounded, and beside a client that misses nothing
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_is_left(caplog: pytest.LogCaptureFixture, **config: Any) -> Iterator[Server]:
    """Run a server with a healthy client; afterwards that has got every event and nothing else remains.

    No failure is logged, and threads, files, connections and subscriptions are back where they were.
    """
    with Server(**config) as server, server.client() as healthy:
        healthy.subscribe()
        threads, files = threading.active_count(), open_files()
        stop, got = threading.Event(), []

        def publish() -> None:
            for number in itertools.count():
                server.publish(number)
                if stop.wait(0.01):
                    server.hub.publish("the.end", "posts", {"count": number + 1})
                    return

        def listen() -> None:
            while (message := healthy.receive())["type"] != "the.end":
                if message["type"] == "content.created":
                    got.append(message["payload"]["n"])
            assert got == list(range(message["payload"]["count"]))

        with running([publish, listen], PATIENCE):
            try:
                yield server
            finally:
                stop.set()
        until(lambda: stat(server, "connections") == 1, "the end of all others")
        assert (stat(server, "subscriptions"), stat(server, "waiting_bytes")) == (1, 0)
        until(lambda: threading.active_count() <= threads, "the end of their threads")
        until(lambda: open_files() <= files, "the end of their files")
        assert server.hub._running().registry.places == 1
        assert healthy.ask("presence")["payload"]["entries"] == []
    failures_logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line for line in failures_logged if "code 400" not in line and "code 50" not in line] == []
    assert "Traceback" not in caplog.text


VIOLATIONS: dict[str, tuple[bytes, int]] = {
    "unmasked": (b"\x81\x02{}", 1002),
    "unmasked ping": (b"\x89\x00", 1002),
    **{f"reserved bits {bits}": (Frames.masked(0x1, b"{}", rsv=bits), 1002) for bits in (1, 2, 4, 7)},
    **{f"opcode {code:#x}": (Frames.masked(code, b"{}"), 1002) for code in (3, 7, 0xB, 0xF)},
    "fragmented ping": (Frames.masked(0x9, b"x", fin=False), 1002),
    "fragmented close": (Frames.masked(0x8, b"\x03\xe8", fin=False), 1002),
    "large ping": (Frames.masked(0x9, b"x" * 126), 1002),
    "large close": (Frames.masked(0x8, b"\x03\xe8" + b"x" * 300), 1002),
    "a length of the wrong size": (b"\x81\xfe\x00\x02\0\0\0\0{}", 1002),
    "a length of the wrong size, again": (b"\x81\xff" + struct.pack("!Q", 300) + b"\0\0\0\0", 1002),
    "a negative length": (b"\x81\xff" + struct.pack("!Q", 1 << 63) + b"\0\0\0\0", 1002),
    "continuation of nothing": (Frames.masked(0x0, b"{}"), 1002),
    "text in a text": (Frames.masked(0x1, b"{", fin=False) + Frames.masked(0x1, b"}"), 1002),
    "not UTF-8": (Frames.masked(0x1, b'{"action": "\xff"}'), 1007),
    "overlong UTF-8": (Frames.masked(0x1, b"\xc0\xaf"), 1007),
    "a surrogate in UTF-8": (Frames.masked(0x1, b"\xed\xa0\x80"), 1007),
    "UTF-8 cut short": (Frames.masked(0x1, b"\xe2\x82"), 1007),
    "UTF-8 cut short in fragments": (Frames.masked(0x1, b"\xe2", fin=False) + Frames.masked(0x0, b"x"), 1007),
    "close with one byte": (Frames.masked(0x8, b"\x03"), 1002),
    **{f"close with {code}": (Frames.masked(0x8, struct.pack("!H", code)), 1002)
       for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 65535)},
    "close with bad UTF-8": (Frames.masked(0x8, b"\x03\xe8\xff"), 1007),
}  # fmt: skip


def test_broken_frames_end_their_sender_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Each way to break RFC 6455's framing is answered with its close code, after what was whole."""
    before = text(action="heartbeat", ref="before it")
    with nothing_is_left(caplog) as server:
        for kind, (data, code) in VIOLATIONS.items():
            with open_raw(server.port) as sock:
                sock.sendall(before + data)
                answer = read_to_the_end(sock)
                assert close_code(answer) == code, (kind, answer)
                assert b"before it" in answer, (kind, answer)


def test_random_bytes_and_rude_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of connections send noise, halves of frames and pieces of sense, and leave as they like."""
    seeds = random.Random(6455)
    pieces = [data for data, _ in VIOLATIONS.values()] + [
        text(action="subscribe"),
        text(action="subscribe", since="1-0", ref=1),
        text(action="editStart", contentType="posts", entryId="1"),
        Frames.masked(0x9, b"ping"),
        Frames.masked(0xA, b"pong"),
        Frames.masked(0x1, b"{", fin=False),
        Frames.masked(0x1, b"x" * 50, length=1 << 62),
        Frames.masked(0x8, b"\x03\xe8bye"),
    ]

    def attack(port: int, rng: random.Random) -> None:
        for _ in range(75):
            sock = open_raw(port)
            sock.settimeout(0.2)
            data = b"".join(
                rng.choice([*pieces, rng.randbytes(rng.randrange(1, 300))]) for _ in range(rng.randrange(5))
            )
            data = data[: rng.randrange(1, len(data) + 1)] if data else data
            with contextlib.suppress(OSError):
                sock.sendall(data)
                match rng.randrange(5):
                    case 0:
                        sock.recv(65536)
                    case 1:
                        sock.shutdown(socket.SHUT_WR)
                        read_to_the_end(sock)
                    case 2:
                        sock.shutdown(socket.SHUT_RD)
                    case 3:
                        vanish(sock)
            sock.close()

    with nothing_is_left(caplog) as server:
        rngs = [random.Random(seeds.random()) for _ in range(4)]
        run_all([lambda rng=rng: attack(server.port, rng) for rng in rngs])  # type: ignore[misc]


BROKEN_JSON = [
    "", " ", "{", "}", "{}", "[]", "nul", "\u0000", "\ufeff{}", "'a'", '{"action"}', '{"action":}', '{action: "heartbeat"}',
    '{"action": "heartbeat",}', '{"action": "heartbeat"} x', '{"action": "heart\nbeat"}', '{"action": "\\x"}',
    '{"action": "\\ud800"}', '{"action": "heartbeat", "ref": "\\ud800"}', '{"action": "heartbeat", "ref": "\\udc00\\ud800"}',
    '{"action": "subscribe", "type": "\\ud800"}', '{"action": "subscribe", "since": "\\ud800"}',
    '{"action": "editStart", "contentType": "posts", "entryId": "\\ud800"}',
    '{"action": "authenticate", "token": "\\ud800.\\ud800.\\ud800"}', '{"action": "authenticate", "token": "..\\u0000"}',
    '{"action": "heartbeat", "action": "subscribe", "action": 7}', '{"ref": 1, "ref": {}, "action": "heartbeat"}',
    '{"action": "heartbeat", "ref": 1e400}', '{"action": "heartbeat", "ref": -1e400}', '{"action": "heartbeat", "ref": 1e-400}',
    '{"action": "heartbeat", "ref": NaN}', '{"action": "heartbeat", "ref": Infinity}', '{"action": "heartbeat", "ref": -0}',
    '{"action": "heartbeat", "ref": ' + "9" * 4000 + "}", '{"action": "heartbeat", "ref": ' + "9" * 5000 + "}",
    '{"action": "heartbeat", "ref": 1' + "0" * 5000 + ".5}", '{"action": "heartbeat", "ref": "' + "\\u0000" * 3000 + '"}',
    '{"action": 1e400}', '{"action": "subscribe", "type": 1e400}', '{"action": "presence", "entryId": 1e999}',
    '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": 1e400}',
    '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": [{"a": [-1e999]}]}',
    '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": "\\ud800"}',
    '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": {"\\ud800": "\\udfff"}}',
    '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": ' + "9" * 4300 + "}",
]  # fmt: skip
DEPTHS = [5, 50, 500, *range(900, 1001, 2), *range(960, 1000), 2000, 30_000]


def test_broken_json_is_answered_and_the_connection_stays(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a text message holds, its sender is told, and goes on; other editors get only JSON."""
    with (
        nothing_is_left(caplog, RATE=100_000) as server,
        server.client() as client,
        server.client() as editor,
    ):
        for each in (client, editor):
            each.ask("editStart", contentType="posts", entryId="1")
        head = '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": '
        deep = [head + "[" * depth + "]" * depth + "}" for depth in DEPTHS]
        deeper = [head + '{"a":' * depth + "1" + "}" * depth + "}" for depth in DEPTHS if depth < 10_000]
        for message in [*BROKEN_JSON, *deep, *deeper]:
            client.send_raw(message)
            try:
                assert client.ask("heartbeat")["type"] == "system.heartbeat"
            except Closed as closed:
                raise AssertionError(f"{closed} after {message[:100]}") from None
            for answer in client.messages:
                code = answer["payload"].get("code")
                assert answer["type"] != "system.error" or isinstance(code, str), message
            client.messages.clear()
        assert editor.ask("heartbeat")["type"] == "system.heartbeat"
        assert {message["type"] for message in editor.messages} == {"user.edited"}
        client.close()
        editor.close()


WRONG: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, 1e308, -(10**40), "", " ", "*", "**", ".", "a.", "a..b", "*.a", "a\0b", "é", "\u2028", "<b>",
    "x" * 129, "x" * 3000, "1-0", "0-0", "18446744073709551616-18446744073709551616", "constructor", "__class__", "{0}", "%s%n",
    [], ["*"], [[]], {}, {"a": 1}, {"type": "*"},
]  # fmt: skip
FIELDS = ["action", "type", "contentType", "token", "ref", "since", "entryId", "payload"]


def test_every_field_of_every_action_with_every_wrong_kind(caplog: pytest.LogCaptureFixture) -> None:
    """No value in any field of any action fails the server, ends its sender or stays behind it."""
    good = {
        "type": "content.*",
        "contentType": "posts",
        "entryId": "1",
        "payload": 1,
        "since": "1-0",
        "token": "x",
        "ref": 1,
    }
    rng = random.Random(8259)
    messages = [
        {**good, "action": action, field: value}
        for action in swiftcms_ws.ACTIONS
        for field in FIELDS
        for value in WRONG
    ]
    for _ in range(400):  # and several at once
        message = {**good, "action": rng.choice(list(swiftcms_ws.ACTIONS))}
        for field in rng.sample(FIELDS[1:], rng.randrange(2, 6)):
            if rng.random() < 0.3:
                del message[field]
            else:
                message[field] = rng.choice(WRONG)
        messages.append(message)
    rng.shuffle(messages)
    codes: Counter[str] = Counter()
    with nothing_is_left(caplog, RATE=100_000, MAX_SUBSCRIPTIONS=4) as server, server.client() as client:
        client._refs = itertools.count(1000)
        for start in range(0, len(messages), 50):
            client.sock.sendall(b"".join(text(**message) for message in messages[start : start + 50]))
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
            codes.update(m["payload"]["code"] for m in client.messages if m["type"] == "system.error")
            client.messages.clear()
        client.close()
    assert codes.keys() == {
        "unknown_action", "invalid_message", "invalid_type", "invalid_since", "invalid_token", "not_editing",
        "too_many_subscriptions",
    }  # fmt: skip


STRANGE_HEADERS: list[dict[str, str | None]] = [
    {"Sec_WebSocket_Protocol": "caf\u00e9"},
    {"Sec_WebSocket_Protocol": ",,;\x01"},
    {"Sec_WebSocket_Extensions": "\u00ff; =;;,"},
    {"Sec_WebSocket_Version": "\u00e9"},
    {"Sec_WebSocket_Version": "-1"},
    {"Sec_WebSocket_Key": "\u00e9"},
    {"Sec_WebSocket_Key": ""},
    {"Connection": "Upgrade, \u00e9"},
    {"Host": "\u00e9"},
    {"Host": ""},
    {"Host": None},
    {"X_A": "a\0b"},
    {"X_(": "a"},
    {"Cookie": "session=\u00ff\u00fe; =; ;"},
    {"Authorization": "Bearer \u00e9"},
    {"Authorization": "Bearer"},
    {"Authorization": "\u00e9"},
    {"Content_Length": "-5"},
    {"Content_Length": "many"},
    {"Transfer_Encoding": "chunked"},
    {"Origin": "\u00ff"},
]


def test_a_strange_handshake_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    """Headers that no browser sends are let in or answered with 4xx and JSON, never with a traceback."""
    with nothing_is_left(caplog) as server:
        for headers in STRANGE_HEADERS:
            try:
                status, _, body = server.handshake(**headers)
            except ValueError as error:
                raise AssertionError(f"no JSON for {headers}") from error
            assert status == 101 or (400 <= status < 500 and body["code"]), (headers, status, body)
        for path in (
            "/ws?token=%ff%fe",
            "/ws?token=%00",
            "/ws?token=",
            "/ws?token=a.b.c&token=d",
            "/ws?token=" + "x" * 20_000,
        ):
            assert server.handshake(path)[0] == 401, path


def test_handshakes_that_are_noise_or_never_end(caplog: pytest.LogCaptureFixture) -> None:
    """Noise, halves, wrong methods and slow drips before the upgrade take no place and leave nothing."""
    rng = random.Random(2616)
    with nothing_is_left(caplog) as server:
        whole = upgrade_request(server.port)
        for number in range(80):
            data = bytearray(whole)
            match number % 4:
                case 0:
                    data = bytearray(rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n")
                case 1:
                    data = data[: rng.randrange(1, len(data) - 1)]
                case 2:
                    for _ in range(rng.randrange(1, 6)):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                case 3:
                    data = bytearray(rng.choice([b"OPTIONS", b"HEAD", b"POST", b"DELETE"]) + data[3:])
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(data)
                    sock.settimeout(0.02)
                    sock.recv(65536)
                if number % 3 == 0:
                    vanish(sock)
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in whole:
                sock.sendall(bytes([byte]))
            read_to(sock, b"system.connected")
            for byte in text(action="subscribe", ref="drip") + fragments(
                b'{"action": "heartbeat", "ref": "drop"}', 1
            ):
                sock.sendall(bytes([byte]))
            assert b'"drip"' in read_to(sock, b'"ref": "drop"')


# ---------------------------------------------------------------------------------------------------
# Hostile clients: thousands of them, and a flood
# ---------------------------------------------------------------------------------------------------


def test_two_thousand_come_and_go() -> None:
    """Connect, subscribe, leave, a third of them abruptly: nothing is left and memory stays flat."""
    with Server() as server:
        server.hub.flush()  # starts what stays
        threads, files = threading.active_count(), open_files()
        cycles, memory = itertools.count(1), {}

        def come_and_go() -> None:
            while (number := next(cycles)) <= 2000:
                sock = open_raw(server.port)
                sock.sendall(text(action="subscribe", type=f"kind{number}.*", ref=1))
                if number % 5 == 0:
                    sock.sendall(text(action="editStart", contentType="posts", entryId=str(number)))
                read_to(sock, b"system.subscribed")
                match number % 3:
                    case 0:
                        vanish(sock)
                    case 1:
                        sock.sendall(Frames.masked(0x8, b"\x03\xe8"))
                        read_to_the_end(sock)
                sock.close()
                if number in (500, 2000):
                    memory[number] = resident()

        run_all([come_and_go] * 3, timeout=90)
        until(lambda: stat(server, "connections") == 0)
        assert server.hub.flush()
        stats = server.hub.stats()
        assert (stats["subscriptions"], stats["queue_length"], stats["waiting_bytes"], stats["errors"]) == (
            0,
            0,
            0,
            0,
        )
        until(lambda: threading.active_count() <= threads, "the end of all threads")
        until(lambda: open_files() <= files, "the end of all files")
        engine = server.hub._running()
        assert (engine.registry.places, engine.registry._subscribers, engine.registry._by_user) == (
            0,
            {},
            {},
        )
        with server.client() as last:
            assert last.ask("presence")["payload"]["entries"] == []
        assert memory[2000] - memory[500] < 15_000_000


FLOODER = """
import socket, sys
port, request, first, frame = int(sys.argv[1]), *(bytes.fromhex(each) for each in sys.argv[2:])
while True:
    try:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request)
        sock.recv(65536)
        sock.sendall(first)
        print("flooding", flush=True)
        while True:
            sock.sendall(frame * 500)
    except ConnectionError:
        sock.close()
"""


@pytest.mark.parametrize("kind", ["messages", "pongs"])
def test_a_flood_is_cut_and_its_neighbours_do_not_notice(server: Server, kind: str) -> None:
    """While one client floods, is ended with 4429, and comes back for more, an event is as fast as before."""
    first, frame = {"messages": (b"", text(action="heartbeat")), **FLOODS}[kind]

    def delivery(count: int) -> float:
        times = []
        for number in range(count):
            began = time.perf_counter()
            server.publish(number)
            neighbour.receive()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    with server.client() as neighbour:
        neighbour.subscribe()
        before, memory = delivery(100), resident()
        sent = upgrade_request(server.port).hex(), first.hex(), frame.hex()
        command = [sys.executable, "-c", FLOODER, str(server.port), *sent]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as flooder:
            try:
                assert flooder.stdout is not None
                assert flooder.stdout.readline() == b"flooding\n"
                during = delivery(150)
                until(lambda: stat(server, "closed_4429") > 0, "4429", timeout=8)
                grown = resident() - memory
            finally:
                flooder.kill()
        assert during < 2 * before + 0.005, f"{before * 1000:.2f} ms before, {during * 1000:.2f} ms meanwhile"
        assert grown < 20_000_000
    until(lambda: stat(server, "connections") == 0)
