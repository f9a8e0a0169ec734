# /// script
# requires-python = ">=3.10"
# dependencies = ["flask>=3.0", "flask-sock>=0.7", "simple-websocket>=1.1", "pyjwt>=2.10"]
# ///
"""Real-time push for small Flask sites: one blueprint, one publish(), every subscribed browser.

    from flask import Flask
    from swiftcms_ws import blueprint, publish

    app = Flask(__name__)
    app.register_blueprint(blueprint)                       # ws://HOST/ws

    publish("content.created", "posts", {"id": 7})          # from any view or thread

Glossary
    event         something that happened: a type (content.created), a content type (posts), a payload
    pattern       which events: a type, a prefix (content.*) or *; and a content type or *
    subscription  one pattern that one connection has asked for
    connection    one client on one WebSocket
    frame         bytes as they go over the wire (RFC 6455 section 5): a message, a ping, a close
    broker        gives events their ids and their one order, and remembers the latest: the history
    job           what the dispatcher is to do between two events
    presence      who has which entry open for editing
    engine        registry, broker, presence and the threads that serve all connections of a process
    hub           an engine with its Flask blueprint: what a site talks to

An event's way
    Hub.publish()             checks it and turns its payload into JSON, in the caller's thread
    MemoryBroker.publish()    gives it an id and a place in the queue; the caller goes on
    Engine._deliver()         asks the registry who wants it, and hands all of them the same frame
    Connection.send()         writes what the kernel takes; the rest waits for the writer

Threads
    dispatcher    one per hub and process: delivers every event, and never waits for a client
    writer        one per hub and process: writes what kernels did not take, when they do
    heartbeat     one per hub and process: sends heartbeats, ends what is dead or out of time
    follower      one per hub and process, where there is Redis: reads what any process published
    reader        one per connection, the web server's own: carries out the client's messages

Locks (what each guards is said where it is made)
    Hub._starting       while an engine is made and started; the locks below may be taken under it
    MemoryBroker._lock  ids, and the queue        Connection._lock  one socket, and what waits for it
    Registry._lock      who subscribes to what    Presence._lock    who edits what
    Counters._lock      the numbers of stats()    Writer._round     the writer's bell, and its end
The last six are leaves: no lock is taken under them, no hook called, nothing logged, and nothing
waited for but their own condition. What one thread alone touches has no lock, and says so.

Sections 1 to 11 are the server, in the order in which data flows; who reads for that may stop there.
12, which 11 serves, is the client for browsers and the page of the inspector; 13 a demo and the command line.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import errno
import functools
import io
import itertools
import json
import logging
import os
import random
import re
import secrets
import selectors
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import traceback
import weakref
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError  # its own class before Python 3.11
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

try:
    import jwt
    import simple_websocket
    from blinker import NamedSignal, Namespace
    from flask import (
        Blueprint,
        Flask,
        Response,
        abort,
        current_app,
        make_response,
        render_template_string,
        request,
        url_for,
    )  # fmt: skip
    from flask.globals import app_ctx, request_ctx
    from flask.typing import ResponseReturnValue
    from flask_sock import Sock
    from jwt.algorithms import get_default_algorithms
    from werkzeug.debug import DebuggedApplication
    from werkzeug.exceptions import HTTPException
    from werkzeug.serving import make_server
    from wsproto.connection import Connection as FrameParser
    from wsproto.connection import ConnectionState, ConnectionType
    from wsproto.events import CloseConnection, Message, Ping, Pong
    from wsproto.frame_protocol import FrameProtocol
    from wsproto.utilities import ProtocolError
except ImportError as error:  # "No module named 'jwt'" has people install a package that is not the one
    packages = "python -m pip install flask flask-sock simple-websocket pyjwt"
    sentence = f"swiftcms_ws needs packages that are not all here: {packages} ({error})"
    if __name__ == "__main__":
        sys.exit(sentence)
    raise ImportError(sentence) from error

__version__ = "1.0.0"
__all__ = [
    "Hub", "PublishError", "User", "blueprint", "client_connected", "client_disconnected",
    "event_published", "hub", "publish", "publish_many",
]  # fmt: skip

logger = logging.getLogger("swiftcms_ws")


def log(level: int, text: str, *values: object, exc_info: Any = None, stack_info: bool = False) -> None:
    """Log. A handler or a filter of the site that fails must not end the thread, or nobody hears anything more."""
    try:
        logger.log(level, text, *values, exc_info=exc_info, stack_info=stack_info, stacklevel=2)
    except Exception:  # of any kind, and the log is no place to tell of it: standard error is what is left
        traceback.print_exc()


# == 1. Vocabulary: close codes, limits, settings, signals ===========================================


class CloseCode(IntEnum):
    """Why the server ends a connection (RFC 6455 section 7.4; PROTOCOL.md, close codes)."""

    GOING_AWAY = 1001
    MESSAGE_TOO_BIG = 1009
    SERVER_ERROR = 1011
    TOO_SLOW = 1013
    SIGN_IN_AGAIN = 4401
    NO_SIGN_OF_LIFE = 4408
    TOO_MANY_MESSAGES = 4429


SIGN_IN_SECONDS = 10.0  # to authenticate in, where AUTH is "required"
CLOSE_SECONDS = 2.0  # for a client to take our close frame and end; then the line is cut
LOOK_SECONDS = 0.5  # how late, at most, a token's end or a dead peer is noticed
MISSED_HEARTBEATS = 2  # without a sign of life, and a client counts as dead
SILENT_HEARTBEATS = 3  # without a word, and another process, with its editors, counts as gone
RATE_BURST = 2  # seconds' worth of messages that may come at once; as many too many end it
QUIET_SECONDS = 60.0  # between two log lines of one kind, where clients decide how many there are
BATCH_EVENTS = 64  # that go to a client in one system call, where so many are waiting,
BATCH_BYTES = 64 * 1024  # and how large that call may grow
ROUND_BYTES = 256 * 1024  # that one client gets while its lock is held, for which the dispatcher may be waiting
TLS_RECORD = 16 * 1024  # bytes that TLS sends whole: of a longer piece it does not tell how much is gone
BACKLOG_BYTES = 8 * 1024 * 1024  # published and not yet dispatched; beyond it publish() waits
EVENT_OVERHEAD = 1024  # bytes that an event weighs in the backlog beside its payload
PROCESS_LENGTH = 8  # characters that all client ids of one process begin with
MESSAGE_DEPTH = 100  # objects and arrays within each other in a client's message
RATE_BYTES = 8 * 1024  # of a message: each so many count as one more, or big ones would fill others' queues
REPLAY_COST = 20  # messages that a replay of the whole history counts as: it is the dispatcher's work
RECEIVE_BYTES = 16 * 1024  # that are taken from a socket at once
SMALL_FRAGMENT = 256  # bytes; a smaller one counts as a message, or one message could have 64 Ki of them
HEADERS_LENGTH = 32 * 1024  # characters in a handshake's headers: they are kept with the connection
SUGGESTED_FROM = 50  # names, at most, that a misspelt one is compared with
SIGN_OUTS_KEPT = 1000  # for handshakes that were under way meanwhile
ROUTES_KEPT = 64  # answers of the registry, each as long as there are subscribers
NAME_LENGTH = 128  # characters of a type, a content type or an entry's id: those are kept
REDIS_SECONDS = 1.0  # for a step of Redis, to connect or to answer; publish() takes two at most
REDIS_BLOCK = 500  # milliseconds that the follower waits for what is new before it asks again
REDIS_PAUSE = 0.05  # seconds; doubled before each time that the follower tries again, up to REDIS_SECONDS
FOLLOWER_BATCH = 256  # entries that the follower reads at once
FOLLOWER_ROOM = 10_000  # entries that it may lag behind, beyond the history

CONFIG_PREFIX = "SWIFTCMS_WS_"


def _setting(default: Any, wants: str, accepts: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"wants": wants, "accepts": accepts})


def _number(default: float, wants: str, least: float, kinds: Any = (int, float)) -> Any:
    def accepts(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and bool(least <= value < float("inf"))

    return _setting(default, wants, accepts)


def _text(default: str | None, wants: str = "a text", pattern: str = r".+") -> Any:
    return _setting(default, wants, lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)))


def _are_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_algorithms(value: Any) -> bool:
    # Of one family: a list that mixes HS256 with RS256 lets anyone sign with the public key.
    known = get_default_algorithms().keys() - {"none"}
    return _are_texts(value) and set(value) <= known and len({name[:2] for name in value}) == 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What app.config["SWIFTCMS_WS_…"] says: the field `heartbeat` is SWIFTCMS_WS_HEARTBEAT."""

    jwt_key: str | bytes | None = _setting(
        None, "a text or bytes, not empty", lambda value: isinstance(value, (str, bytes)) and value != type(value)()
    )
    jwt_algorithms: Sequence[str] = _setting(
        ("HS256",), 'algorithms of one family, such as ["HS256"]; RS256 needs the package cryptography', _are_algorithms
    )
    jwt_audience: str | None = _text(None)
    jwt_issuer: str | None = _text(None)
    auth: str = _text("optional", '"optional" or "required"', "optional|required")
    origins: Sequence[str] | str | None = _setting(
        None,
        'a list such as ["https://example.org"], or "*"',
        lambda value: value == "*" or (_are_texts(value) and all(map(re.compile(r"[^/]+://[^/]+/?").fullmatch, value))),
    )
    heartbeat: float = _number(25, "seconds, more than 0", 0.01)
    history: int = _number(1000, "a whole number of events, 0 or more", 0, int)
    max_connections: int = _number(1000, "a whole number, 1 or more", 1, int)
    max_subscriptions: int = _number(100, "a whole number, 1 or more", 1, int)
    max_message: int = _number(64 * 1024, "a whole number of bytes, 1 or more", 1, int)
    max_queue: int = _number(1024 * 1024, "a whole number of bytes, 1 or more", 1, int)
    rate: float = _number(50, "messages a second, 1 or more", 1)
    inspector: bool | None = _setting(None, "True or False", lambda value: isinstance(value, bool))
    redis_url: str | None = _text(None, "a URL such as redis://localhost:6379/0", r"(rediss?|unix)://.+")
    redis_prefix: str = _text("swiftcms_ws")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read and check the keys of a Flask configuration; None stands for the default.

        Raises ValueError, naming the key, for one that does not exist and a value that will not do.
        """
        fields = {CONFIG_PREFIX + field.name.upper(): field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in config.items():
            if not key.startswith(CONFIG_PREFIX) or (key in fields and value is None):
                continue
            if key not in fields:
                names = [name.removeprefix(CONFIG_PREFIX) for name in fields]
                hint = did_you_mean(key.removeprefix(CONFIG_PREFIX), names, CONFIG_PREFIX)
                raise ValueError(f"there is no config key {key}{hint}; there are {', '.join(fields)}")
            field = fields[key]
            if not field.metadata["accepts"](value):
                shown = "what it is" if field.name == "jwt_key" else repr(value)  # a key is not to be logged
                raise ValueError(f"config key {key} must be {field.metadata['wants']}, not {shown}")
            values[field.name] = value
        return cls(**values)


def did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return the end of a sentence that suggests the nearest of `choices`, or nothing."""
    # Either may be a client's, and a long word or thousands of fields would cost 100 ms and more.
    few = [choice for choice in itertools.islice(choices, SUGGESTED_FROM) if len(choice) <= NAME_LENGTH]
    near = difflib.get_close_matches(word[:NAME_LENGTH], few, 1)
    return f" (did you mean `{prefix}{near[0]}`?)" if near else ""


_signals = Namespace()
#: Sent by the app with `hub`, `client_id` and `user`, in the connection's own thread.
client_connected = _signals.signal("client-connected")
client_disconnected = _signals.signal("client-disconnected")
#: Sent by the app with `hub`, `id`, `type`, `content_type`, `payload` and `to`, in the thread that
#: published, once the broker has the event.
event_published = _signals.signal("event-published")

# == 2. Errors: a programmer's raise in the caller, a client's are answered ==========================


class PublishError(Exception):
    """The broker could not take the event: Redis is away, or refuses. Publish it again later.

    Where Redis hung just after it had read the event, the event may come all the same.
    """


class BrokerAway(Exception):
    """The broker cannot be asked for its history now."""


class ClientError(Exception):
    """A client's message, or its whole connection, that cannot go on.

    code:        one of PROTOCOL.md's table of errors
    message:     a sentence that says what was wrong and what would be right; the client reads it
    closes_with: the close code, where the connection ends with it
    """

    def __init__(self, code: str, message: str, closes_with: CloseCode | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.closes_with = closes_with


# == 3. Events and the wire: pure functions ==========================================================

EventId = tuple[int, int]  # milliseconds since 1970 and a counter, as in a Redis stream; they only grow
Pattern = tuple[str, str]  # of a type and of a content type

_WORDS = r"[\w-]+(?:\.[\w-]+)*"
_NAME = re.compile(_WORDS)
_TYPE_PATTERN = re.compile(rf"\*|{_WORDS}(?:\.\*)?")
_CONTENT_TYPE_PATTERN = re.compile(rf"\*|{_WORDS}")
_NAME_RULE = f"words of letters, digits, _ and - joined by dots, at most {NAME_LENGTH} characters"


@dataclasses.dataclass(slots=True)
class Event:
    """One published event, as the broker ordered it. Nothing of it changes, but that its frame is made."""

    id: EventId
    type: str
    content_type: str
    payload: str  # JSON
    to: frozenset[str] | None  # user ids; None: everyone who subscribes
    _frame: bytes = b""

    @property
    def frame(self) -> bytes:
        """The bytes that every client gets: made once, by the dispatcher, which alone asks for them."""
        if not self._frame:
            # The payload is JSON already, and the names need no escaping.
            text = (
                f'{{"type": "{self.type}", "contentType": "{self.content_type}", "payload": {self.payload}, '
                f'"id": "{format_event_id(self.id)}", "timestamp": "{timestamp(self.id[0])}"}}'
            )
            self._frame = bytes(_dispatchers.framer.send_data(text))
        return self._frame


def format_event_id(event_id: EventId) -> str:
    return f"{event_id[0]}-{event_id[1]}"


def parse_event_id(value: object) -> EventId:
    """Return the id that a client gave as `since`, or raise ClientError."""
    found = re.fullmatch(r"([0-9]{1,20})-([0-9]{1,20})", value) if isinstance(value, str) else None
    if not found:
        sentence = f"`since` must be the `id` of an event, such as 1763832000123-0, not {describe(value)}"
        raise ClientError("invalid_since", sentence)
    return int(found[1]), int(found[2])


def check_name(value: object, argument: str) -> None:
    """Raise, for the programmer to see, where a type or content type cannot be published."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a str, not {type(value).__name__}")
    if len(value) > NAME_LENGTH or not _is_name(value):
        raise ValueError(f"{argument} must be {_NAME_RULE}, not {value[:NAME_LENGTH]!r}")


@functools.lru_cache(maxsize=1024)
def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text))


def parse_pattern(message: Mapping[str, Any]) -> Pattern:
    """Return what a message's `type` and `contentType` ask for, or raise ClientError."""
    event_type, content_type = message.get("type", "*"), message.get("contentType", "*")
    if not _fits(event_type, _TYPE_PATTERN):
        right = "`type` must be an event type such as content.created, a prefix such as content.*, or *"
        raise ClientError("invalid_type", f"{right} ({_NAME_RULE}), not {describe(event_type)}")
    if not _fits(content_type, _CONTENT_TYPE_PATTERN):
        right = "`contentType` must be a content type such as posts, or *"
        raise ClientError("invalid_type", f"{right} ({_NAME_RULE}), not {describe(content_type)}")
    return event_type, content_type


def _fits(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and len(value) <= NAME_LENGTH and bool(pattern.fullmatch(value))


@functools.lru_cache(maxsize=1024)
def patterns_of(event_type: str, content_type: str) -> tuple[Pattern, ...]:
    """Return every pattern that matches an event, so that a match is a few look-ups in an index."""
    words = event_type.split(".")
    prefixes = [".".join(words[:count]) + ".*" for count in range(len(words) - 1, 0, -1)]
    return tuple((t, c) for t in (event_type, *prefixes, "*") for c in (content_type, "*"))


def describe(value: object) -> str:
    """Name a JSON value's kind, and show it where it is short: what the client sent, in its words."""
    kinds = {dict: "an object", list: "an array", str: "the string", bool: "the boolean", type(None): ""}
    kind = kinds.get(type(value), "the number")
    if isinstance(value, (dict, list)):
        return kind
    shown = json.dumps(value)
    return f"{kind} {shown[:60]}{'…' if len(shown) > 60 else ''}".lstrip()


def now_milliseconds() -> int:
    return time.time_ns() // 1_000_000


def timestamp(milliseconds: int) -> str:
    """Return a time as the protocol writes it: UTC, ISO 8601, milliseconds."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_to_the_second(seconds)}.{rest:03}Z"


@functools.lru_cache(maxsize=16)  # after a pause it takes 20 µs, and an event's way some 300
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def framer() -> FrameProtocol:
    """Return wsproto's maker of frames: one for each frame, for it is not made for several threads."""
    return FrameProtocol(client=False, extensions=[])


class _Dispatchers(threading.local):
    """What each dispatcher keeps for itself: a framer, for it makes the frames that all wait for."""

    def __init__(self) -> None:
        self.framer = framer()


_dispatchers = _Dispatchers()


def batches(frames: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """Part frames into lists of about BATCH_BYTES, for one system call each."""
    batch: list[bytes | memoryview] = []
    size = 0
    for frame in frames:
        if batch and size + len(frame) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(frame)
        size += len(frame)
    if batch:
        yield batch


def text_frame(text: str) -> bytes:
    return bytes(framer().send_data(text))


def close_frame(code: CloseCode, reason: str) -> bytes:
    """Return a close frame. wsproto cuts the reason at the 123 bytes of RFC 6455 section 5.5."""
    return bytes(framer().close(code, reason))


def parse_message(data: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a client sent, or raise ClientError."""
    if isinstance(data, bytes):
        raise ClientError("invalid_message", "a message must be a text message; this one was binary")
    try:
        message = json.loads(data, parse_constant=_refuse_constant, parse_float=_parse_float)
        _check_depth(message)
    except RecursionError:
        raise ClientError("invalid_json", "the message is nested too deep; a few levels do") from None
    except ValueError as error:
        raise ClientError("invalid_json", f"the message is not JSON: {error}") from None
    if not isinstance(message, dict):
        right = 'a message must be a JSON object such as {"action": "subscribe"}'
        raise ClientError("invalid_message", f"{right}, not {describe(message)}")
    return message


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is JavaScript, but not JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):  # would go out again as Infinity, which is not JSON
        raise ValueError(f"{text[:60]} is too large a number")
    return number


def _check_depth(message: object) -> None:
    """Raise RecursionError for what could just be parsed, but perhaps not be made into JSON again."""
    level, depth = [message], 0
    while level:
        if depth > MESSAGE_DEPTH:
            raise RecursionError
        containers = [each for each in level if isinstance(each, (dict, list))]
        level = [child for each in containers for child in (each.values() if isinstance(each, dict) else each)]
        depth += 1


# == 4. Tokens: JWTs, signed and checked by PyJWT ====================================================


@dataclasses.dataclass(frozen=True)
class User:
    """Who is signed in on a connection: an id, and the claims of the token if there was one."""

    id: str
    claims: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def expires_at(self) -> float | None:
        """When the token runs out, in seconds since 1970; None without a token."""
        return self.claims.get("exp")


def check_user_id(value: object, source: str) -> str:
    """Return a user id as text; sites that count their users may give the number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"{source} must be a user id, a str, not {type(value).__name__}")
    if value == "":
        raise ValueError(f"{source} must be a user id, not an empty str")
    return str(value)


def check_key(settings: Settings) -> None:
    """Raise ValueError where the key is none that the algorithms can use: every token would be a bad one."""
    for name in settings.jwt_algorithms if settings.jwt_key is not None else ():
        try:
            get_default_algorithms()[name].prepare_key(settings.jwt_key)
        except Exception as error:  # each algorithm has its own
            raise ValueError(f"config key {CONFIG_PREFIX}JWT_KEY must be a key for {name}: {error}") from error


def sign_token(
    settings: Settings, user_id: str, now: float, expires_in: float, claims: Mapping[str, Any]
) -> str:
    """Return a JWT that check_token() takes with the same settings, for `expires_in` seconds."""
    own = {"sub": user_id, "iat": int(now), "exp": int(now + expires_in)}
    own |= {"aud": settings.jwt_audience} if settings.jwt_audience else {}
    own |= {"iss": settings.jwt_issuer} if settings.jwt_issuer else {}
    return jwt.encode({**claims, **own}, settings.jwt_key or "", algorithm=settings.jwt_algorithms[0])


LAST_SECOND = 253_402_300_800  # of the year 9999: a token that ends later has milliseconds in its `exp`
_TOKEN_FAULTS: list[tuple[type[Exception], str, str]] = [  # the first that fits is told
    (jwt.ExpiredSignatureError, "token_expired", "the token has run out; get a fresh one"),
    (jwt.MissingRequiredClaimError, "invalid_token", "the token lacks a claim; it must have sub and exp"),
    (jwt.InvalidAlgorithmError, "invalid_token", "the token must be signed with {algorithms}"),
    (jwt.InvalidSignatureError, "invalid_token", "the token was not signed with this site's key"),
    (jwt.InvalidAudienceError, "invalid_token", "the token's aud must name this site"),
    (jwt.InvalidIssuerError, "invalid_token", "the token's iss must be the issuer that this site trusts"),
    (jwt.ImmatureSignatureError, "invalid_token", "the token is not valid yet; compare the clocks"),
    (OverflowError, "invalid_token", "the token's exp must be in seconds since 1970"),
    (Exception, "invalid_token", "the token is not a valid JWT; ask the site for one"),
]


def check_token(settings: Settings, token: str) -> User:
    """Return whose token this is (RFC 7519 section 7.2; `exp` and `sub` must be there).

    Raises ClientError, with a sentence that says what is wrong and never holds the token.
    """
    if settings.jwt_key is None:
        sentence = "this site has no key to check tokens with: it must set SWIFTCMS_WS_JWT_KEY or SECRET_KEY"
        raise ClientError("auth_not_configured", sentence)
    try:
        claims = jwt.decode(
            token, settings.jwt_key, algorithms=list(settings.jwt_algorithms),
            audience=settings.jwt_audience, issuer=settings.jwt_issuer,
            # PyJWT refuses an integer `sub`, which many sites have; it is checked below instead.
            options={"require": ["exp", "sub"], "verify_sub": False},
        )  # fmt: skip
        if not 0 < claims["exp"] < LAST_SECOND:  # TypeError for a text, which PyJWT takes for a number
            raise OverflowError
        return User(check_user_id(claims["sub"], "sub"), claims)
    except Warning:  # where warnings are errors: PyJWT's about a short key is for the site to see
        raise
    except Exception as error:  # whatever a stranger's token makes PyJWT raise is the token's fault
        code, sentence = next((code, text) for kind, code, text in _TOKEN_FAULTS if isinstance(error, kind))
    raise ClientError(code, sentence.format(algorithms=" or ".join(settings.jwt_algorithms)))


# == 5. Connection: one client's socket, and the only place that touches it ==========================

Received: TypeAlias = "Message[Any] | Ping | Pong"  # a frame as wsproto parses it; a long one comes in parts
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
# Needs no descriptor of its own, and goes past the 1024th; Windows has no poll().
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Connection:
    """One client.

    Several threads write to a client: the dispatcher (events), the heartbeat, and its own reader
    (answers and pongs). All of them call send(), which keeps frames whole and in order, and never
    blocks: the dispatcher has a thousand other clients to serve. So the socket is non-blocking.
    What the kernel does not take, because its buffer for a client that reads slowly or not at all
    is full, waits here; from then on all that is sent to this client waits behind it, and the
    writer, which has nothing else to do, passes it on as the socket gets room. More than
    `max_queue` bytes waiting end this client. Nobody else notices.
    """

    # A thousand of them are gone through for every event: slots keep each small and near.
    __slots__ = (
        "_attend", "_is_direct", "_is_lost", "_lock", "_max_queue", "_most", "_replay_room", "_sock", "_waiting",
        "close_code", "give_up_at", "id", "is_ending", "last_heard", "opened_at", "queued", "subscriptions", "user",
        "user_from", "written",
    )  # fmt: skip

    def __init__(
        self, client_id: str, sock: socket.socket, max_queue: int, attend: Callable[[Connection], None],
        user: User | None = None,
    ) -> None:  # fmt: skip
        """Take over a socket whose handshake is done; `attend` is the writer's."""
        self.id = client_id
        self.opened_at = time.monotonic()
        # Since when the reader waits for the client; while it is busy with it, never. Set by it alone, and read whole.
        self.last_heard = float("inf")
        # Changed under the registry's lock; read without it, each for itself, they are whole.
        self.user = user
        self.user_from: EventId = (0, 0)  # signed in as it since the event after this one
        self.subscriptions: dict[Pattern, EventId] = {}  # each with all that matched after this event

        self._sock = sock
        self._most = TLS_RECORD if isinstance(sock, ssl.SSLSocket) else None  # bytes in a call
        self._max_queue = max_queue
        self._attend = attend
        sock.setblocking(False)
        with suppress(OSError):  # a Unix socket, behind a proxy, has no Nagle to switch off
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        # Guards all below, and the order of bytes on the socket; only non-blocking calls are made
        # under it. Numbers and flags are read without it, each for itself, and are whole.
        self._lock = threading.Lock()
        self._waiting: list[bytes | memoryview] = []  # the first may be half sent; small while empty
        self.queued = self.written = 0  # bytes that ever had to wait, and those of them gone since
        self._replay_room = 0  # bytes that may wait beyond max_queue: see send()
        self.is_ending = False  # a close frame is sent or waiting: nothing may follow it
        self._is_lost = False  # there is no line any more
        # None of that, nor TLS: what is sent goes straight to the kernel. One look, for it is asked of each
        # client for each event.
        self._is_direct = self._most is None
        self.give_up_at = float("inf")  # when a connection that is ending is cut
        self.close_code: CloseCode | None = None  # where it was we who ended it

    # -- writing: the dispatcher, the heartbeat, the reader --------------------------------------------

    def send(self, data: bytes, is_replay: bool = False) -> None:
        """Send whole frames, now or as soon as the client takes them. Never blocks, never raises.

        A replay may be larger than the queue: it is let in, and does not count until the queue
        has been empty again, or a client could never come back to a long history.
        """
        with self._lock:
            if self._is_direct:
                try:
                    sent = self._sock.send(data)
                except OSError as error:
                    sent = self._cannot_write(error, len(data))
                if sent == len(data):
                    return
                data = data[sent:]
            elif self.is_ending:
                return
            is_attended = bool(self._waiting)
            self._enqueue(data)
            if is_replay:
                self._replay_room += len(data)
            if self._most is not None and not is_attended:
                self._write_waiting()  # TLS, which goes piece by piece
            is_too_slow = self.waiting_bytes > self._max_queue + self._replay_room
            is_new = bool(self._waiting) and not is_attended
        if is_new:
            self._attend(self)
        if is_too_slow:
            self.close(CloseCode.TOO_SLOW, "read too slowly; come back with since")

    def close(self, code: CloseCode, reason: str) -> bool:
        """Send a close frame and end, from any thread; return False where that was done before."""
        with self._lock:
            if self.is_ending:
                return False
            if code is CloseCode.TOO_SLOW:
                # The first chunk may be half sent, and a close frame inside a frame is garbage. The
                # rest is let go: it would hold this client's thread for nothing.
                while len(self._waiting) > 1:
                    self.written += len(self._waiting.pop())
            self.close_code = code
            self._finish(close_frame(code, reason))
        self._attend(self)
        return True

    @property
    def waiting_bytes(self) -> int:
        """How much the kernel has not taken yet."""
        return self.queued - self.written

    # The next six are called with the lock held.

    def _cannot_write(self, error: OSError, size: int) -> int:
        """Return how many of `size` bytes need not be kept: none, where the kernel has no room for them now."""
        if isinstance(error, _WOULD_BLOCK):
            return 0
        self._lose()  # the client is gone
        return size

    def _enqueue(self, data: bytes) -> None:
        self._is_direct = False
        self._waiting.append(data)
        self.queued += len(data)

    def _finish(self, frame: bytes) -> None:
        """Send or queue the last frame there will be."""
        self.is_ending = True
        self.give_up_at = time.monotonic() + CLOSE_SECONDS
        self._enqueue(frame)
        self._write_waiting()

    def _lose(self) -> None:
        """End the line, which wakes the reader, and let go of everything that waits.

        From here on nobody touches the socket: the web server closes it, and its number is soon another's.
        """
        if not self._is_lost:
            self._shut(socket.SHUT_RDWR)
        self._is_lost = self.is_ending = True
        self._is_direct = False
        self._waiting.clear()
        self.written = self.queued

    def _write_waiting(self) -> None:
        """Write what waits, as far as the kernel takes it, but not for long; after a close frame, shut our side.

        That keeps the response which the web server takes to be due, when its view returns, from
        reaching a browser as garbage.
        """
        until = self.written + ROUND_BYTES
        while self._waiting:
            if self.written >= until:
                return  # the writer comes back
            batch = next(batches(self._waiting))
            data = b"".join(batch) if len(batch) > 1 else batch[0]
            try:
                sent = self._sock.send(data[: self._most])
            except OSError as error:
                sent = self._cannot_write(error, len(data))
            if self._is_lost:
                return
            self.written += sent
            # What TLS could not send must come first again, and no shorter.
            self._waiting[: len(batch)] = [memoryview(data)[sent:]] if sent < len(data) else []
            if not sent:
                return
        self._replay_room = 0
        if self.is_ending:
            self._shut(socket.SHUT_WR)
        else:
            self._is_direct = self._most is None

    def _shut(self, how: int) -> None:
        with suppress(OSError):  # the other side was faster
            # Not sock.shutdown(): a TLS socket's own forgets its keys, and would read ciphertext.
            socket.socket.shutdown(self._sock, how)

    # -- writing: the writer ---------------------------------------------------------------------------

    def go_on(self, now: float) -> bool:
        """Write what the kernel takes; cut what should have ended by now. Return whether there is more to do."""
        with self._lock:
            if not self._is_lost:
                self._write_waiting()
            if now >= self.give_up_at:
                self._lose()
            return not self._is_lost and (bool(self._waiting) or self.is_ending)

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- reading: the web server's thread --------------------------------------------------------------

    def frames(self) -> Iterator[Received]:
        """Be the connection's reader, until it has ended: yield each frame, or part of one, that comes.

        Pings are answered here, and so are a close frame and bytes that are no frame: those end it.
        After a close frame of ours the client has a moment to end the line. Closing at once would
        reset it, and the close frame could be lost.
        """
        library = FrameParser(ConnectionType.SERVER)
        try:
            while data := self._receive():
                library.receive_data(data)
                for frame in library.events():
                    if isinstance(frame, CloseConnection):
                        self._answer_close(bytes(library.send(frame.response())))
                    elif isinstance(frame, Ping):
                        self.send(bytes(library.send(frame.response())))
                    if not self.is_ending:
                        yield cast("Received", frame)
                if library.state is ConnectionState.CLOSED and not self._waiting:
                    return  # both sides have said so
        finally:
            with self._lock:
                self._lose()
            self._attend(self)  # for who waits until all is written

    def _receive(self) -> bytes:
        """Wait for bytes from the client; return none at the end. What comes after the end is dropped."""
        self.last_heard = time.monotonic()
        while True:
            with self._lock:  # for TLS, where two threads may not be in one socket
                try:
                    data = self._sock.recv(RECEIVE_BYTES)
                except _WOULD_BLOCK:
                    data = None
                except OSError:
                    return b""
            if data is None:
                with suppress(ValueError, OSError), Selector() as selector:  # closed: recv() will say so
                    selector.register(self._sock, selectors.EVENT_READ)
                    selector.select()
            elif not data or not self.is_ending:
                self.last_heard = float("inf")  # until that is carried out: whom we keep waiting is not dead
                return data

    def _answer_close(self, frame: bytes) -> None:
        with self._lock:
            if self.is_ending:
                return
            self._finish(frame)
        self._attend(self)


class Writer:
    """Writes what kernels did not take, and cuts the lines of clients that do not end.

    It waits for all these sockets at once, and so for none of them.
    """

    def __init__(self, is_needed: Callable[[], bool]) -> None:
        """Make a writer that works until it is closed and `is_needed()` by no connection any more."""
        self._is_needed = is_needed
        self._bell, self._rope = socket.socketpair()  # to be woken by
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._new: deque[Connection] = deque()  # needs no lock: append() and popleft() are whole
        self._attended: set[Connection] = set()  # the writer's alone
        self._is_closed = False  # set once
        self._round = threading.Condition()  # guards the bell's end; notified after each round

    def attend(self, connection: Connection) -> None:
        """See to it that all is written, and that an ending ends. From any thread; never blocks."""
        self._new.append(connection)
        self._ring()

    def _ring(self) -> None:
        with self._round, suppress(OSError):  # rung so often that it is heard anyway, or the writer has ended
            self._rope.send(b"!")

    def run(self) -> None:
        """Be the writer, until closed and nothing is left to do."""
        while self._attended or self._new or not self._is_closed or self._is_needed():
            try:
                ready = self._wait()
                while self._new:
                    connection = self._new.popleft()
                    self._attended.add(connection)
                    ready.add(connection)
                now = time.monotonic()
                for connection in list(self._attended):
                    is_due = connection in ready or now >= connection.give_up_at
                    if is_due and not connection.go_on(now):
                        self._attended.remove(connection)
            except Exception:  # without a writer slow clients would hear nothing more
                log(logging.ERROR, "the writer failed, and goes on", exc_info=True)
                time.sleep(LOOK_SECONDS)  # what made it fail may last
            with self._round:
                self._round.notify_all()
        with self._round:
            self._bell.close()
            self._rope.close()

    def _wait(self) -> set[Any]:
        """Wait until a socket has room, the bell rings, or time is up for one; return who has room."""
        with Selector() as selector:  # a new one each time, for a closed socket's number is soon another's
            selector.register(self._bell, selectors.EVENT_READ)
            for connection in self._attended:
                if connection.waiting_bytes:
                    with suppress(ValueError, OSError):  # closed meanwhile
                        selector.register(connection, selectors.EVENT_WRITE)
            soon = [time.monotonic() + LOOK_SECONDS] if self._is_closed else []
            until = min([*soon, *(connection.give_up_at for connection in self._attended)], default=float("inf"))
            timeout = None if until == float("inf") else until - time.monotonic()
            ready = {key.fileobj for key, _ in selector.select(timeout)}
        if self._bell in ready:
            self._bell.recv(4096)
        return ready

    def wait_until_written(self, connections: Collection[Connection], deadline: float) -> bool:
        """Wait until what waits now is with the kernel, or with nobody; False where it is not by `deadline`."""
        due = [(connection, connection.queued) for connection in connections]
        with self._round:
            return self._round.wait_for(
                lambda: all(connection.written >= queued for connection, queued in due),
                deadline - time.monotonic(),
            )

    def close(self) -> None:
        """Let the writer end once it has nothing to do."""
        self._is_closed = True
        self._ring()


# == 6. Registry: who is connected, and who subscribes to what =======================================


class Registry:
    """Connections and their subscriptions, indexed by pattern and by user.

    Finding who wants an event takes a few look-ups, whatever else is subscribed to.
    """

    def __init__(self) -> None:
        # Guards all below, and each connection's `user`, `user_from` and `subscriptions`: they
        # change together. Only dictionaries are worked on under it. `_released` is notified when
        # a place is given back.
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self.places = 0  # taken by connections, and by handshakes under way; an int is read whole
        # Dicts with no values are sets that keep their order.
        self._connections: dict[Connection, None] = {}
        self._subscribers: dict[Pattern, dict[Connection, None]] = {}
        self._by_user: dict[str, dict[Connection, None]] = {}
        self._found: dict[tuple[str, str], tuple[Connection, ...]] = {}  # answers of matching(), while they hold

    def reserve(self, limit: int) -> bool:
        """Take one of `limit` places, until release(); return False where all are taken."""
        with self._lock:
            if self.places >= limit:
                return False
            self.places += 1
            return True

    def release(self) -> None:
        with self._released:
            self.places -= 1
            self._released.notify_all()

    def wait_until_empty(self, deadline: float) -> bool:
        with self._released:
            return self._released.wait_for(lambda: not self.places, deadline - time.monotonic())

    def add(self, connection: Connection) -> None:
        with self._lock:
            self._connections[connection] = None
            if connection.user:
                self._by_user.setdefault(connection.user.id, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        with self._lock:
            self._connections.pop(connection, None)
            for pattern in list(connection.subscriptions):
                self._drop(connection, pattern)
            if connection.user:
                self._take_out(self._by_user, connection.user.id, connection)

    def sign_in(self, connection: Connection, user: User, after: EventId) -> None:
        """Let events `to=` this user reach the connection: those after `after`."""
        with self._lock:
            connection.user_from = connection.user_from if connection.user else after
            connection.user = user
            self._by_user.setdefault(user.id, {})[connection] = None

    def subscribe(self, connection: Connection, pattern: Pattern, after: EventId, limit: int) -> None:
        """Add a subscription to what comes after `after`. Twice the same is one, from the earlier.

        Raises ClientError where the connection has `limit` others.
        """
        with self._lock:
            already = connection.subscriptions.get(pattern)
            if already is None and len(connection.subscriptions) >= limit:
                sentence = f"{limit} subscriptions are the most; use a prefix such as content.*, or unsubscribe"
                raise ClientError("too_many_subscriptions", sentence)
            connection.subscriptions[pattern] = after if already is None else min(after, already)
            self._subscribers.setdefault(pattern, {})[connection] = None
            self._found.clear()

    def unsubscribe(self, connection: Connection, pattern: Pattern | None) -> int:
        """Take away one subscription, or all; return how many there were."""
        with self._lock:
            patterns = list(connection.subscriptions) if pattern is None else [pattern]
            return sum(self._drop(connection, each) for each in patterns)

    def _drop(self, connection: Connection, pattern: Pattern) -> bool:
        if connection.subscriptions.pop(pattern, None) is None:
            return False
        self._take_out(self._subscribers, pattern, connection)
        self._found.clear()
        return True

    @staticmethod
    def _take_out(index: dict[Any, dict[Connection, None]], key: object, connection: Connection) -> None:
        """Take a connection out of an index, and the key with its last one: an index must not grow."""
        connections = index.get(key, {})
        connections.pop(connection, None)
        if not connections:
            index.pop(key, None)

    def matching(self, event_type: str, content_type: str, to: frozenset[str] | None) -> Collection[Connection]:
        """Return the connections, each once, that want such an event."""
        with self._lock:
            if to is None:
                return self._found.get((event_type, content_type)) or self._find(event_type, content_type)
            patterns = patterns_of(event_type, content_type)
            found: dict[Connection, None] = {}
            for user_id in to:
                for connection in self._by_user.get(user_id, ()):
                    if not connection.subscriptions.keys().isdisjoint(patterns):
                        found[connection] = None
        return found

    def _find(self, event_type: str, content_type: str) -> tuple[Connection, ...]:
        """Look up who subscribes to this, and note it: a burst asks again and again. The lock is held."""
        found: dict[Connection, None] = {}
        for pattern in patterns_of(event_type, content_type):
            found |= self._subscribers.get(pattern, {})
        if len(self._found) >= ROUTES_KEPT:
            self._found.clear()
        self._found[event_type, content_type] = tuple(found)
        return tuple(found)

    def missed(self, connection: Connection, pattern: Pattern, events: Iterable[Event]) -> list[Event]:
        """Return those of `events` that `pattern` matches and that have not reached the connection."""
        with self._lock:
            user, user_from = connection.user, connection.user_from
            subscriptions = dict(connection.subscriptions)

        def is_missed(event: Event) -> bool:
            patterns = patterns_of(event.type, event.content_type)
            if pattern not in patterns:
                return False
            if event.to is not None and (user is None or user.id not in event.to):
                return False
            if event.to is not None and event.id <= user_from:
                return True
            return not any(event.id > subscriptions.get(each, event.id) for each in patterns)

        return [event for event in events if is_missed(event)]

    def connections(self, user_id: str | None = None) -> list[Connection]:
        """Return all connections, or those of one user."""
        with self._lock:
            return list(self._connections if user_id is None else self._by_user.get(user_id, ()))

    def count_subscriptions(self) -> int:
        with self._lock:
            return sum(len(connections) for connections in self._subscribers.values())


# == 7. Broker: one order for all events, and the history ============================================

Result = TypeVar("Result")
Job = Callable[[], None]
Draft = tuple[str, str, str, "frozenset[str] | None"]  # an Event without its id


class MemoryBroker:
    """Gives events their ids in one order, queues them for the dispatcher and keeps the latest.

    Jobs queue with the events: a job finds exactly the events delivered that were published before
    it. Subscribing with `since` is a job, and so leaves no gap and no overlap.
    """

    def __init__(self, history_size: int) -> None:
        # Guards what follows, and that events are queued in the order of their ids; nothing under it
        # takes longer than that. `_changed` is notified where anyone may wait: for room in the
        # queue, and for its end.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.last_id: EventId = (now_milliseconds(), 0)  # the newest in the queue, or ever in it
        self.published = 0  # events, by this process
        self._queued_bytes = 0
        self._is_closed = False
        self._queue: SimpleQueue[Event | Job | None] = SimpleQueue()  # None: nothing comes any more
        # The dispatcher's alone:
        self._held: list[Job | None] = []  # taken from the queue, and next
        self._history: deque[Event] = deque()  # of what is delivered
        self._history_size = history_size
        self.delivered = self._forgotten = self.last_id  # the newest delivered; the newest not in the history

    def start(self) -> None:
        """There is nothing to connect to."""

    def publish(self, drafts: list[Draft]) -> list[EventId]:
        """Take events for delivery and return their ids. Waits while the dispatcher is far behind."""
        return [self._publish(draft) for draft in drafts]

    def _publish(self, draft: Draft) -> EventId:
        with self._lock:
            self._wait_for_room()
            milliseconds = now_milliseconds()
            last, counter = self.last_id
            # A clock that is set back must not take the ids with it.
            event_id = (milliseconds, 0) if milliseconds > last else (last, counter + 1)
            self._enqueue(Event(event_id, *draft))
            self.published += 1
            return event_id

    # The next two are called with the lock held.

    def _wait_for_room(self) -> None:
        while self._queued_bytes >= BACKLOG_BYTES and not self._is_closed:
            self._changed.wait()

    def _enqueue(self, event: Event) -> None:
        self.last_id = event.id
        if not self._is_closed:
            self._queue.put(event)
            self._queued_bytes += len(event.payload) + EVENT_OVERHEAD

    def run_in_order(self, job: Job) -> bool:
        """Have the dispatcher run `job` between the events queued before this call and those after.

        A job may not block. What it raises is logged. Returns False where the broker is closed.
        """
        with self._lock:
            if not self._is_closed:
                self._queue.put(job)
            return not self._is_closed

    def in_order(self, job: Callable[[], Result]) -> Future[Result]:
        """Do so for someone who waits: what `job` returns or raises is in the Future.

        It is cancelled where the broker is closed.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except Exception as error:  # whatever it is, who waits gets it
                future.set_exception(error)

        if not self.run_in_order(run):
            future.cancel()
        return future

    def take(self) -> list[Event] | Job | None:
        """Wait for what is next: a job, or as many events as make one batch; None once closed."""
        following = self._held.pop() if self._held else self._queue.get()
        if not isinstance(following, Event):
            return following
        batch, size = [following], len(following.payload)
        while len(batch) < BATCH_EVENTS and size < BATCH_BYTES and not self._queue.empty():
            following = self._queue.get()
            if not isinstance(following, Event):
                self._held.append(following)
                break
            batch.append(following)
            size += len(following.payload)
        return batch

    def remember(self, events: list[Event]) -> None:
        """Take note that `events` are delivered. For the dispatcher."""
        self._history.extend(events)
        self.delivered = events[-1].id
        while len(self._history) > self._history_size:
            self._forgotten = self._history.popleft().id
        with self._changed:
            was_full = self._queued_bytes >= BACKLOG_BYTES
            self._queued_bytes -= sum(len(event.payload) + EVENT_OVERHEAD for event in events)
            if was_full:
                self._changed.notify_all()

    def fetch_after(self, since: EventId) -> list[Event] | None:
        """Return events after `since` from where they are kept beside the history here. Not for jobs.

        None where there are none, or where the history reaches back to it. May raise BrokerAway.
        """
        return None

    def events_after(self, since: EventId, fetched: list[Event] | None) -> list[Event] | None:
        """Return all events delivered after `since`, or None where that cannot be known. For jobs.

        `fetched` is what fetch_after() gave. Only an id that this broker gave is answered: between
        two of its ids there may have been others, of a process before this one.
        """
        if fetched and fetched[-1].id >= self._forgotten:  # the history goes on where that ends
            older = [event for event in fetched if event.id <= self.delivered]
            return older + [event for event in self._history if event.id > fetched[-1].id]
        found: list[Event] = []
        for event in reversed(self._history):
            if event.id <= since:
                return found[::-1] if event.id == since else None
            found.append(event)
        return found[::-1] if since == self._forgotten else None

    def newest_id(self) -> EventId:
        """Return the id of the newest event that a client can resume from here."""
        return self.last_id

    def is_caught_up(self, timeout: float) -> bool:
        """Wait until the queue has had all that this process published; False after `timeout` seconds."""
        return True

    def tell_others(self, message: dict[str, Any]) -> None:
        """Tell the engines of other processes, soon or never: there are none."""

    def queue_length(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Let the dispatcher end once the queue is empty, and nobody wait for it any more."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._queue.put(None)
                self._changed.notify_all()


_MARKER: Draft = ("system.marker", "system", "{}", frozenset())  # an event to nobody


def import_redis() -> Any:
    """Return the package, or raise ImportError that says how to get it."""
    try:
        import redis  # noqa: PLC0415 - the optional extra; nobody else needs it
    except ImportError as error:
        raise ImportError("SWIFTCMS_WS_REDIS_URL needs the package redis: pip install redis") from error
    return redis


class RedisBroker(MemoryBroker):
    """The same for several processes and machines: a Redis stream gives the ids and the one order.

    publish() adds to the stream. In every process a follower thread reads it and queues what any
    process published; from there on all is as with one process. A second stream carries what the
    engines tell each other and nobody keeps.

    While Redis is away publish() raises, and the follower tries again, and goes on where it was.
    Only where that place is gone from the stream may something be lost: then `on_gap` is called.
    """

    def __init__(
        self, settings: Settings, on_told: Callable[[dict[str, Any]], None],
        on_gap: Callable[[], None], on_round: Callable[[], None],
    ) -> None:  # fmt: skip
        redis = import_redis()
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        super().__init__(settings.history)
        self._redis: Any = redis.Redis.from_url(
            cast(str, settings.redis_url),
            decode_responses=True,
            encoding_errors="replace",  # of others who write there: one entry must not stop us for ever
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            retry=Retry(NoBackoff(), 0),  # a page waits for publish(): let it fail, but soon
        )
        self._faults = (redis.RedisError, OSError)
        self._events, self._told = f"{settings.redis_prefix}:events", f"{settings.redis_prefix}:told"
        self._on_told, self._on_gap, self._on_round = on_told, on_gap, on_round
        self._follower = threading.Thread(target=self._follow, name="swiftcms-ws follower", daemon=True)
        self._told_id = ""  # the follower's alone
        # Written by the follower alone, but for the last; who waits for them does so under `_changed`.
        self._has_begun = False  # the follower knows where it is
        self.last_id, self._forgotten = (0, 0), (-1, 0)  # until it does
        self._last_published: EventId = (0, 0)

    def start(self) -> None:
        self._follower.start()

    def publish(self, drafts: list[Draft]) -> list[EventId]:
        """Add events to the stream, in one round trip. Raises PublishError within two seconds."""
        if not drafts:
            return []
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for event_type, content_type, payload, to in drafts:
                    fields = {"type": event_type, "contentType": content_type, "payload": payload}
                    if to is not None:
                        fields["to"] = json.dumps(sorted(to))
                    pipe.xadd(self._events, fields, maxlen=self._history_size + FOLLOWER_ROOM)
                ids = [parse_event_id(event_id) for event_id in pipe.execute()]
        except self._faults as error:
            raise PublishError(f"Redis did not take the event; publish it again later: {error}") from error
        with self._changed:
            self._last_published = max(self._last_published, ids[-1])
            self.published += len(ids)
        return ids

    def tell_others(self, message: dict[str, Any]) -> None:
        with suppress(*self._faults):  # the follower logs that Redis is away; presence repairs itself
            self._redis.xadd(self._told, {"message": json.dumps(message)}, maxlen=FOLLOWER_ROOM)

    def newest_id(self) -> EventId:
        with self._changed:
            self._changed.wait_for(lambda: self._has_begun, REDIS_SECONDS)
            return self.last_id

    def is_caught_up(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.last_id >= self._last_published, timeout)

    def fetch_after(self, since: EventId) -> list[Event] | None:
        try:
            newest = self._newest()
            is_known = newest is not None and since <= newest  # maybe not here yet, but elsewhere
            with self._changed:
                if not self._changed.wait_for(
                    lambda: self._has_begun and (not is_known or self.last_id >= since), REDIS_SECONDS
                ):
                    raise BrokerAway("the follower is behind")
            if since >= self._forgotten:  # the dispatcher's, but a tuple is read whole, and it only grows
                return None
            entries = self._redis.xrange(self._events, format_event_id(since), count=self._history_size + 2)
        except self._faults as error:
            raise BrokerAway(f"Redis cannot be asked for the history: {error}") from error
        events = [self._event(*entry) for entry in entries]
        if not events or events[0].id != since or len(events) > self._history_size + 1:
            return None
        return events[1:]

    def _newest(self) -> EventId | None:
        newest = self._redis.xrevrange(self._events, count=1)
        return parse_event_id(newest[0][0]) if newest else None

    @staticmethod
    def _event(event_id: str, fields: dict[str, str]) -> Event:
        try:
            to = frozenset(json.loads(fields["to"])) if "to" in fields else None
            return Event(parse_event_id(event_id), fields["type"], fields["contentType"], fields["payload"], to)
        except (KeyError, ValueError, TypeError):
            what = "ignored entry %s of the stream, which no swiftcms_ws wrote; SWIFTCMS_WS_REDIS_PREFIX changes it"
            log(logging.ERROR, what, event_id)
            return Event(parse_event_id(event_id), *_MARKER)

    def _follow(self) -> None:
        """Be the follower: read on from where we are, until the end."""
        pause = REDIS_PAUSE
        while not self._is_closed:
            try:
                if not self._has_begun:
                    self._begin()
                self._read_on()
                self._on_round()
                if pause != REDIS_PAUSE:
                    log(logging.WARNING, "Redis is back")
                    pause = REDIS_PAUSE
                continue
            except (*self._faults, PublishError) as error:
                if pause == REDIS_PAUSE:
                    log(
                        logging.WARNING,
                        "Redis is away: until it is back publish() raises, and clients of this process hear nothing"
                        " new. Does it run, and is SWIFTCMS_WS_REDIS_URL right? It is tried again and again: %s",
                        error,
                    )
            except Exception:  # a follower that ended would leave this process deaf, and nobody told
                log(logging.ERROR, "following Redis failed, and is tried again", exc_info=True)
            pause = min(pause * 2, REDIS_SECONDS)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, pause * random.uniform(0.5, 1))

    def _begin(self) -> None:
        """Find the ends of both streams. An empty one gets a marker: a place to come back to."""
        here = self._newest() or self.publish([_MARKER])[0]
        self._on_gap()  # for who came before: what it has missed is not known
        told = self._redis.xrevrange(self._told, count=1)
        self._told_id = told[0][0] if told else "0-0"

        def begin_history() -> None:
            self._history.clear()
            self._forgotten = self.delivered = here

        self.run_in_order(begin_history)
        with self._changed:
            self.last_id, self._has_begun = here, True
            self._last_published = min(self._last_published, here)  # what came after it is gone
            self._changed.notify_all()
        self.tell_others({"do": "hello", "process": ""})

    def _read_on(self) -> None:
        """Wait for what is new and queue it: events, and what other engines tell."""
        here = format_event_id(self.last_id)
        with self._redis.pipeline(transaction=False) as pipe:
            streams = {self._events: here, self._told: self._told_id}
            pipe.xread(streams, count=FOLLOWER_BATCH, block=REDIS_BLOCK)
            pipe.xrange(self._events, here, here)
            answer, still_here = pipe.execute()
        if not still_here:  # trimmed away under us, or an empty Redis in its place
            self._has_begun = False
            return
        found = dict(answer or [])
        for event in [self._event(*entry) for entry in found.get(self._events, [])]:
            with self._changed:
                self._wait_for_room()
                self._enqueue(event)
                self._changed.notify_all()
        for told_id, fields in found.get(self._told, []):
            self._told_id = told_id
            self.run_in_order(functools.partial(self._on_told, json.loads(fields["message"])))


# == 8. Presence: who edits what =====================================================================

Entry = tuple[str, str]  # a content type, and the id of one of its entries


@dataclasses.dataclass(frozen=True)
class Editor:
    """One connection that has an entry open for editing; one person in two tabs is two."""

    since: str
    client_id: str
    user_id: str | None
    process: str  # that the connection is in

    def as_json(self) -> dict[str, Any]:
        return {"clientId": self.client_id, "userId": self.user_id, "since": self.since}


class Presence:
    """Who edits what, here and in other processes.

    Changed by the dispatcher alone, in the order of events, so that what is told about a change is
    true when it is told. An entry that nobody edits takes no memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both indexes against readers in other threads
        self.changes = 0  # so far; set by the dispatcher, an int is read whole
        self._editors: dict[Entry, dict[str, Editor]] = {}  # by client id
        self._entries: dict[str, dict[Entry, None]] = {}  # of each client

    def start(self, entry: Entry, editor: Editor) -> bool:
        """Add an editor; return False where it was one."""
        with self._lock:
            editors = self._editors.setdefault(entry, {})
            is_new = editor.client_id not in editors
            if is_new:
                editors[editor.client_id] = editor
                self._entries.setdefault(editor.client_id, {})[entry] = None
                self.changes += 1
            return is_new

    def stop(self, entry: Entry, client_id: str) -> Editor | None:
        """Take an editor away and return it, or None where it was none."""
        with self._lock:
            editor = self._editors.get(entry, {}).pop(client_id, None)
            self._entries.get(client_id, {}).pop(entry, None)
            if not self._editors.get(entry):
                self._editors.pop(entry, None)
            if not self._entries.get(client_id):
                self._entries.pop(client_id, None)
            if editor is not None:
                self.changes += 1
            return editor

    def entries_of(self, client_id: str) -> list[Entry]:
        """Return what a client edits."""
        with self._lock:
            return list(self._entries.get(client_id, ()))

    def editors(self, entry: Entry) -> list[Editor]:
        """Return an entry's editors, who began first first."""
        with self._lock:
            return sorted(self._editors.get(entry, {}).values(), key=lambda editor: editor.since)

    def everything(self, process: str | None = None) -> list[tuple[Entry, Editor]]:
        """Return who edits what, everywhere or in one process."""
        with self._lock:
            return [
                (entry, editor)
                for entry, editors in self._editors.items()
                for editor in editors.values()
                if process in (None, editor.process)
            ]


# == 9. Engine: publish, the dispatcher, the heartbeat ===============================================


class Counters:
    """The numbers of stats() that no other part keeps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the numbers, which every thread adds to
        self._numbers = Counter({"delivered": 0, "replayed": 0, "errors": 0, "slow_clients": 0})

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._numbers[name] += number

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)


Route = tuple[int, Collection[Connection]]  # bits for events, and who is to get all of these


def _by_what_they_want(routes: Iterable[Route]) -> Iterable[Route]:
    """Put those together that want the same events of several routes, so that each is in one."""
    wanted: dict[Connection, int] = defaultdict(int)
    for bits, connections in routes:
        for connection in connections:
            wanted[connection] |= bits
    together: dict[int, list[Connection]] = defaultdict(list)
    for connection, bits in wanted.items():
        together[bits].append(connection)
    return together.items()


class Engine:
    """Everything that runs, for one hub in one process; a fork or another app gets a new one."""

    def __init__(self, settings: Settings, to_json: Callable[[Any], str]) -> None:
        self.settings = settings
        self.to_json = to_json
        self.counters = Counters()
        self.registry = Registry()
        self.presence = Presence()
        self.broker: MemoryBroker = MemoryBroker(settings.history)
        if settings.redis_url is not None:
            self.broker = RedisBroker(settings, self._on_told, self._on_gap, self._tell_presence)
        self.writer = Writer(lambda: self.registry.places > 0)
        self.closing = threading.Event()
        self.knows_its_server = False
        self.server_is_stopping: Callable[[], bool] = lambda: False
        self._signed_out: deque[tuple[float, str]] = deque(maxlen=SIGN_OUTS_KEPT)  # no lock: appended to and read whole
        self._last_said: dict[str, float] = {}  # without a lock: at the worst a line is logged twice
        self.process = secrets.token_hex(PROCESS_LENGTH // 2)  # what other processes know this one by
        # Other processes: when they were heard, and the most changes they had told of; for jobs alone.
        self._heard_of: dict[str, tuple[float, int]] = {}
        self._presence_due_at = 0.0  # when to tell it; a float is set and read whole
        self._dispatcher, self._heartbeat, self._writing = (
            threading.Thread(target=target, name=f"swiftcms-ws {name}", daemon=True)
            for target, name in (
                (self._dispatch, "dispatcher"), (self._keep_beating, "heartbeat"), (self.writer.run, "writer")
            )
        )  # fmt: skip

    def start(self) -> None:
        try:
            for thread in (self._writing, self._dispatcher, self._heartbeat):
                thread.start()
            self.broker.start()
        except BaseException:  # for the caller; but those that did start must end
            self.closing.set()
            self.broker.close()
            self.writer.close()
            raise

    def new_client_id(self) -> str:
        """Return an id that tells, to who has several, whether they are of one process."""
        return self.process + secrets.token_hex(6)

    # -- an event's way --------------------------------------------------------------------------------

    def draft(self, event_type: str, content_type: str, payload: Any, to: Any = None) -> Draft:
        """Check and serialise an event, in the caller's thread. See Hub.publish()."""
        check_name(event_type, "event_type")
        if event_type.partition(".")[0] == "system":
            raise ValueError(f"event_type must not be under system., the server's own: {event_type!r}")
        check_name(content_type, "content_type")
        if to is not None:
            if not isinstance(to, (str, int, Iterable)) or isinstance(to, (bytes, Mapping)):
                raise TypeError(f"to must be a user id or several, not {type(to).__name__}")
            to = frozenset(check_user_id(user, "to") for user in ([to] if isinstance(to, (str, int)) else to))
        try:
            text = self.to_json(payload)
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:
            right = 'publish a dict such as {"id": post.id}, or teach app.json the type'
            raise TypeError(f"payload cannot be sent as JSON: {error}; {right}") from error
        if size > self.settings.max_queue:  # each client that does not take it at once would be cut for it
            right = f"at most SWIFTCMS_WS_MAX_QUEUE, {self.settings.max_queue}; publish an id, to fetch the rest by"
            raise ValueError(f"payload has {size} bytes as JSON, and may have {right}")
        return event_type, content_type, text, to

    def publish(self, drafts: list[Draft]) -> list[str]:
        """Give events to the broker, and return their ids."""
        return [format_event_id(event_id) for event_id in self.broker.publish(drafts)]

    def _dispatch(self) -> None:
        """Be the dispatcher: the one thread that delivers events, and so the one order they have."""
        while (work := self.broker.take()) is not None:
            try:
                if isinstance(work, list):
                    try:
                        self._deliver(work)
                    finally:
                        self.broker.remember(work)
                else:
                    work()
            except Exception:  # one bad batch must not end all delivery
                log(logging.ERROR, "the dispatcher failed, and goes on with what is next", exc_info=True)

    def _deliver(self, events: list[Event]) -> None:
        """Send each client those of `events` that it wants, in one call.

        One system call is what a delivery costs, and it costs about the same with many frames as
        with one. So events that were published while others were being sent go out together; none
        is ever held back for company.
        """
        alike: dict[tuple[str, str, frozenset[str] | None], int] = defaultdict(int)
        for index, event in enumerate(events):  # bit i stands for events[i]
            alike[event.type, event.content_type, event.to] |= 1 << index
        routes = [(bits, self.registry.matching(*route)) for route, bits in alike.items()]
        # Most often all are alike, one event always is, and then there is nothing to sort out.
        for bits, connections in routes if len(routes) == 1 else _by_what_they_want(routes):
            data = b"".join(event.frame for index, event in enumerate(events) if bits >> index & 1)
            for connection in connections:
                connection.send(data)
            self.counters.add("delivered", bits.bit_count() * len(connections))

    # -- the server's own messages ---------------------------------------------------------------------

    def message(
        self, message_type: str, payload: Mapping[str, Any], content_type: str | None = None, ref: object = None
    ) -> bytes:
        """Return the frame of a message. It holds nothing that needs the app's own JSON."""
        message: dict[str, Any] = {"type": message_type, "contentType": content_type, "payload": payload}
        message |= {"timestamp": timestamp(now_milliseconds()), "ref": ref}
        return text_frame(json.dumps({name: value for name, value in message.items() if value is not None}))

    def fail(self, connection: Connection, error: BaseException, action: object = None, ref: object = None) -> None:
        """Tell a client what went wrong, and end the connection where the error says so."""
        self.counters.add("errors")
        if not isinstance(error, ClientError):
            what = "client %s is sent away with 1011, for serving it failed; a hook of the site, perhaps?"
            log(logging.ERROR, what, connection.id, exc_info=error)
            connection.close(CloseCode.SERVER_ERROR, "the server failed; this is logged there")
            return
        self.counters.add(f"error_{error.code}")
        payload = {"code": error.code, "message": str(error), "action": action}
        connection.send(self.message("system.error", payload, ref=ref))
        if error.code == "too_many_subscriptions":
            limit = self.settings.max_subscriptions
            self.say("refused a client more than the %s of SWIFTCMS_WS_MAX_SUBSCRIPTIONS", limit)
        if error.closes_with is not None:
            connection.close(error.closes_with, str(error))

    def say(self, text: str, *values: object, once: bool = False) -> None:
        """Log a warning, but not again and again: it is clients who decide how often there is cause."""
        now, said = time.monotonic(), self._last_said.get(text)
        if said is None or (not once and now >= said + QUIET_SECONDS):
            self._last_said[text] = now
            log(logging.WARNING, text, *values)

    # -- presence: jobs for the dispatcher; nothing of it is kept --------------------------------------

    def editing(self, entry: Entry) -> dict[str, Any]:
        """Return what a message about an entry says of its editors."""
        editors = [editor.as_json() for editor in self.presence.editors(entry)]
        return {"entryId": entry[1], "editors": editors, "conflict": len(editors) > 1}

    def start_editing(self, entry: Entry, editor: Editor) -> None:
        if self.presence.start(entry, editor):
            self._tell_subscribers("user.editing", entry, editor)

    def stop_editing(self, entry: Entry, client_id: str) -> None:
        editor = self.presence.stop(entry, client_id)
        if editor is not None:
            self._tell_subscribers("user.stoppedEditing", entry, editor)

    def stop_all_editing(self, client_id: str) -> list[Entry]:
        """Stop what a client edits, and return what it was."""
        entries = self.presence.entries_of(client_id)
        for entry in entries:
            self.stop_editing(entry, client_id)
        return entries

    def _tell_subscribers(self, event_type: str, entry: Entry, editor: Editor) -> None:
        frame = self.message(event_type, {**self.editing(entry), "editor": editor.as_json()}, entry[0])
        for connection in self.registry.matching(event_type, entry[0], None):
            connection.send(frame)

    def relay_change(self, entry: Entry, editor: Editor, change: object) -> None:
        """Send a change to the entry's other editors, subscribed or not."""
        payload = {"entryId": entry[1], "editor": editor.as_json(), "change": change}
        frame = self.message("user.edited", payload, entry[0])
        others = {other.client_id for other in self.presence.editors(entry)} - {editor.client_id}
        for connection in self.registry.connections() if others else ():
            if connection.id in others:
                connection.send(frame)

    def end_user(self, user_id: str) -> int:
        """Sign a user out of this process; return of how many connections."""
        self._signed_out.append((time.monotonic(), user_id))
        return sum(self._end_signed_out(connection) for connection in self.registry.connections(user_id))

    def end_if_signed_out(self, connection: Connection, since: float) -> None:
        """End a connection that is new in the registry, if its user was signed out since its handshake began."""
        user_id = connection.user.id if connection.user else None
        if any(at >= since and who == user_id for at, who in list(self._signed_out)):
            self._end_signed_out(connection)

    def _end_signed_out(self, connection: Connection) -> bool:
        return connection.close(CloseCode.SIGN_IN_AGAIN, "the site signed you out; sign in again")

    # -- other processes: through Redis, or there are none ---------------------------------------------

    def tell_others(self, do: str, **details: Any) -> None:
        """Tell the engines of other processes. May wait for Redis, and so is not for jobs."""
        message = {"do": do, "process": self.process, "changes": self.presence.changes}
        self.broker.tell_others({**message, **details})

    def _tell_presence(self) -> None:
        """Tell who edits what in this process: what others have missed, this repairs.

        The follower calls it after each round; it is due once a heartbeat, and when someone is new.
        """
        now = time.monotonic()
        if now >= self._presence_due_at:
            self._presence_due_at = now + self.settings.heartbeat
            changes = self.presence.changes  # before it is looked at: what changes meanwhile is told on its own
            own = [(*entry, dataclasses.asdict(e)) for entry, e in self.presence.everything(process=self.process)]
            self.tell_others("presence", changes=changes, editors=own)

    def _on_told(self, message: dict[str, Any]) -> None:
        """Do what the engine of another process tells; a job."""
        process = message["process"]
        if process == self.process:
            return
        changes = 0
        if process:
            changes = max(message["changes"], self._heard_of.get(process, (0.0, 0))[1])
            self._heard_of[process] = time.monotonic(), changes
        entry = tuple(message.get("entry", ()))
        match message["do"]:
            case "hello":
                self._presence_due_at = 0.0
            case "presence" if message["changes"] == changes:  # else it was overtaken, and the next one will do
                told = {((kind, entry_id), Editor(**editor)) for kind, entry_id, editor in message["editors"]}
                known = set(self.presence.everything(process=process))
                for entry, editor in known - told:
                    self.stop_editing(entry, editor.client_id)
                for entry, editor in told - known:
                    self.start_editing(entry, editor)
            case "start":
                self.start_editing(entry, Editor(**message["editor"]))
            case "stop":
                self.stop_editing(entry, message["client_id"])
            case "change":
                self.relay_change(entry, Editor(**message["editor"]), message["change"])
            case "disconnect":
                self.end_user(message["user_id"])

    def _forget_silent_processes(self) -> None:
        """Let the editors of processes that died, or that Redis does not reach, stop; a job."""
        silence = self.settings.heartbeat * SILENT_HEARTBEATS
        for process, (heard, _) in list(self._heard_of.items()):
            if time.monotonic() - heard > silence:
                del self._heard_of[process]
                for entry, editor in self.presence.everything(process=process):
                    self.stop_editing(entry, editor.client_id)

    def _on_gap(self) -> None:
        """Send everyone away, to come back with an id that is not known any more, and so hear of it."""
        connections = self.registry.connections()
        if connections:
            log(
                logging.WARNING,
                "Redis lost events (does it keep them on disk?), or was away too long: %s clients must come back",
                len(connections),
            )
        for connection in connections:
            connection.close(CloseCode.GOING_AWAY, "events may be lost; come back with since")

    # -- the heartbeat ---------------------------------------------------------------------------------

    def _keep_beating(self) -> None:
        """Be the heartbeat: look after everyone, and beat when it is time."""
        interval = self.settings.heartbeat
        next_beat = time.monotonic() + interval
        while not self.closing.wait(max(0.0, min(LOOK_SECONDS, next_beat - time.monotonic()))):
            now = time.monotonic()
            try:
                if self.server_is_stopping():
                    self.close(CLOSE_SECONDS)
                    return
                self._end_what_is_over(now, time.time())
                if self._heard_of:
                    self.broker.run_in_order(self._forget_silent_processes)
                if now >= next_beat:
                    next_beat = max(next_beat + interval, now)
                    self._beat()
            except Exception:  # without heartbeats nobody dead would ever be ended
                log(logging.ERROR, "the heartbeat failed, and goes on with the next", exc_info=True)

    def _beat(self) -> None:
        """Send both kinds of heartbeat: one for scripts, one that every WebSocket library answers."""
        both = self.message("system.heartbeat", {}) + bytes(framer().ping())
        for connection in self.registry.connections():
            connection.send(both)

    def _end_what_is_over(self, now: float, wall_clock: float) -> None:
        """End who is silent, who has not signed in in time, and whose token has run out."""
        silence = self.settings.heartbeat * MISSED_HEARTBEATS
        for connection in self.registry.connections():
            user = connection.user
            if connection.is_ending:
                continue
            if now - connection.last_heard > silence:
                reason = f"nothing heard for {silence:g} seconds; come back with since"
                connection.close(CloseCode.NO_SIGN_OF_LIFE, reason)
            elif user is None:
                if self.settings.auth == "required" and now - connection.opened_at > SIGN_IN_SECONDS:
                    sentence = f"no token within {SIGN_IN_SECONDS:g} seconds; come back and authenticate first"
                    self.fail(connection, ClientError("auth_required", sentence, CloseCode.SIGN_IN_AGAIN))
            elif user.expires_at is not None and user.expires_at <= wall_clock:
                sentence = "the token has run out; come back with a fresh one"
                self.fail(connection, ClientError("token_expired", sentence, CloseCode.SIGN_IN_AGAIN))

    # -- the end ---------------------------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published before is with the sockets. See Hub.flush()."""
        deadline = time.monotonic() + timeout
        if not self.broker.is_caught_up(timeout):
            return False
        try:
            everyone = self.broker.in_order(self.registry.connections)
            connections = everyone.result(max(0, deadline - time.monotonic()))
        except CancelledError:  # closed: nothing comes any more
            self._dispatcher.join(max(0, deadline - time.monotonic()))
            if self._dispatcher.is_alive():
                return False
            connections = self.registry.connections()
        except FutureTimeoutError:
            return False
        return self.writer.wait_until_written(connections, deadline)

    def close(self, timeout: float) -> bool:
        """End every connection and all threads. See Hub.close()."""
        deadline = time.monotonic() + timeout
        self.closing.set()
        self.broker.close()
        for thread in (self._dispatcher, self._heartbeat):  # the writer still has to write
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(timeout / 4)
        for connection in self.registry.connections():
            connection.close(CloseCode.GOING_AWAY, "the server is going away; come back with since")
        is_empty = self.registry.wait_until_empty(deadline)
        self.writer.close()
        self.tell_others("presence", editors=[])
        return is_empty


# == 10. Conversation: what a client's messages do ===================================================


class Conversation:
    """Carries out one client's messages, one after the other, in that connection's reader thread."""

    __slots__ = (
        "_allowance", "_allowance_at", "_burst", "_connection", "_engine", "_is_allowed", "_parts",
        "_replayed", "_size",
    )  # fmt: skip

    def __init__(
        self, engine: Engine, connection: Connection, is_allowed: Callable[[User | None, str, str], bool]
    ) -> None:
        self._engine = engine
        self._connection = connection
        self._is_allowed = is_allowed
        self._parts: list[Any] = []  # of a message that is not whole yet,
        self._size = 0  # and how many bytes they have
        # The rate's bucket: a message takes one out, time puts them back. The reader's alone.
        self._allowance = self._burst = engine.settings.rate * RATE_BURST
        self._allowance_at = time.monotonic()
        self._replayed = 0  # events, since the client had last read all; the dispatcher's alone

    def greet(self) -> None:
        """Send the first message of every connection."""
        user = self._connection.user
        payload = {
            "clientId": self._connection.id,
            "userId": user.id if user else None,
            "heartbeat": self._engine.settings.heartbeat,
            "lastId": format_event_id(self._engine.broker.newest_id()),
        }
        self._answer("system.connected", payload)

    def take(self, frame: Received) -> None:
        """Take a frame; once a message is whole, carry it out."""
        try:
            data = self._whole_message(frame)
        except ClientError as error:
            self.fail(error)
        else:
            if data is not None:
                self._handle(data)

    def fail(self, error: BaseException) -> None:
        self._engine.fail(self._connection, error)

    def _whole_message(self, frame: Received) -> str | bytes | None:
        """Return the message that a frame completes, or None; raise ClientError where these are too big or too many."""
        if isinstance(frame, Message):
            self._parts.append(frame.data)
            self._size += len(frame.data.encode() if isinstance(frame.data, str) else frame.data)
            limit = self._engine.settings.max_message
            if self._size > limit:
                sentence = f"the message is over the limit of {limit} bytes; send less, or several"
                raise ClientError("message_too_big", sentence, CloseCode.MESSAGE_TOO_BIG)
            if frame.message_finished:
                whole: str | bytes = frame.data[:0].join(self._parts)
                self._parts, self._size = [], 0
                return whole
            if not frame.frame_finished or len(frame.data) >= SMALL_FRAGMENT:
                return None
        # A ping, a pong or a small fragment: it costs us as much as a message does.
        too_much = self._spend(1)
        if too_much is not None:
            raise too_much
        return None

    def _handle(self, data: str | bytes) -> None:
        """Carry out one message, or answer with what is wrong with it."""
        action = ref = None
        try:
            too_much = self._spend(1 + len(data) // RATE_BYTES)
            if too_much is not None and too_much.closes_with is not None:
                raise too_much  # no more work for this one
            message = parse_message(data)
            action = message["action"][:NAME_LENGTH] if isinstance(message.get("action"), str) else None
            ref = self._ref(message)
            if too_much is not None:
                raise too_much
            carry_out = self._action(message)
            if self._must_sign_in() and carry_out is not ACTIONS["authenticate"]:
                raise ClientError("auth_required", "sign in first: send authenticate with a token")
            carry_out(self, message, ref)
        except CancelledError:  # the server is going away, and this connection with it
            pass
        except BrokerAway as error:
            log(logging.INFO, "sent client %s away: %s", self._connection.id, error)
            self._connection.close(CloseCode.GOING_AWAY, "the history cannot be read now; come back with since")
        except BaseException as error:  # the client's, or a hook's, its SystemExit too: logged, and the end
            self._engine.fail(self._connection, error, action, ref)

    def _spend(self, count: int) -> ClientError | None:
        """Take messages out of the rate's bucket; return what is wrong where there are too many."""
        now, rate = time.monotonic(), self._engine.settings.rate
        refilled = self._allowance + (now - self._allowance_at) * rate
        self._allowance, self._allowance_at = min(self._burst, refilled) - count, now
        if self._allowance < -self._burst:
            sentence = "far too many messages; come back in a minute, slower"
            return ClientError("rate_limited", sentence, CloseCode.TOO_MANY_MESSAGES)
        if self._allowance < 0:
            return ClientError("rate_limited", f"too many messages; send {rate:g} a second at most")
        return None

    def _must_sign_in(self) -> bool:
        return self._engine.settings.auth == "required" and self._connection.user is None

    @staticmethod
    def _ref(message: Mapping[str, Any]) -> str | int | float | None:
        ref = message.get("ref", "")
        if isinstance(ref, bool) or not isinstance(ref, (str, int, float)):
            raise ClientError("invalid_message", f"`ref` must be a string or a number, not {describe(ref)}")
        return message.get("ref")

    @staticmethod
    def _action(message: Mapping[str, Any]) -> Action:
        name = text_field(message, "action")
        if name not in ACTIONS:
            wrong = f"there is no action {json.dumps(name[:NAME_LENGTH])}{did_you_mean(name, ACTIONS)}"
            raise ClientError("unknown_action", f"{wrong}; there are {', '.join(ACTIONS)}")
        return ACTIONS[name]

    def _check_allowed(self, event_type: str, content_type: str) -> None:
        if not self._is_allowed(self._connection.user, event_type, content_type):
            what = f"you may not have {event_type} of content type {content_type}"
            raise ClientError("forbidden", f"{what}; ask for less, or sign in as someone who may")

    def _answer(
        self, message_type: str, payload: Mapping[str, Any], ref: object = None, content_type: str | None = None
    ) -> None:
        self._connection.send(self._engine.message(message_type, payload, content_type, ref))

    # -- the actions -----------------------------------------------------------------------------------

    def subscribe(self, message: Mapping[str, Any], ref: object) -> None:
        pattern = parse_pattern(message)
        since = parse_event_id(message["since"]) if "since" in message else None
        self._check_allowed(*pattern)
        broker = self._engine.broker
        fetched = None if since is None else broker.fetch_after(since)
        # Between two events, so that what is replayed ends exactly where what is live begins.
        replayed = broker.in_order(lambda: self._subscribe_now(pattern, since, fetched, ref)).result()
        self._spend(REPLAY_COST * replayed // max(1, self._engine.settings.history))

    def _subscribe_now(
        self, pattern: Pattern, since: EventId | None, fetched: list[Event] | None, ref: object
    ) -> int:
        engine, connection = self._engine, self._connection
        newer = [] if since is None else engine.broker.events_after(since, fetched)
        missed = engine.registry.missed(connection, pattern, newer or [])
        start = engine.broker.delivered if since is None or newer is None else since
        engine.registry.subscribe(connection, pattern, start, engine.settings.max_subscriptions)
        recovery = {"recovered": newer is not None, "replayed": len(missed)}
        self._answer("system.subscribed", {"type": pattern[0], "contentType": pattern[1], **recovery}, ref)
        # As much as there is history may be let in, once: not again and again, before it is read.
        self._replayed = len(missed) + (self._replayed if connection.waiting_bytes else 0)
        for batch in batches(event.frame for event in missed):
            connection.send(b"".join(batch), is_replay=self._replayed <= engine.settings.history)
        engine.counters.add("replayed", len(missed))
        return len(missed)

    def unsubscribe(self, message: Mapping[str, Any], ref: object) -> None:
        pattern = parse_pattern(message)
        is_one = "type" in message or "contentType" in message
        removed = self._engine.registry.unsubscribe(self._connection, pattern if is_one else None)
        payload = {"type": pattern[0], "contentType": pattern[1], "removed": removed}
        self._answer("system.unsubscribed", payload, ref)

    def authenticate(self, message: Mapping[str, Any], ref: object) -> None:
        engine, connection = self._engine, self._connection
        user = check_token(engine.settings, text_field(message, "token"))
        if connection.user is not None and connection.user.id != user.id:
            raise ClientError("invalid_token", "the token is of another user; open a new connection for it")
        # Between two events, so that it is known which of those to this user have reached it.
        engine.broker.in_order(
            lambda: engine.registry.sign_in(connection, user, engine.broker.delivered)
        ).result()
        expires_at = timestamp(int(user.claims["exp"] * 1000))
        self._answer("system.authenticated", {"userId": user.id, "expiresAt": expires_at}, ref)

    def pong(self, message: Mapping[str, Any], ref: object) -> None:
        """Do nothing: whatever is received is a sign of life, and the connection has noted it."""

    def heartbeat(self, message: Mapping[str, Any], ref: object) -> None:
        self._answer("system.heartbeat", {}, ref)

    def edit_start(self, message: Mapping[str, Any], ref: object) -> None:
        entry = self._entry(message)
        editor = self._engine.broker.in_order(lambda: self._start_now(entry, ref)).result()
        self._engine.tell_others("start", entry=entry, editor=dataclasses.asdict(editor))

    def _start_now(self, entry: Entry, ref: object) -> Editor:
        engine, connection = self._engine, self._connection
        limit = engine.settings.max_subscriptions
        open_entries = engine.presence.entries_of(connection.id)
        if entry not in open_entries and len(open_entries) >= limit:
            raise ClientError("too_many_subscriptions", f"{limit} open entries are the most; stop editing one")
        user_id = connection.user.id if connection.user else None
        new = Editor(timestamp(now_milliseconds()), connection.id, user_id, engine.process)
        editor = self._own_editor(entry) or new
        engine.start_editing(entry, editor)
        self._answer("system.editing", engine.editing(entry), ref, entry[0])
        return editor

    def edit_stop(self, message: Mapping[str, Any], ref: object) -> None:
        entry = self._entry(message)
        self._engine.broker.in_order(lambda: self._stop_now(entry, ref)).result()
        self._engine.tell_others("stop", entry=entry, client_id=self._connection.id)

    def _stop_now(self, entry: Entry, ref: object) -> None:
        self._engine.stop_editing(entry, self._connection.id)
        self._answer("system.editing", self._engine.editing(entry), ref, entry[0])

    def edit_change(self, message: Mapping[str, Any], ref: object) -> None:
        entry = self._entry(message)
        if "payload" not in message:
            hint = did_you_mean("payload", message)
            raise ClientError("invalid_message", f"the message has no `payload`{hint}; it is the change, any JSON")
        change = message["payload"]
        editor = self._engine.broker.in_order(lambda: self._relay_now(entry, change)).result()
        self._engine.tell_others("change", entry=entry, editor=dataclasses.asdict(editor), change=change)

    def _relay_now(self, entry: Entry, change: object) -> Editor:
        editor = self._own_editor(entry)
        if editor is None:
            raise ClientError("not_editing", f"send editStart for entry {describe(entry[1])} first")
        self._engine.relay_change(entry, editor, change)
        return editor

    def _own_editor(self, entry: Entry) -> Editor | None:
        editors = self._engine.presence.editors(entry)
        return next((editor for editor in editors if editor.client_id == self._connection.id), None)

    def presence(self, message: Mapping[str, Any], ref: object) -> None:
        content_type = parse_pattern({**message, "type": "*"})[1]
        entry_id = text_field(message, "entryId") if "entryId" in message else None
        self._check_allowed("user.editing", content_type)
        edited = sorted({entry for entry, _ in self._engine.presence.everything()})
        entries = [
            {"contentType": entry[0], "entryId": entry[1], "editors": self._engine.editing(entry)["editors"]}
            for entry in edited
            if content_type in ("*", entry[0]) and entry_id in (None, entry[1])
        ]
        self._answer("system.presence", {"entries": entries}, ref)

    def _entry(self, message: Mapping[str, Any]) -> Entry:
        content_type, entry_id = text_field(message, "contentType"), text_field(message, "entryId")
        if parse_pattern({"contentType": content_type})[1] == "*":
            raise ClientError("invalid_type", "`contentType` must be that of the entry, such as posts, not *")
        if not 0 < len(entry_id) <= NAME_LENGTH:
            raise ClientError("invalid_message", f"`entryId` must have 1 to {NAME_LENGTH} characters")
        self._check_allowed("user.editing", content_type)
        return content_type, entry_id

    def stop_all_editing(self) -> None:
        """End what the connection was editing, once it has ended itself."""
        engine, client_id = self._engine, self._connection.id
        with suppress(CancelledError):  # the engine has ended, and what it knew with it
            for entry in engine.broker.in_order(lambda: engine.stop_all_editing(client_id)).result():
                engine.tell_others("stop", entry=entry, client_id=client_id)


def text_field(message: Mapping[str, Any], name: str) -> str:
    """Return a field that must be there and be a string, or raise ClientError."""
    if name not in message:
        hint = did_you_mean(name, message)
        raise ClientError("invalid_message", f"the message has no `{name}`{hint}; it must be a string")
    if not isinstance(message[name], str):
        raise ClientError("invalid_message", f"`{name}` must be a string, not {describe(message[name])}")
    return cast(str, message[name])


Action = Callable[[Conversation, Mapping[str, Any], object], None]
ACTIONS: dict[str, Action] = {
    "subscribe": Conversation.subscribe,
    "unsubscribe": Conversation.unsubscribe,
    "authenticate": Conversation.authenticate,
    "pong": Conversation.pong,
    "heartbeat": Conversation.heartbeat,
    "editStart": Conversation.edit_start,
    "editStop": Conversation.edit_stop,
    "editChange": Conversation.edit_change,
    "presence": Conversation.presence,
}

# == 11. Flask: the hub, its blueprint, the handshake and the hooks ==================================

SOCKET_KEYS = ("werkzeug.socket", "gunicorn.socket")  # where a server leaves it in the environ
SERVERS_THAT_CAN = "run the site with flask run or gunicorn -k gthread --threads 100"
HANDSHAKE_KEY = "swiftcms_ws.handshake"
WHY_ENDED = {  # and which key is too tight, if it is
    CloseCode.MESSAGE_TOO_BIG: "its message was over SWIFTCMS_WS_MAX_MESSAGE",
    CloseCode.TOO_SLOW: "more than SWIFTCMS_WS_MAX_QUEUE bytes were waiting for it",
    CloseCode.SIGN_IN_AGAIN: "it did not sign in in time (SWIFTCMS_WS_AUTH), its token ran out, or it was signed out",
    CloseCode.NO_SIGN_OF_LIFE: "nothing was heard from it for two heartbeats (SWIFTCMS_WS_HEARTBEAT)",
    CloseCode.TOO_MANY_MESSAGES: "it kept on sending more than SWIFTCMS_WS_RATE messages a second",
}

Identify = TypeVar("Identify", bound="Callable[[], str | int | None]")
Authorize = TypeVar("Authorize", bound="Callable[[User | None, str, str], bool]")


class Handshake:
    """Stands in for the socket while simple-websocket accepts the handshake; then we take the socket over.

    That library has a thread for each client that reads, and writes too. It is told that the line
    has ended, and ends: one thread, the web server's own, is enough to read with, and takes half the memory.
    """

    def __init__(self, sock: socket.socket, user: User | None, began: float) -> None:
        self.sock = sock
        self.user = user
        self.began = began  # before it was asked who that is

    def send(self, data: bytes) -> int:
        self.sock.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        return b""

    def close(self) -> None:
        """The library's thread ends."""


class HandshakeRefused(HTTPException):
    """No WebSocket: has the answer. A class of its own, for a site may have Flask trap all others."""


class Hub:
    """What a site talks to: publish(), the hooks, and a blueprint with the /ws route.

    One hub serves one app at a time; registered with another app it ends its connections and
    starts anew there. `redis_url` or the environment variable SWIFTCMS_WS_REDIS_URL stand in for the
    config key: a script or a task queue has no app, and reaches the site's clients all the same.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        self.blueprint = Blueprint("swiftcms_ws", __name__)
        self.blueprint.record(lambda state: self._registered(cast(Flask, state.app)))
        self.blueprint.before_request(self._before_request)
        self.blueprint.teardown_request(self._after_handshake)
        self.blueprint.register_error_handler(HandshakeRefused, HandshakeRefused.get_response)
        self.blueprint.register_error_handler(ProtocolError, self._malformed)
        Sock().route("/ws", bp=self.blueprint, endpoint="websocket")(self._websocket)
        self.blueprint.add_url_rule("/ws", "about", self._about)
        self.blueprint.add_url_rule("/ws/client.js", "client_js", self._client_js)

        self._app: Flask | None = None
        self._settings = Settings()
        self._redis_url = redis_url
        self._identify: Callable[[], str | int | None] | None = None
        self._authorize: Callable[[User | None, str, str], bool] | None = None
        # Held while `_engine` is made. It is set when it is whole, and so is read without.
        self._starting = threading.Lock()
        self._engine: Engine | None = None
        _hubs.add(self)

    # -- what a site calls -----------------------------------------------------------------------------

    def init_app(self, app: Flask, **options: Any) -> None:
        """Register the blueprint, for an application factory.

        `options` are those of Flask.register_blueprint(), such as `url_prefix`; a second hub of an
        app needs a `name`. Raises ValueError, naming it, for a SWIFTCMS_WS_… key that will not do.
        """
        app.register_blueprint(self.blueprint, **options)

    def publish(
        self, event_type: str, content_type: str, payload: Any, *, to: str | int | Iterable[str | int] | None = None
    ) -> str:
        """Send an event to everyone who subscribes to it, and return its id.

        Takes the same short time however many there are, in any thread, without a context. Call it
        once what it tells of is committed: a client may ask for that at once.

        event_type:    such as "content.created": words joined by dots, none under "system."
        content_type:  such as "posts"
        payload:       anything that `app.json` can serialise
        to:            a user id, or several, to whom alone it goes; None: to all

        Raises TypeError or ValueError, naming the argument, with nothing sent; and PublishError,
        within two seconds, where Redis does not take it. What a receiver of `event_published` raises
        comes out of here too, once the event is sent.
        """
        return self.publish_many([(event_type, content_type, payload, to)])[0]

    def publish_many(self, events: Iterable[tuple[Any, ...]]) -> list[str]:
        """Send events, each a tuple of publish()'s arguments in their order; return their ids.

        Raises as publish() does, with none of them sent. With Redis all are one round trip.
        """
        engine = self._running()
        events = list(events)
        event_ids = engine.publish([engine.draft(*event) for event in events])
        if event_published.receivers:
            for event_id, event in zip(event_ids, events, strict=True):
                event_type, content_type, payload, to = (*event, None)[:4]  # `to` may be left out
                details = {"type": event_type, "content_type": content_type, "payload": payload, "to": to}
                event_published.send(self._app or self, hub=self, id=event_id, **details)
        return event_ids

    def identify(self, hook: Identify) -> Identify:
        """Register `hook() -> user id or None`: who is the user of the handshake's request?

        It runs in a request context of its own, so `session` and login extensions work in it. A
        token in the handshake goes before it.
        """
        self._identify = hook
        return hook

    def authorize(self, hook: Authorize) -> Authorize:
        """Register `hook(user, event_type, content_type) -> bool`: may this user subscribe to this?

        `user` is a User or None. The others are the pattern as the client sent it, so "content.*"
        or "*" too: answer for all that it matches. Editing asks for "user.editing". Runs in a
        request context of its own.
        """
        self._authorize = hook
        return hook

    def issue_token(self, user_id: str | int, expires_in: float = 3600, **claims: Any) -> str:
        """Return a JWT that `authenticate` takes, for `expires_in` seconds.

        `claims` are for the authorize hook: issue_token(7, role="editor") is its user.claims["role"].
        Raises ValueError where there is no key to sign with, or only one to check with.
        """
        settings = self._engine.settings if self._engine else self._current_settings()
        algorithm = settings.jwt_algorithms[0]
        if settings.jwt_key is None:
            raise ValueError("there is no key to sign with: set SECRET_KEY or SWIFTCMS_WS_JWT_KEY")
        if not algorithm.startswith("HS"):
            raise ValueError(f"SWIFTCMS_WS_JWT_KEY only checks {algorithm}: sign with the private key, elsewhere")
        return sign_token(settings, check_user_id(user_id, "user_id"), time.time(), expires_in, claims)

    def stats(self) -> dict[str, int]:
        """Return the numbers of this process for a status page, by name.

        What is now: `connections`, `subscriptions`, `queue_length` (events not dispatched yet),
        `waiting_bytes` (that slow clients have not taken yet). What has been since the start:
        `published`, `delivered`, `replayed`, `slow_clients` (cut with 1013), `errors`; and, once
        there was one, `error_CODE`, `closed_CODE` (ended by the server), `refused_STATUS`.
        """
        engine = self._running()
        connections = engine.registry.connections()
        return {
            "connections": len(connections),
            "subscriptions": engine.registry.count_subscriptions(),
            "queue_length": engine.broker.queue_length(),
            "waiting_bytes": sum(connection.waiting_bytes for connection in connections),
            "published": engine.broker.published,
            **engine.counters.as_dict(),
        }

    def editors(self, content_type: str, entry_id: str | int) -> list[dict[str, Any]]:
        """Return who has an entry open for editing: dicts of `clientId`, `userId` and `since`."""
        editors = self._running().presence.editors((content_type, str(entry_id)))
        return [editor.as_json() for editor in editors]

    def disconnect(self, user_id: str | int) -> int:
        """End a user's connections, for a logout or a ban; return how many there were in this process.

        End the login first: who comes afterwards, and is known to the identify hook, comes in.
        """
        user, engine = check_user_id(user_id, "user_id"), self._running()
        engine.tell_others("disconnect", user_id=user)
        return engine.end_user(user)

    def last_id(self) -> str:
        """Return the id of the newest event: take it before the data of a page, which then listens from there."""
        return format_event_id(self._running().broker.newest_id())

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was published before is with the sockets; False after `timeout` seconds."""
        return self._running().flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """End every connection with 1001, and take no more; False where some linger after `timeout` seconds."""
        return self._engine is None or self._engine.close(timeout)

    # -- starting --------------------------------------------------------------------------------------

    def _registered(self, app: Flask) -> None:
        self._settings = Settings.from_config(app.config)
        check_key(self._settings)
        if self._settings.redis_url is not None:
            import_redis()
        if self._app is not app:
            self.close()
            self._app, self._engine = app, None
        _exit_on_sigterm()
        for name in ("werkzeug", "gunicorn.access", "gunicorn.error"):
            logging.getLogger(name).addFilter(_hide_token)

    def _current_settings(self) -> Settings:
        """Return the settings as they are at first use, when configuration is over. Raises ValueError."""
        settings, secret_key = self._settings, None
        if self._app is not None:
            settings, secret_key = Settings.from_config(self._app.config), self._app.secret_key
        for field in dataclasses.fields(settings):
            if getattr(settings, field.name) != getattr(self._settings, field.name):
                key = CONFIG_PREFIX + field.name.upper()
                raise ValueError(f"config key {key} was set after the blueprint was registered; set it before")
        redis_url = settings.redis_url or self._redis_url or os.environ.get(f"{CONFIG_PREFIX}REDIS_URL")
        jwt_key = settings.jwt_key or secret_key or None
        return dataclasses.replace(settings, jwt_key=jwt_key, redis_url=redis_url)

    def _running(self) -> Engine:
        """Return the engine, which starts with the first use of the hub in this process."""
        engine = self._engine
        if engine is None:
            with self._starting:
                is_new = self._engine is None
                if self._engine is None:
                    self._engine = self._start_engine()
                engine = self._engine
            if is_new:  # without the lock: a site's log handler may publish what is logged
                self._warn_of_what_is_odd(engine.settings)
        return engine

    def _start_engine(self) -> Engine:
        app, settings = self._app or Flask(__name__), self._current_settings()
        check_key(settings)
        # NaN is no JSON: the browser of everyone who gets it would throw.
        engine = Engine(settings, lambda value: app.json.dumps(value, allow_nan=False))
        engine.start()
        return engine

    def _warn_of_what_is_odd(self, settings: Settings) -> None:
        _warn_of_a_short_key(settings)
        if self._app is None and settings.redis_url is None:
            sentence = (
                "this hub is registered with no app, and so reaches nobody: a site with a Hub of its"
                " own calls that one's publish(); a script gives Hub(redis_url=…)"
            )
            log(logging.WARNING, sentence, stack_info=True)  # which place calls the wrong one

    def forget_engine(self) -> None:
        """Start anew in a forked child, where the threads do not exist and locks may be held for ever."""
        self._starting = threading.Lock()
        self._engine = None

    # -- the handshake ---------------------------------------------------------------------------------

    def _before_request(self) -> None:
        """Let a handshake in, or refuse it as HTTP; let other requests pass."""
        if (request.endpoint or "").rpartition(".")[2] != "websocket":
            return
        engine, environ = self._running(), request.environ
        socket_key = self._check_server(engine)
        self._check_headers(environ)
        self._check_origin(engine)
        began = time.monotonic()
        user = self._find_user(engine.settings)
        self._take_place(engine)
        environ[socket_key] = environ[HANDSHAKE_KEY] = Handshake(environ[socket_key], user, began)
        # No compression (PROTOCOL.md): one frame goes to all clients as it is.
        environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)

    def _check_server(self, engine: Engine) -> str:
        """Return where the socket is, or raise where this server cannot serve a WebSocket."""
        environ = request.environ
        socket_key = next((key for key in SOCKET_KEYS if key in environ), None)
        if socket_key is None or not environ.get("wsgi.multithread"):
            server = environ.get("SERVER_SOFTWARE", "this server")
            lacks = "gives no access to the socket" if socket_key is None else "has one thread, which it would hold"
            engine.say("refused a WebSocket: %s %s; %s", server, lacks, SERVERS_THAT_CAN)
            self._refuse(501, "not_supported", f"{server} {lacks}; {SERVERS_THAT_CAN}")
        if socket_key == "gunicorn.socket" and not engine.knows_its_server:
            engine.knows_its_server = True
            _learn_of_gunicorn(engine)
        if environ.get("wsgi.multiprocess") and engine.settings.redis_url is None:
            engine.say(
                "there are several server processes, and an event reaches only the clients of the one that"
                " publishes it: set SWIFTCMS_WS_REDIS_URL, or run one process with threads",
                once=True,
            )
        return socket_key

    def _check_headers(self, environ: Mapping[str, Any]) -> None:
        """Refuse headers that no browser sends: wsproto fails on some, and all are kept with the connection."""
        headers = {key: value for key, value in environ.items() if key.startswith("HTTP_")}
        if sum(map(len, headers.values())) + len(environ.get("QUERY_STRING", "")) > HEADERS_LENGTH:
            self._refuse(431, "bad_handshake", f"the headers are over {HEADERS_LENGTH} characters")
        for key, value in headers.items():
            if not value.isascii() and (key in ("HTTP_HOST", "HTTP_CONNECTION") or "_WEBSOCKET_" in key):
                name = key[5:].replace("_", "-").title()
                self._refuse(400, "bad_handshake", f"{name} must be ASCII")

    def _check_origin(self, engine: Engine) -> None:
        """Refuse pages of other sites: they come with the user's cookies (RFC 6455 section 10.2)."""
        origin, settings = request.headers.get("Origin"), engine.settings
        if origin is None or settings.origins == "*":  # None: not a browser
            return
        if settings.origins is None:
            here = f"{origin.partition('://')[0]}://{request.host}"  # a proxy may have ended the TLS
            page = _host_and_port(origin)
            is_allowed = page is not None and page == _host_and_port(here)
        else:
            is_allowed = origin.lower() in [each.lower().rstrip("/") for each in settings.origins]
        if not is_allowed:
            engine.say(
                "refused a WebSocket to a page of %r, which is not of this host (%s); if it may connect,"
                " name it in SWIFTCMS_WS_ORIGINS; if it is this site, let its proxy pass the Host header on",
                origin[:200], request.host,
            )  # fmt: skip
            self._refuse(403, "forbidden", "pages of this origin may not connect to this site")

    def _find_user(self, settings: Settings) -> User | None:
        """Return the user by the token in the handshake, or as the identify hook knows her."""
        token = request.args.get("token")
        if token is None and request.authorization is not None and request.authorization.type == "bearer":
            token = request.authorization.token
        if token is not None:
            try:
                return check_token(settings, token)
            except ClientError as error:
                self._refuse(401, error.code, str(error), **{"WWW-Authenticate": "Bearer"})
        if self._identify is None:
            return None
        with self._hook_context(request.environ):
            user_id = self._identify()
        return None if user_id is None else User(check_user_id(user_id, "what the identify hook returns"))

    def _take_place(self, engine: Engine) -> None:
        limit = engine.settings.max_connections
        if not engine.registry.reserve(limit):
            cure = "raise it, and the web server's threads above it, if more are to be let in"
            engine.say(f"refused a WebSocket: all %s of SWIFTCMS_WS_MAX_CONNECTIONS are open; {cure}", limit)
            self._refuse(503, "too_many_connections", "too many connections", **{"Retry-After": "10"})
        if engine.closing.is_set():  # asked with the place taken: who closes waits for all that are
            engine.registry.release()
            self._refuse(503, "going_away", "the server is going away", **{"Retry-After": "2"})

    def _after_handshake(self, error: BaseException | None) -> None:
        """Give the place back where the library refused what we had let in."""
        if request.environ.pop(HANDSHAKE_KEY, None) is not None:
            self._running().registry.release()

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> NoReturn:
        raise HandshakeRefused(response=self._refusal(status, code, message, **headers))

    def _refusal(self, status: int, code: str, message: str, **headers: str) -> Response:
        """Return the answer to what is no WebSocket (PROTOCOL.md, before the handshake)."""
        self._running().counters.add(f"refused_{status}")
        return make_response({"code": code, "message": message}, status, headers)

    def _malformed(self, error: ProtocolError) -> Response:
        return self._refusal(400, "bad_handshake", f"not a WebSocket handshake: {error}")

    def _about(self) -> ResponseReturnValue:
        """Answer a plain GET: with the inspector, where it is on."""
        if current_app.debug if self._settings.inspector is None else self._settings.inspector:
            return render_page(demo=False)
        message = "this is a WebSocket address; connect to it with ws:// or wss://"
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        return self._refusal(426, "upgrade_required", message, **headers)

    def _client_js(self) -> Response:
        """Serve the browser client: asked for each time, sent again only once it has changed."""
        response = Response(CLIENT_JS, mimetype="text/javascript")
        response.cache_control.no_cache = True
        response.add_etag()
        return cast(Response, response.make_conditional(request))

    # -- a connection's life ---------------------------------------------------------------------------

    def _websocket(self, library: Any) -> None:
        """Serve one client, in the web server's thread, until it has ended."""
        handshake: Handshake = request.environ.pop(HANDSHAKE_KEY)
        library.ws = None  # which has parsed it, and would keep it
        engine, environ = self._running(), request.environ  # the server keeps it as long
        # Leave the request that the handshake was, so that what the site opened in it is closed: a
        # before_request function may have taken a database connection, to be given back when the
        # request is torn down, and this one lasts for hours. Flask wants its context back after.
        context, noted = request_ctx._get_current_object(), app_ctx.g  # type: ignore[attr-defined]
        try:
            context.pop()
        except Exception:  # it is popped all the same
            log(logging.ERROR, "a teardown function of the site failed; its client is served", exc_info=True)
        try:
            self._serve(engine, handshake, environ)
        finally:
            context.push()
            app_ctx.g = noted  # for the site's after_request functions

    def _serve(self, engine: Engine, handshake: Handshake, environ: dict[str, Any]) -> None:
        """Greet a client, be its reader until it has ended, and tidy up after it."""
        try:
            connection = Connection(
                engine.new_client_id(), handshake.sock, engine.settings.max_queue, engine.writer.attend, handshake.user
            )
            conversation = Conversation(engine, connection, functools.partial(self._is_allowed, environ))
            try:
                self._greet(engine, conversation, connection, environ, handshake.began)
                for frame in connection.frames():
                    conversation.take(frame)
            except Exception as error:  # wsproto's, or ours: this client alone ends, and leaves nothing
                conversation.fail(error)
            finally:
                engine.registry.remove(connection)
        finally:
            engine.registry.release()
        conversation.stop_all_editing()
        self._note_end(engine, connection, environ.get("REMOTE_ADDR", "an unknown address"))
        try:
            self._tell(client_disconnected, environ, connection)
        except Exception:  # the site's; the client has gone, and cannot be told
            log(logging.ERROR, "a receiver of client_disconnected failed", exc_info=True)

    def _greet(
        self, engine: Engine, conversation: Conversation, connection: Connection, environ: dict[str, Any], began: float
    ) -> None:
        try:
            conversation.greet()
            engine.registry.add(connection)
            engine.end_if_signed_out(connection, began)
            if engine.closing.is_set():  # since the handshake
                connection.close(CloseCode.GOING_AWAY, "the server is going away; come back with since")
            self._tell(client_connected, environ, connection)
        except BaseException as error:  # of a signal's receiver, its SystemExit too: logged, and the end
            conversation.fail(error)

    def _note_end(self, engine: Engine, connection: Connection, address: str) -> None:
        """Count an end that the server chose, and say why, and what a site could do about it."""
        code = connection.close_code
        if code is not None:
            engine.counters.add(f"closed_{code:d}")
            engine.counters.add("slow_clients", int(code is CloseCode.TOO_SLOW))
            if code in WHY_ENDED:
                engine.say(f"ended a client at %s with {code:d}: {WHY_ENDED[code]}", address)

    def _is_allowed(self, environ: dict[str, Any], user: User | None, event_type: str, content_type: str) -> bool:
        if self._authorize is None:
            return True
        with self._hook_context(environ):
            return bool(self._authorize(user, event_type, content_type))

    def _tell(self, what: NamedSignal, environ: dict[str, Any], connection: Connection) -> None:
        if what.receivers:
            with self._hook_context(environ):
                what.send(self._app, hub=self, client_id=connection.id, user=connection.user)

    def _hook_context(self, environ: dict[str, Any]) -> Any:
        """Return a request context for one call: what the hook opens, a session say, ends with it."""
        assert self._app is not None
        kept = {key: value for key, value in environ.items() if isinstance(value, (str, bool, tuple))}
        streams = {"wsgi.errors": environ["wsgi.errors"], "wsgi.input": io.BytesIO()}
        return self._app.request_context({**kept, **streams})


def _host_and_port(origin: str) -> tuple[str, int | None] | None:
    """Return where a page comes from, or None for what is not scheme://host or scheme://host:port."""
    try:
        parts = urlsplit(origin)
        if not parts.scheme or not parts.hostname or "@" in parts.netloc:
            return None
        return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None


def _learn_of_gunicorn(engine: Engine) -> None:
    """Have the end of the worker noticed, and say so where it has too few threads."""
    worker = _gunicorn_worker()
    if worker is None:
        return
    engine.server_is_stopping = lambda: not worker.alive
    threads, limit = worker.cfg.threads, engine.settings.max_connections
    if threads <= limit:
        engine.say(
            "gunicorn has %s threads and each WebSocket holds one, so %s clients would stop the"
            " whole site: set SWIFTCMS_WS_MAX_CONNECTIONS (now %s) below --threads",
            threads, threads, limit, once=True,
        )  # fmt: skip


def _gunicorn_worker() -> Any:
    """Return the gthread worker whose thread this is, or None. It is up the stack, and only there.

    Not for every connection: a frame whose locals were looked at keeps a copy of them while it lives.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self")
        if type(found).__module__ == "gunicorn.workers.gthread" and hasattr(found, "alive"):
            return found
    return None


def _warn_of_a_short_key(settings: Settings) -> None:
    key = settings.jwt_key or b""
    length = len(key.encode() if isinstance(key, str) else key)
    if 0 < length < 32 and settings.jwt_algorithms[0].startswith("HS"):
        log(
            logging.WARNING,
            "the key that tokens are signed with has %s bytes and could be guessed; 32 are the least (RFC 7518"
            " section 3.2). Set SWIFTCMS_WS_JWT_KEY or SECRET_KEY to what this prints:"
            " python -c 'import secrets; print(secrets.token_hex())'",
            length,
        )


def _hide_token(record: logging.LogRecord) -> bool:
    """Take tokens out of an access log's line: who reads one there could sign in with it."""
    text = record.getMessage()
    if "token=" in text:
        record.msg, record.args = re.sub(r"token=[^&\s\"']*", "token=…", text), ()
    return True


def _exit_on_sigterm() -> None:
    """Make SIGTERM end the process as SIGINT does, by way of atexit, where nothing else handles it.

    Its default is sudden death, and no client would hear 1001. Gunicorn has a handler of its own.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


@atexit.register
def _close_hubs() -> None:
    for each in list(_hubs):
        each.close()


def _forget_engines() -> None:
    for each in list(_hubs):
        each.forget_engine()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_engines)

hub = Hub()
blueprint = hub.blueprint
publish = hub.publish
publish_many = hub.publish_many

# == 12. Browser: client.js, and the page of the inspector and the demo ==============================

CLIENT_JS = r"""// SwiftCMS in the browser: live events, across broken lines too.
//
//   const cms = new SwiftCMS()                    // or ({url, token}); token: a text or a function
//   const stop = cms.subscribe("content.*", "posts", event => show(event.payload))
//   cms.onstatus = status => …                    // "connecting", "online", "offline"
//   cms.ongap = subscription => …                 // too much was missed: load afresh what you show
//   const edit = cms.edit("posts", "42")          // who else edits it, and what they type
//   cms.close()
//
// There is no cms.publish(): only the site's server knows what has been saved.
(() => {
  "use strict";
  const HERE = document.currentScript?.src ?? new URL("/ws/client.js", location).href;
  const OPENING = 10_000; // milliseconds after which an attempt to connect has failed
  const PROBING = 5_000; // ... after which a line that may have died in our sleep has
  const RENEWAL = 60_000; // ... before a token runs out, to fetch the next
  const LONGEST_WAIT = 30_000; // ... between two attempts
  const PAUSE = { 1001: 1_000, 4429: 60_000 }; // ... at least, after a close with these codes
  const EDITING = ["user.editing", "user.stoppedEditing", "user.edited", "system.editing"];

  const isLater = (one, other) => { // ids are two numbers: milliseconds and a counter
    const [[ms, count], [otherMs, otherCount]] = [one, other].map(id => id.split("-").map(Number));
    return ms > otherMs || (ms === otherMs && count > otherCount);
  };
  const fits = (pattern, name) =>
    pattern === name || pattern === "*" || (pattern.endsWith(".*") && name.startsWith(pattern.slice(0, -1)));
  const call = (handler, ...values) => { // one that fails must not take the others with it
    try { handler?.(...values); } catch (error) { reportError(error); }
  };

  globalThis.SwiftCMS = class SwiftCMS {
    onstatus = null;
    ongap = null;
    onframe = null; // (way, text) => …: each frame, "in" and "out"; for an inspector
    clientId = null; // which of an entry's editors this page is
    #url; #token;
    #seen; // the id of the newest event handed over
    #subscriptions = new Set(); // {type, contentType, handler}
    #edits = new Set(); // {contentType, entryId, take}
    #socket = null;
    #status = "offline";
    #isReady = false; // greeted and signed in
    #resuming = null; // while subscriptions come back: {until, unanswered, replaying, held}
    #silence = OPENING; // milliseconds after which the line is dead
    #timers = {};
    #attempts = 0;
    #refs = 0;

    // since: the id of the newest event that the page shows already; left out: the newest there is
    constructor({ url, token, since, ...others } = {}) {
      const [unknown] = Object.keys(others);
      if (unknown !== undefined) throw new TypeError(`SwiftCMS has no option ${unknown}, but url, token and since`);
      this.#url = url === undefined ? new URL("../ws", HERE) : new URL(url, location);
      this.#url.protocol = this.#url.protocol.replace("http", "ws");
      this.#token = token;
      this.#seen = since;
      addEventListener("online", this.#hurry);
      document.addEventListener("visibilitychange", this.#hurry);
      this.#later("connect", 0, this.#connect); // once the page has set its handlers
    }

    // Has handler(event) called for each event from now on; returns a function that ends this.
    subscribe(type, contentType, handler) {
      if (typeof handler !== "function")
        throw new TypeError("subscribe(type, contentType, handler): handler must be a function");
      const own = { type, contentType, handler };
      this.#subscriptions.add(own);
      this.#send({ action: "subscribe", type, contentType }); // the same twice is one to the server
      return () => {
        this.#subscriptions.delete(own);
        const isSame = other => other.type === type && other.contentType === contentType;
        if (![...this.#subscriptions].some(isSame)) this.#send({ action: "unsubscribe", type, contentType });
      };
    }

    // Makes this page an editor of an entry, until edit.stop().
    edit(contentType, entryId) {
      const entry = { contentType, entryId: String(entryId) };
      const stops = ["user.editing", "user.stoppedEditing"].map(type => this.subscribe(type, contentType, () => {}));
      const edit = {
        editors: [], // {clientId, userId, since}, this page among them
        oneditors: null, // (editors, conflict) => …
        onchange: null, // (change, editor) => …: what another gave to edit.send()
        send: change => this.#send({ action: "editChange", ...entry, payload: change }),
        stop: () => {
          this.#edits.delete(own);
          this.#send({ action: "editStop", ...entry });
          stops.forEach(stop => stop());
        },
      };
      const own = { ...entry, take: (type, { editors, conflict, change, editor }) => {
        if (type === "user.edited") call(edit.onchange, change, editor);
        else call(edit.oneditors, (edit.editors = editors), conflict);
      } };
      this.#edits.add(own);
      this.#send({ action: "editStart", ...entry });
      return edit;
    }

    close() {
      removeEventListener("online", this.#hurry);
      document.removeEventListener("visibilitychange", this.#hurry);
      this.#subscriptions.clear();
      this.#edits.clear();
      this.#hangUp("offline");
    }

    // -- the line: connect, lose, come back --

    #connect = () => {
      this.#hangUp("connecting");
      this.#socket = new WebSocket(this.#url);
      this.#socket.onclose = ({ code }) => this.#lose(code);
      this.#socket.onmessage = ({ data }) => this.#receive(data);
      this.#later("silence", OPENING, this.#lose);
    };

    #hangUp(status) {
      Object.values(this.#timers).forEach(clearTimeout);
      this.#timers = {};
      if (this.#socket) this.#socket.onclose = this.#socket.onmessage = null;
      this.#socket?.close(); // on a dead line this takes its time; nobody waits for it
      this.#socket = this.#resuming = null;
      this.#isReady = false;
      this.#setStatus(status);
    }

    #lose = code => {
      this.#hangUp("offline");
      if (code === 1009 || (code === 4401 && typeof this.#token !== "function"))
        return console.error(`SwiftCMS: closed with ${code}; to come back with the same would not help`);
      const longest = Math.min(LONGEST_WAIT, 1_000 * 2 ** this.#attempts++);
      const wait = (PAUSE[code] ?? 0) + Math.random() * longest; // not all clients at the same moment
      this.#later(code === 4429 ? "penance" : "connect", wait, this.#connect);
    };

    // The network or the tab is back: connect at once, or find out whether the line outlived it.
    #hurry = ({ type }) => {
      if (type === "visibilitychange" && document.hidden) return;
      if (this.#timers.connect) this.#connect();
      if (!this.#isReady) return;
      this.#send({ action: "heartbeat" });
      this.#later("silence", PROBING, this.#lose);
    };

    #later(timer, milliseconds, action) {
      clearTimeout(this.#timers[timer]);
      this.#timers[timer] = setTimeout(action, milliseconds);
    }

    #setStatus(status) {
      if (status === this.#status) return;
      this.#status = status;
      queueMicrotask(() => call(this.onstatus, status)); // who closes then, finds all in order
    }

    // -- the conversation: sign in, resume, receive --

    #send(message) { // before the line is ready nothing needs to be: #resume() sends all that stands
      if (this.#isReady) this.#write(message);
    }

    #write(message) {
      const text = JSON.stringify(message);
      this.#socket.send(text);
      call(this.onframe, "out", text);
    }

    #receive(text) {
      call(this.onframe, "in", text);
      const message = JSON.parse(text);
      const { type, payload, ref, id } = message;
      const resuming = this.#resuming;
      this.#later("silence", this.#silence, this.#lose);
      if (type === "system.connected") this.#resume(payload);
      else if (type === "system.authenticated") this.#renewLater(message);
      else if (type === "system.heartbeat") {
        this.#attempts = 0; // a line that has lived for a heartbeat is a good one
        this.#send({ action: "pong" });
      } else if (type === "system.error") {
        console.error(`SwiftCMS: ${payload.message} (${payload.code})`);
        resuming?.unanswered.delete(ref);
        if (payload.action === "authenticate") this.#lose(4401);
      } else if (type === "system.subscribed" && resuming?.unanswered.delete(ref)) {
        const { type, contentType, recovered, replayed } = payload;
        resuming.replaying += replayed;
        if (!recovered && !EDITING.includes(type)) call(this.ongap, { type, contentType });
      } else if (id && resuming) {
        resuming.held.push(message);
        if (resuming.replaying) resuming.replaying--;
      } else this.#handOver(message);
      this.#endResuming();
    }

    async #signIn() {
      const socket = this.#socket;
      const token = typeof this.#token === "function" ? await this.#token() : this.#token;
      if (token && socket === this.#socket) this.#write({ action: "authenticate", token });
    }

    #renewLater({ payload, timestamp }) {
      if (typeof this.#token !== "function") return;
      const left = Date.parse(payload.expiresAt) - Date.parse(timestamp); // both by the server's clock
      const wait = Math.min(Math.max(left - RENEWAL, left * 0.8), 2 ** 31 - 1); // a timer's longest
      this.#later("renewal", wait, () => this.#signIn().catch(reportError)); // failed: 4401 will follow
    }

    async #resume({ clientId, heartbeat, lastId }) {
      const socket = this.#socket;
      this.clientId = clientId;
      this.#silence = 2_500 * heartbeat; // two, and half a one for being late
      this.#later("silence", this.#silence, this.#lose);
      const signedIn = await this.#signIn().then(() => true, error =>
        console.error("SwiftCMS: no token came, and it will be asked for again:", error));
      if (socket !== this.#socket) return; // lost meanwhile
      if (!signedIn) return this.#lose();
      this.#isReady = true;
      this.#seen ??= lastId;
      this.#resuming = { until: lastId, unanswered: new Set(), replaying: 0, held: [] };
      const each = new Map([...this.#subscriptions].map(one => [`${one.type} ${one.contentType}`, one]));
      for (const { type, contentType } of each.values()) {
        this.#resuming.unanswered.add(++this.#refs);
        this.#send({ action: "subscribe", type, contentType, since: this.#seen, ref: this.#refs });
      }
      for (const { contentType, entryId } of this.#edits)
        this.#send({ action: "editStart", contentType, entryId });
      this.#endResuming();
    }

    // Replays come one subscription after the other, so that only together are they in order.
    #endResuming() {
      if (!this.#resuming || this.#resuming.replaying || this.#resuming.unanswered.size) return;
      const { until, held } = this.#resuming;
      this.#resuming = null;
      held.sort((one, other) => isLater(one.id, other.id) ? 1 : -1);
      for (const event of held) this.#handOver(event);
      if (!held.length || isLater(until, this.#seen)) this.#seen = until;
      if (this.#isReady) this.#setStatus("online");
    }

    #handOver(event) {
      const { type, contentType, payload } = event;
      if (EDITING.includes(type))
        for (const edit of [...this.#edits])
          if (edit.contentType === contentType && edit.entryId === payload.entryId) edit.take(type, payload);
      if (type.startsWith("system.")) return;
      for (const each of [...this.#subscriptions])
        if (this.#subscriptions.has(each) && fits(each.type, type) && fits(each.contentType, contentType))
          call(each.handler, event);
      this.#seen = event.id ?? this.#seen;
    }
  };
})();
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ "SwiftCMS demo" if demo else "WebSocket inspector" }}</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: light-dark(#fff, #11161c); --panel: light-dark(#eef2f7, #1c242d);
  --ink: light-dark(#111, #f3f5f7); --quiet: light-dark(#47525e, #b6c2cf);
  --edge: light-dark(#7d8b9a, #71808f); --notice: light-dark(#fff1b8, #453800);
  --in: light-dark(#00458f, #93c7ff); --out: light-dark(#8a3a00, #ffbd80);
  --good: light-dark(#005c2a, #7ce8a6); --bad: light-dark(#a3001b, #ffa3a3);
}
html { font-size: clamp(100%, 1.15vw, 180%); } /* a projector is wide: let it show large */
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--ink); font: 1.2rem/1.35 system-ui, sans-serif; }
main { display: grid; gap: 1.5rem; padding: 1rem; }
section { min-width: 0; }
ul, ol { padding: 0; list-style: none; }
.entries { margin-bottom: .7rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.3rem; }
.row, .row > span { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: end; }
.row { margin-bottom: .7rem; }
header.row, .tools { align-items: center; }
header.row > :first-child { flex: 1; }
label { display: grid; flex: 1 1 8rem; color: var(--quiet); font-size: 1rem; }
label.wide { flex-basis: 100%; }
label.check { display: flex; flex: none; gap: .4rem; align-items: center; }
input, select, textarea, button {
  min-width: 0; border: 2px solid var(--edge); border-radius: 6px;
  background: var(--ground); color: var(--ink); font: inherit;
}
label > :not([type=checkbox]) { padding: .35rem .5rem; font-size: 1.2rem; }
[type=checkbox] { width: 1.3rem; height: 1.3rem; }
textarea { resize: vertical; }
button { padding: .35rem .8rem; border-color: var(--in); color: var(--in); font-weight: 600; }
button:hover, [aria-pressed=true] { background: var(--panel); }
:focus-visible { outline: 4px solid var(--out); outline-offset: 2px; }
.state { font-weight: 700; color: var(--out); }
.online, .published { color: var(--good); }
.offline { color: var(--bad); }
#log { height: 60vh; overflow: auto; padding: .5rem; background: var(--panel); border-radius: .4rem; }
#log li { margin-bottom: .6rem; padding-left: .6rem; border-left: 5px solid; font-family: monospace; }
#log code { display: block; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
#log .in { color: var(--in); } #log .out { color: var(--out); } #log .note { color: var(--quiet); }
#log.calm .heartbeat { display: none; }
.entries li {
  display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; justify-content: space-between;
  padding: .4rem 0; border-top: 1px solid var(--edge);
}
.entries small { display: block; color: var(--quiet); font-size: 1rem; }
#editor, #typing li, .notice { padding: .5rem .7rem; margin-bottom: .7rem; border-radius: .4rem; }
#editor { background: var(--panel); }
#typing li { background: var(--ground); }
#typing li, #theirs { white-space: pre-wrap; overflow-wrap: anywhere; }
.notice { background: var(--notice); }
.notice:empty { display: none; }
.name { padding: 0 .5rem; border-radius: 1rem; color: #fff; font-weight: 600; }
@media (min-width: 70rem) and (min-height: 40rem) {
  main { height: 100vh; grid-auto-flow: column; grid-auto-columns: 1fr; }
  main > section { overflow: auto; padding: 5px; }
  #inspector { display: flex; flex-direction: column; }
  #log { flex: 1; min-height: 15rem; }
}
</style>
</head>
<body>
<main>
{% if demo %}
<section aria-labelledby="cms">
  <header class="row">
    <h1 id="cms">A tiny CMS</h1>
    <output id="line" class="state"></output>
    <button id="cut">Cut the line</button>
  </header>
  <form id="sign-in" class="row" autocomplete="off">
    <label>You are (in this half) <input name="user" required maxlength="40" pattern=".*\S.*"></label>
    <button>Sign in</button>
  </form>
  <p id="news" class="notice" role="status"></p>
  <ul id="notices" role="log" aria-label="Notices to you"></ul>
  <form id="editor" autocomplete="off" hidden>
    <p id="editors" class="row" role="status"></p>
    <div class="row">
      <label class="wide">Title <input name="title" required maxlength="200"></label>
      <label class="wide">Text <textarea name="body" rows="3" maxlength="10000"></textarea></label>
      <button>Save</button> <button type="button" id="leave">Close</button>
    </div>
    <div id="conflict" class="notice" role="alert" hidden>
      <p id="refusal"></p>
      <p id="theirs"></p>
      <button type="button" id="take">Take theirs</button> <button type="button" id="keep">Keep mine</button>
    </div>
    <ul id="typing" aria-label="What others are typing"></ul>
  </form>
  <form id="create" class="row" autocomplete="off">
    <label>New
      <select name="contentType"><option value="posts">post<option value="pages">page</select>
    </label>
    <label>Title <input name="title" required maxlength="200"></label>
    <button>Create</button>
  </form>
  <h2>Posts</h2>
  <ul id="posts" class="entries"></ul>
  <h2>Pages</h2>
  <ul id="pages" class="entries"></ul>
  <form id="tell" class="row" autocomplete="off">
    <label>Tell <input name="to" value="ana" required maxlength="40"></label>
    <label>that <input name="text" required maxlength="500"></label>
    <button>Tell</button>
  </form>
</section>
{% endif %}
<section id="inspector" aria-labelledby="wire">
  <header class="row">
    <h1 id="wire">{{ "The wire" if demo else "WebSocket inspector" }}</h1>
    <output id="state" class="state"></output>
    <button id="toggle">Connect</button>
  </header>
  <form id="subscriptions" class="row" autocomplete="off">
    <label>type <input name="type" value="content.*"></label>
    <label>contentType <input name="contentType" value="posts"></label>
    <label>since <input name="since" placeholder="an id"></label>
    <span><button value="subscribe">Subscribe</button> <button value="unsubscribe">Unsubscribe</button></span>
  </form>
  <form id="sign" class="row" autocomplete="off">
    {% if demo %}
    <label>name <input id="whose" value="ana"></label>
    <button type="button" id="get-token">Get token</button>
    {% endif %}
    <label>token <input name="token" required></label>
    <button>Authenticate</button>
  </form>
  <form id="free" class="row" autocomplete="off">
    <label>any message <input name="text" list="examples" placeholder='{"action": …}'></label>
    <datalist id="examples">
      <option>{"action": "heartbeat", "ref": 1}
      <option>{"action": "subscribe"}
      <option>{"action": "unsubscribe"}
      <option>{"action": "presence"}
      <option>{"action": "editStart", "contentType": "posts", "entryId": "1"}
      <option>{"action": "subscrbe"}
      <option>{"action": "subscribe", "type": "con*"}
      <option>this is not JSON
    </datalist>
    <button>Send</button>
  </form>
  <div class="row tools">
    {% if demo %}
    <label class="check"><input type="checkbox" id="both"> client.js too</label>
    {% endif %}
    <label class="check"><input type="checkbox" id="calm"> no heartbeats</label>
    <button id="pause" aria-pressed="false">Pause</button>
    <button id="clear">Clear</button>
  </div>
  <ol id="log" role="log" aria-label="Frames" tabindex="0"></ol>
</section>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);
const make = (tag, properties, ...children) => { // a child that is a text stays one: it is no markup
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const on = (id, type, action) => $(id).addEventListener(type, action);
const onSubmit = (id, action) => on(id, "submit", event => {
  event.preventDefault();
  action(Object.fromEntries(new FormData(event.target)), event);
});
const showState = (id, state) => Object.assign($(id), { textContent: state, className: `state ${state}` });

// -- The inspector: a plain WebSocket, and all that goes over it ------------------------------------

const MOST_FRAMES = 500;
const LONGEST_FRAME = 1_000; // characters that are shown without a click
const WAYS = { in: "← in", out: "→ out", note: "•" };
const CLOSE_CODES = { // that come without a reason
  1000: "closed as asked",
  1005: "closed without a code",
  1006: "no close frame came: the line broke, or never stood",
};
const address = new URL({{ ws_url | tojson }}, location);
address.protocol = address.protocol.replace("http", "ws");
let socket = null;
let fresh = []; // frames to show when the browser draws next: one by one, a burst of them would jam it
let isPaused = false;

const embolden = text => text.split(/("(?:action|type)": ?"[^"]*")/)
  .map((part, index) => index % 2 ? make("b", {}, part) : part);

function log(way, text, whose = "") {
  const now = new Date();
  const time = `${now.toTimeString().slice(0, 8)}.${String(now.getMilliseconds()).padStart(3, "0")}`;
  const code = make("code", {}, ...embolden(text.slice(0, LONGEST_FRAME)));
  const frame = make("li", { className: way }, make("time", {}, `${WAYS[way]} ${time} ${whose}`), code);
  frame.classList.toggle("heartbeat", /"(system\.heartbeat|pong)"/.test(text));
  if (text.length > LONGEST_FRAME) {
    const showAll = () => code.replaceChildren(...embolden(text));
    code.append(make("button", { onclick: showAll }, `… ${text.length - LONGEST_FRAME} characters more`));
  }
  fresh.push(frame);
  if (fresh.length > MOST_FRAMES) fresh.shift();
  if (fresh.length === 1) requestAnimationFrame(showFresh); // once: a page that is hidden is not drawn for hours
}

function showFresh() {
  if (isPaused || !fresh.length) return;
  const list = $("log");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.append(...fresh);
  fresh = [];
  while (list.children.length > MOST_FRAMES) list.firstChild.remove();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

function connect() {
  const showLine = () => {
    const state = ["connecting", "online", "closing", "offline"][socket.readyState];
    showState("state", state);
    $("toggle").textContent = state === "offline" ? "Connect" : "Disconnect";
  };
  log("note", `connecting to ${address}`);
  socket = new WebSocket(address);
  socket.onopen = showLine;
  socket.onmessage = ({ data }) => log("in", data);
  socket.onclose = ({ code, reason }) => {
    log("note", `closed with ${code}: ${reason || CLOSE_CODES[code] || "see RFC 6455 section 7.4"}`);
    showLine();
  };
  showLine();
}

function send(message) {
  const text = typeof message === "string" ? message : JSON.stringify(message);
  if (socket.readyState !== WebSocket.OPEN) return log("note", "not sent: connect first");
  socket.send(text);
  log("out", text);
}

onSubmit("subscriptions", (fields, { submitter }) => {
  const given = Object.entries(fields).filter(([, value]) => value); // what is left empty is left out
  send({ action: submitter.value, ...Object.fromEntries(given) });
});
onSubmit("sign", ({ token }) => send({ action: "authenticate", token }));
onSubmit("free", ({ text }) => send(text));
on("toggle", "click", () => socket.readyState < WebSocket.CLOSING ? socket.close(1000) : connect());
on("calm", "change", ({ target }) => $("log").classList.toggle("calm", target.checked));
on("clear", "click", () => $("log").replaceChildren());
on("pause", "click", ({ target }) => {
  isPaused = !isPaused;
  target.ariaPressed = isPaused;
  showFresh();
});
connect();
log("note", "to see events, subscribe");
</script>
{% if demo %}
<script src="{{ client_js_url }}"></script>
<script>
"use strict";
// -- The demo: a CMS whose lists change by events alone, even after what is done here ---------------

const lineName = Math.random().toString(36).slice(2); // by which the server can cut it
const rows = new Map(); // "posts/7" -> {entry, element, …}
const deleted = new Set(); // keys that a late answer must not bring back
let cms, user, token;
let opened = null; // in the editor: {key, version, theirs, presence, typed, cameFrom}

const say = text => { $("news").textContent = text; };
const attempt = action => async (...values) => {
  try { await action(...values); } catch (error) { say(error.message); }
};

async function api(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(`/api/${path}`, { method, headers, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.message), answer);
  return answer;
}
const getToken = async name => (await api("GET", `token?user=${encodeURIComponent(name)}`)).token;

function signIn(name) {
  leave();
  cms?.close();
  user = sessionStorage.user = $("sign-in").elements.user.value = name;
  cms = new SwiftCMS({
    url: `{{ ws_url }}?line=${lineName}`,
    token: async () => (token = await getToken(user)),
  });
  let isFirst = true, hasGap = false, replayed = 0;
  cms.subscribe("content.*", "*", event => { replayed++; take(event); });
  cms.subscribe("notification", "users", event => { replayed++; notify(event.payload); });
  cms.ongap = () => { hasGap = true; };
  cms.onframe = (way, text) => { if ($("both").checked) log(way, text, "client.js"); };
  cms.onstatus = state => {
    showState("line", state);
    if (state === "offline") {
      replayed = 0; // what is handed over from now until the line is back, is replayed
      say("The line is down. What happens now will be here once it is back.");
    } else if (state === "online") {
      if (isFirst || hasGap) load();
      const what = `${replayed} event${replayed === 1 ? "" : "s"} replayed.`;
      say(isFirst ? "" : `Line back: ${hasGap ? "too much was missed, so all is loaded afresh." : what}`);
      isFirst = hasGap = false;
    }
  };
}

// -- lists --

const load = attempt(async () => {
  for (const { element } of rows.values()) element.remove();
  rows.clear();
  deleted.clear();
  for (const contentType of ["posts", "pages"])
    for (const entry of await api("GET", contentType)) put(contentType, entry);
});

function take({ type, contentType, payload: entry }) {
  const key = `${contentType}/${entry.id}`;
  if (type === "content.deleted") {
    rows.get(key)?.element.remove();
    rows.delete(key);
    deleted.add(key);
  } else {
    put(contentType, entry);
    rows.get(key)?.element.animate([{ background: "var(--notice)" }, {}], 3_000);
  }
}

function put(contentType, entry) {
  const key = `${contentType}/${entry.id}`;
  if (deleted.has(key) || rows.get(key)?.entry.version > entry.version) return;
  if (!rows.has(key)) addRow(contentType, key);
  const row = rows.get(key);
  row.entry = entry;
  row.title.textContent = `${entry.title} `;
  row.state.textContent = entry.state;
  row.state.className = `state ${entry.state}`;
  row.about.textContent = `version ${entry.version}, by ${entry.updated_by}`;
}

function addRow(contentType, key) {
  const button = (label, action) => make("button", { onclick: attempt(action) }, label);
  const row = { title: make("b"), state: make("span"), about: make("small") };
  row.element = make("li", {},
    make("div", {}, row.title, row.state, row.about),
    make("div", {},
      button("Edit", () => openEditor(key, row.entry)), " ",
      button("Publish", () => api("POST", `${key}/publish`, {})), " ",
      button("Delete", () => api("DELETE", key))));
  rows.set(key, row);
  $(contentType).prepend(row.element);
}

// -- the editor --

function openEditor(key, entry) {
  leave();
  const presence = cms.edit(...key.split("/"));
  opened = { key, presence, typed: new Map(), cameFrom: document.activeElement };
  presence.oneditors = showOthers;
  presence.onchange = (change, { clientId }) => {
    const isText = typeof change?.title === "string"; // somebody may try others from the inspector
    opened.typed.set(clientId, isText ? `${change.title}\n${change.body}` : JSON.stringify(change));
    showOthers();
  };
  showOthers();
  fill(entry);
  $("editor").hidden = false;
  $("editor").elements.title.focus();
}

function leave() {
  if (!opened) return;
  opened.presence.stop();
  $("editor").hidden = true;
  opened.cameFrom.focus();
  opened = null;
}

function fill(entry) {
  opened.version = entry.version;
  $("editor").elements.title.value = entry.title;
  $("editor").elements.body.value = entry.body;
  $("conflict").hidden = true;
}

const written = () => Object.fromEntries(new FormData($("editor")));

const save = attempt(async () => {
  try {
    await api("PUT", opened.key, { ...written(), version: opened.version });
    leave();
  } catch (error) {
    if (!error.entry) throw error;
    opened.theirs = error.entry;
    $("refusal").textContent = `Not saved: ${error.message}. It says:`;
    $("theirs").textContent = `${error.entry.title}\n${error.entry.body}`;
    $("conflict").hidden = false;
  }
});

const nameOf = ({ userId, clientId }) => {
  const hue = parseInt(clientId.slice(-4), 16) % 360;
  return make("span", { className: "name", style: `background: hsl(${hue} 70% 28%)` }, userId ?? "somebody");
};

function showOthers() {
  const others = opened.presence.editors.filter(({ clientId }) => clientId !== cms.clientId);
  $("editors").className = others.length ? "notice row" : "row";
  $("editors").replaceChildren(...others.length
    ? ["Also editing this:", ...others.map(nameOf), "Who saves second will be asked."]
    : ["Nobody else is editing this."]);
  const typing = others.filter(({ clientId }) => opened.typed.has(clientId));
  $("typing").replaceChildren(...typing.map(other =>
    make("li", {}, nameOf(other), ` is typing:\n${opened.typed.get(other.clientId)}`)));
}

onSubmit("editor", save);
on("editor", "input", () => opened.presence.send(written()));
on("leave", "click", leave);
on("take", "click", () => { fill(opened.theirs); opened.presence.send(written()); });
on("keep", "click", () => { opened.version = opened.theirs.version; save(); });

// -- the rest --

function notify({ from, text }) {
  $("notices").prepend(make("li", { className: "notice" }, make("b", {}, from), ` tells you: ${text}`));
  while ($("notices").children.length > 3) $("notices").lastChild.remove();
}

onSubmit("sign-in", ({ user: name }) => signIn(name));
onSubmit("create", attempt(async ({ contentType, title }, { target }) => {
  await api("POST", contentType, { title });
  target.elements.title.value = "";
}));
onSubmit("tell", attempt(async ({ to, text }, { target }) => {
  await api("POST", "notices", { to, text });
  target.elements.text.value = "";
  say(`Told ${to}, in every window where ${to} is signed in.`);
}));
on("cut", "click", attempt(async () => {
  const { seconds } = await api("POST", "cut", { line: lineName });
  say(`The line is cut for ${seconds} seconds. What happens now will be here once it is back.`);
}));
on("get-token", "click", attempt(async () => {
  $("sign").elements.token.value = await getToken($("whose").value);
}));
signIn(sessionStorage.user ?? ["ana", "ben", "cleo", "dario", "eva"][Math.floor(Math.random() * 5)]);
</script>
{% endif %}
</body>
</html>
"""


def render_page(*, demo: bool) -> str:
    """Return the inspector: alone for GET /ws, or beside the demo's CMS."""
    return render_template_string(
        PAGE,
        demo=demo,
        ws_url=url_for("swiftcms_ws.about") if demo else request.root_path + request.path,
        client_js_url=url_for("swiftcms_ws.client_js") if demo else None,
    )


# == 13. Demo and command line =======================================================================

DEMO_CONTENT = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- so that none is used twice
    content_type TEXT NOT NULL,
    title TEXT NOT NULL,
    body TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'draft',
    version INTEGER NOT NULL DEFAULT 1,
    updated_by TEXT NOT NULL DEFAULT 'SwiftCMS'
);
INSERT INTO entries (content_type, title, body, state) SELECT * FROM (VALUES
    ('posts', 'Hello, class', 'Open this page in a second window and change something.', 'published'),
    ('posts', 'Nothing is lost', 'Cut the line, change something elsewhere, and wait.', 'draft'),
    ('pages', 'About us', 'We are the ones on the other end of the wire.', 'published')
) WHERE NOT EXISTS (SELECT 1 FROM entries);
"""
DEMO_LENGTHS = {"title": 200, "body": 10_000, "line": 40, "to": 40, "user": 40, "text": 500}
DEMO_CUT_SECONDS = 5.0


class DemoEntries:
    """The demo's posts and pages. What changes one commits, and only then publishes."""

    def __init__(self, path: str) -> None:
        # SQLite's connection is for one thread at a time. Held until the event is published, too, so
        # that events come in the order of their commits.
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.executescript(DEMO_CONTENT)

    def all(self, content_type: str) -> list[dict[str, Any]]:
        columns = "id, title, body, state, version, updated_by"
        query = f"SELECT {columns} FROM entries WHERE content_type = ? ORDER BY id"
        with self._lock:
            return [dict(row) for row in self._db.execute(query, [content_type])]

    def get(self, content_type: str, entry_id: int) -> dict[str, Any]:
        for entry in self.all(content_type):
            if entry["id"] == entry_id:
                return entry
        abort(404, f"there is no {content_type}/{entry_id}, or not any more")

    def create(self, content_type: str, title: str, body: str, user: str) -> dict[str, Any]:
        values = [content_type, title, body, user]
        with self._lock:
            with self._db:
                self._db.execute(
                    "INSERT INTO entries (content_type, title, body, updated_by) VALUES (?, ?, ?, ?)", values
                )
            entry = self.all(content_type)[-1]
            publish("content.created", content_type, entry)
            return entry

    def change(
        self, event_type: str, content_type: str, entry_id: int, version: int | None = None, **values: str
    ) -> dict[str, Any]:
        """Give an entry new values; answer 409 where it is not at `version` any more."""
        with self._lock:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")  # another demo may share the file
                entry = self.get(content_type, entry_id)
                if version is not None and version != entry["version"]:
                    message = f"{entry['updated_by']} has saved version {entry['version']} since you opened this"
                    abort(make_response({"message": message, "entry": entry}, 409))
                entry |= {**values, "version": entry["version"] + 1}
                self._db.execute(
                    "UPDATE entries SET title = :title, body = :body, state = :state, version = :version,"
                    " updated_by = :updated_by WHERE id = :id",
                    entry,
                )
            publish(event_type, content_type, entry)
            return entry

    def delete(self, content_type: str, entry_id: int) -> dict[str, Any]:
        with self._lock:
            entry = self.get(content_type, entry_id)
            with self._db:
                self._db.execute("DELETE FROM entries WHERE id = ?", [entry_id])
            publish("content.deleted", content_type, entry)
            return entry


def _given(name: str, default: str | None = None) -> str:
    """Return a text of the request's JSON object, or of a GET's query; anything else is a 400."""
    given = request.args if request.method == "GET" else request.get_json()
    value = given.get(name, default) if isinstance(given, Mapping) else None
    shortest, longest = 0 if default is not None else 1, DEMO_LENGTHS[name]
    if not isinstance(value, str) or not shortest <= len(value.strip()) <= longest:
        abort(400, f"`{name}` must be a text of {shortest} to {longest} characters")
    return value.strip()


def demo_app(redis_url: str | None = None) -> Flask:
    """Return a tiny CMS with a REST API, whose pages show each other what happens."""
    app = Flask(__name__)
    # A key of its own, so that nothing from elsewhere is signed in here.
    app.config.update(SWIFTCMS_WS_JWT_KEY=secrets.token_hex(), SWIFTCMS_WS_INSPECTOR=True)
    app.config["SWIFTCMS_WS_REDIS_URL"] = redis_url
    app.json.sort_keys = False  # type: ignore[attr-defined]  # a frame is easier to read as written
    app.register_blueprint(blueprint)
    settings = Settings.from_config(app.config)
    # In memory; or, for all demos that run on one Redis, in a file that they share.
    shared = Path(tempfile.gettempdir(), f"swiftcms-ws-demo-{zlib.crc32((redis_url or '').encode())}.sqlite")
    entries = DemoEntries(str(shared) if redis_url else ":memory:")
    entry_url = "/api/<any(posts, pages):content_type>/<int:entry_id>"

    def user() -> str:
        """Return who makes this request, by the token that the page has for its socket."""
        if request.authorization is None:
            return "nobody"
        try:
            return check_token(settings, request.authorization.token or "").id
        except ClientError as error:
            abort(401, str(error))

    @app.errorhandler(HTTPException)
    def sentence(error: HTTPException) -> ResponseReturnValue:
        return {"message": error.description}, error.code or 500

    @app.get("/")
    def page() -> ResponseReturnValue:
        return render_page(demo=True)

    @app.get("/api/<any(posts, pages):content_type>")
    def list_entries(content_type: str) -> ResponseReturnValue:
        return entries.all(content_type)

    @app.post("/api/<any(posts, pages):content_type>")
    def create_entry(content_type: str) -> ResponseReturnValue:
        return entries.create(content_type, _given("title"), _given("body", ""), user()), 201

    @app.get(entry_url)
    def get_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        return entries.get(content_type, entry_id)

    @app.put(entry_url)
    def update_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        values = {"title": _given("title"), "body": _given("body", ""), "updated_by": user()}
        version = request.get_json().get("version")
        if not isinstance(version, int):
            abort(400, "`version` must be the number of the version that you have changed")
        return entries.change("content.updated", content_type, entry_id, version, **values)

    @app.delete(entry_url)
    def delete_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        user()
        return entries.delete(content_type, entry_id)

    @app.post(f"{entry_url}/publish")
    def publish_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        request.get_json()  # a form of another site cannot send any
        return entries.change(
            "content.published", content_type, entry_id, state="published", updated_by=user()
        )

    @app.get("/api/token")
    def token() -> ResponseReturnValue:
        # Whoever asks may be anyone: a class has no passwords. A site asks its own login instead.
        return {"token": hub.issue_token(_given("user"))}

    @app.post("/api/notices")
    def notify() -> ResponseReturnValue:
        recipient = _given("to")
        notice = {"from": user(), "text": _given("text")}
        return {"id": publish("notification", "users", notice, to=recipient)}, 201

    _let_lines_be_cut(app)
    return app


def _let_lines_be_cut(app: Flask) -> None:
    """Let a page that names its line, /ws?line=NAME, have it broken and kept down for a while."""
    sockets: weakref.WeakValueDictionary[str, socket.socket] = weakref.WeakValueDictionary()
    down_until: dict[str, float] = {}

    @app.before_request
    def hold_handshakes() -> None:
        line, sock = request.args.get("line"), request.environ.get("werkzeug.socket")
        if line and sock and request.endpoint == "swiftcms_ws.websocket":
            time.sleep(max(0.0, down_until.pop(line, 0.0) - time.monotonic()))
            sockets[line] = sock

    @app.post("/api/cut")
    def cut() -> ResponseReturnValue:
        line = _given("line")
        sock = sockets.get(line)
        if sock is None:
            abort(404, "there is no such line, or it is down already")
        down_until[line] = time.monotonic() + DEMO_CUT_SECONDS
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # no close frame, as when a cable is pulled
        return {"seconds": DEMO_CUT_SECONDS}


def serve_demo(options: argparse.Namespace) -> int:
    host, port, debug = options.host, options.port, options.debug
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("werkzeug").setLevel(level)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "another program has it; choose another with --port" if is_taken else str(error)
        print(f"swiftcms-ws cannot listen on {host} port {port}: {why}", file=sys.stderr)
        return 1
    app = demo_app(options.redis)
    app.debug = debug
    with listener:
        server = make_server(
            host, port, DebuggedApplication(app) if debug else app, threaded=True, fd=listener.fileno()
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server as Ctrl+C does
    shown_host = f"[{host}]" if ":" in host else host
    print(f"SwiftCMS demo: http://{shown_host}:{server.port}/ (Ctrl+C ends it)", flush=True)
    try:
        hub.last_id()  # starts the hub, so that a Redis that is away is told of now
        server.serve_forever()
    finally:
        hub.close()
    return 0


REPLY_SECONDS = 10.0  # for a server to answer a command line
LONG_SECONDS = 75.0  # longer than nginx's time-out of 60
LINE_FAULTS = (OSError, simple_websocket.ConnectionError, simple_websocket.ConnectionClosed, ProtocolError)
CURES = {  # by the HTTP status that a handshake is refused with; 0: it did not come so far
    0: "Does the site run, and is this the port? A proxy must pass Upgrade and Connection on (see README).",
    401: "The token in the address is not one of this site's.",
    403: "Pages of this site may not connect: let the proxy pass the Host header on, or set SWIFTCMS_WS_ORIGINS.",
    404: "Is this the address, with its path? With a url_prefix it is …/prefix/ws.",
    426: "A proxy drops the headers Upgrade and Connection (see README).",
    500: "The site failed, or the proxy does not reach it: their logs say why.",
    501: f"The web server cannot hold WebSockets: {SERVERS_THAT_CAN}.",
    503: "All of SWIFTCMS_WS_MAX_CONNECTIONS are taken: raise it, and the web server's threads above it.",
}
CROWD = 20  # clients that check() is at once


def websocket_url(text: str) -> str:
    """Return an address as a client needs it; people leave out the path, or copy one with http."""
    scheme, _, rest = text.rpartition("://")
    host, slash, path = rest.partition("/")
    secure = "s" if scheme in ("https", "wss") else ""
    return f"ws{secure}://{host}/{path if slash and path else 'ws'}"


class Line(simple_websocket.Client):  # type: ignore[misc]
    """A client's line, whose handshake does not wait for ever."""

    def handshake(self) -> None:
        self.sock.settimeout(REPLY_SECONDS)
        super().handshake()
        self.sock.settimeout(None)  # the library takes a time-out for the end


def open_line(url: str, **headers: str) -> tuple[Line, dict[str, Any]]:
    """Connect as a client; return the line, and the payload of its greeting. Raises one of LINE_FAULTS."""
    line = Line(url, headers=headers, thread_class=functools.partial(threading.Thread, daemon=True))
    # The library overlooks what came in one piece with the handshake's answer until more comes: a pong.
    line.sock.send(line.ws.send(Ping()))
    greeting = line.receive(REPLY_SECONDS)
    if not isinstance(greeting, str) or '"system.connected"' not in greeting:
        hang_up(line)
        raise OSError("it is a WebSocket, but no swiftcms-ws: that one would greet us")
    return line, json.loads(greeting)["payload"]


def hang_up(line: Line) -> None:
    with suppress(*LINE_FAULTS):  # it is down already
        line.close()


def status_of(error: BaseException) -> int:
    """Return the HTTP status that a handshake was refused with, or 0."""
    return int(getattr(error, "status_code", None) or 0)


def cure_of(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return (
            "Each WebSocket holds a thread of the web server: are all taken? Give it more (gunicorn: --threads),"
            " and set SWIFTCMS_WS_MAX_CONNECTIONS below that, or enough visitors stop the whole site."
        )
    status = status_of(error)
    return CURES.get(status, CURES[404 if status < 500 else 500])


def listen(options: argparse.Namespace) -> int:
    """Print events until Ctrl+C, across broken lines; return 1 where coming back would not help."""
    last_id = None
    pause = 1.0
    while True:
        try:
            line, greeting = open_line(options.url)
            patience = MISSED_HEARTBEATS * greeting["heartbeat"] + REPLY_SECONDS
            if options.token is not None:
                line.send(json.dumps({"action": "authenticate", "token": options.token}))
            last_id = last_id or greeting["lastId"]
            wish = {"type": options.type, "contentType": options.content_type, "since": last_id}
            line.send(json.dumps({"action": "subscribe", **wish}))
            while (data := line.receive(patience)) is not None:
                message = json.loads(data)
                if message["type"] == "system.error":
                    print(message["payload"]["message"], file=sys.stderr)
                    if message["payload"]["code"] != "rate_limited":
                        return 1
                elif message["type"] == "system.heartbeat":
                    line.send('{"action": "pong"}')
                    pause = 1.0
                elif message["type"] == "system.subscribed":
                    print(f"listening to {options.url}", file=sys.stderr)
                    if not message["payload"]["recovered"]:
                        print("some events were missed, and cannot be had any more", file=sys.stderr)
                elif "id" in message:
                    print(data, flush=True)
                    last_id = message["id"]
            why = "nothing was heard for too long"
        except LINE_FAULTS as error:
            why = str(error)
            if getattr(error, "reason", None) in (CloseCode.SIGN_IN_AGAIN, CloseCode.MESSAGE_TOO_BIG):
                print(why, file=sys.stderr)
                return 1
            if status_of(error) not in (0, 502, 503, 504):  # those pass
                print(f"no handshake with {options.url}: {why}\n{cure_of(error)}", file=sys.stderr)
                return 1
        print(f"no line to {options.url} ({why}); trying again", file=sys.stderr)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, 30.0)


def print_token(options: argparse.Namespace) -> int:
    key = os.environ.get(f"{CONFIG_PREFIX}JWT_KEY") or os.environ.get("SECRET_KEY")
    if not key or len(key.encode()) < 32:
        print("set SWIFTCMS_WS_JWT_KEY or SECRET_KEY, in the environment, to the site's key", file=sys.stderr)
        print(f"(of 32 bytes or more: it has {len(key.encode())})" if key else "(there is none)", file=sys.stderr)
        return 1
    if not options.user or options.expires_in <= 0:
        print("the user's id must not be empty, and --expires-in be more than 0 seconds", file=sys.stderr)
        return 1
    print(sign_token(Settings(jwt_key=key), options.user, time.time(), options.expires_in, {}))
    return 0


def check(options: argparse.Namespace) -> int:
    """Print a tick or a cross, with the cure, for each thing that goes wrong with deployments; 1 for a cross."""
    is_well = True
    for is_right, what, cure in examine(options.url, options.long):
        print(f"✓ {what}" if is_right else f"✗ {what}\n    {cure}", flush=True)
        is_well = is_well and is_right
    return 0 if is_well else 1


Finding = tuple[bool, str, str]  # is it right, what, and the cure if it is not


def examine(url: str, is_long: bool) -> Iterator[Finding]:
    """Try all that goes wrong with deployments; end at once where there is nobody to try it with."""
    try:
        line, _ = open_line(url)
    except LINE_FAULTS as error:
        yield False, f"no handshake with {url}: {error}", cure_of(error)
        return
    yield True, "the handshake, and a greeting", ""
    yield from _examine_refusals(url)
    yield from _examine_a_crowd(url)
    if is_long:
        cure = "A proxy cuts silent lines: raise its time-out, or lower SWIFTCMS_WS_HEARTBEAT below it."
        yield _lives_on(line), f"a line that sends nothing lives for {LONG_SECONDS:g} seconds", cure
    yield _is_closing_answered(line), "closing is answered", "Something on the way swallows close frames."


def _examine_refusals(url: str) -> Iterator[Finding]:
    """Come as a page of the site, as one of another, and with a bad token."""

    def answer(url: str, **headers: str) -> int:
        """Return 101, or the HTTP status that the handshake is refused with."""
        try:
            hang_up(open_line(url, **headers)[0])
        except LINE_FAULTS as error:
            return status_of(error)
        return 101

    parts = urlsplit(url)  # without the port, which the library leaves out of its Host, too
    own = f"{parts.scheme.replace('ws', 'http')}://{parts.hostname}"
    yield answer(url, Origin=own) == 101, f"a page of {own} may connect", CURES[403]
    cure = "Pages of any site may connect with your visitors' cookies: set SWIFTCMS_WS_ORIGINS."
    yield answer(url, Origin="https://swiftcms-ws-check.example") == 403, "a foreign page is refused", cure
    has_query = "&" if "?" in url else "?"
    cure = "A bad token should be a 401. Does a proxy drop the query?"
    yield answer(f"{url}{has_query}token=bad") == 401, "a bad token is refused", cure


def _examine_a_crowd(url: str) -> Iterator[Finding]:
    """Be many clients at once: are all let in?"""
    with ThreadPoolExecutor(CROWD) as pool:
        attempts = [pool.submit(open_line, url) for _ in range(CROWD)]
    faults = [fault for attempt in attempts if (fault := attempt.exception())]
    crowd = [attempt.result() for attempt in attempts if not attempt.exception()]
    count = "all" if not faults else f"{len(crowd)}, beside this one,"
    yield not faults, f"of {CROWD} clients at once {count} are let in", cure_of(faults[0]) if faults else ""
    yield from _examine_processes(crowd)
    for line, _ in crowd:
        hang_up(line)


def _examine_processes(crowd: list[tuple[Line, dict[str, Any]]]) -> Iterator[Finding]:
    """Find out whether all server processes that some of many clients are with have the same events."""
    one_each = list({hello["clientId"][:PROCESS_LENGTH]: (line, hello["lastId"]) for line, hello in crowd}.values())
    neighbours = zip(one_each, one_each[1:] + one_each[:1], strict=True)  # each process, and the next
    known = [_is_known(line, last_id) for (line, _), (_, last_id) in neighbours]
    seen = f"server processes seen: {len(known)}"
    if None in known:
        cure = "Does Redis run, and is SWIFTCMS_WS_REDIS_URL right? The site's log has more."
        yield False, f"{seen}; without their Redis, and so an event reaches nobody", cure
    elif known:
        cure = "Set SWIFTCMS_WS_REDIS_URL, or run one process with threads."
        reached = "the clients of all of them" if all(known) else "only the clients of one"
        yield all(known), f"{seen}; an event reaches {reached}", cure


def _is_known(line: Line, event_id: str) -> bool | None:
    """Ask the process at the other end to resume from an event; None where it cannot, for its Redis is away."""
    try:
        wish = {"action": "subscribe", "type": "swiftcms_ws.check", "contentType": "none", "since": event_id}
        line.send(json.dumps({**wish, "ref": "check"}))
        while (data := line.receive(REPLY_SECONDS)) is not None:
            message = json.loads(data)
            if message.get("ref") == "check":
                return bool(message["payload"].get("recovered", True))  # an error: it does not let us ask
    except LINE_FAULTS:
        pass
    return None


def _lives_on(line: Line) -> bool:
    """Return whether a line that we leave alone is there for longer than proxies wait."""
    deadline = time.monotonic() + LONG_SECONDS
    with suppress(simple_websocket.ConnectionClosed):
        while (left := deadline - time.monotonic()) > 0 and line.receive(left):
            pass
    return bool(line.connected)


def _is_closing_answered(line: Line) -> bool:
    try:
        line.sock.send(line.ws.send(CloseConnection(code=1000)))
        while line.receive(REPLY_SECONDS):
            pass
    except LINE_FAULTS as end:
        return getattr(end, "reason", None) == 1000
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="swiftcms-ws", description="Real-time push for small Flask sites.")
    parser.set_defaults(run=serve_demo)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--host", default="localhost", help="address that the demo listens on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port that it listens on (%(default)s)")
    parser.add_argument("--redis", metavar="URL", help="run the demo on Redis, twice on two ports if you like")
    parser.add_argument("--debug", action="store_true", help="log everything; tracebacks in the browser")
    commands = parser.add_subparsers(title="commands", description="Without one, the demo is served.")

    listener = commands.add_parser("listen", help="print events, one JSON line each; reconnect and resume")
    listener.set_defaults(run=listen)
    listener.add_argument("url", type=websocket_url, help="such as ws://localhost:8080/ws")
    listener.add_argument("--type", default="*", help="event type or prefix (%(default)s)")
    listener.add_argument("--content-type", default="*", help="content type (%(default)s)")
    listener.add_argument("--token", help="a JWT to sign in with")

    signer = commands.add_parser("token", help="sign a token with the key in $SWIFTCMS_WS_JWT_KEY or $SECRET_KEY")
    signer.set_defaults(run=print_token)
    signer.add_argument("user", help="the user's id")
    signer.add_argument("--expires-in", type=float, default=3600, help="seconds that it is valid for (%(default)s)")

    doctor = commands.add_parser("check", help="examine a deployed address, and say what to change")
    doctor.set_defaults(run=check)
    doctor.add_argument("url", type=websocket_url, help="such as wss://example.org/ws")
    doctor.add_argument("--long", action="store_true", help="also wait past a proxy's time-out, 75 seconds")
    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
