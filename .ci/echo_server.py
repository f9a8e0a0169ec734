"""An echo server for Autobahn's fuzzing client: `python3 .ci/echo_server.py PORT`.

autobahn.py starts it. It serves ws://127.0.0.1:PORT/ws with the connections and frames of
swiftcms_ws.py in this checkout. If a text or binary message has at most 64 MiB, it is sent back
unchanged. No other messages are sent. Ctrl+C stops it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from flask import Flask
from werkzeug.serving import make_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import swiftcms_ws
from swiftcms_ws import Opcode, encode_frame

MAX_MESSAGE = 64 * 1024 * 1024


class EchoSession(swiftcms_ws.Session):
    """Sends each message back, instead of carrying out its action."""

    __slots__ = ()

    def _greet(self) -> None:
        """Send no message at the start."""

    def _handle_message(self, data: str | bytes) -> None:
        if isinstance(data, str):
            self.connection.send(encode_frame(Opcode.TEXT, data.encode()))
        else:
            self.connection.send(encode_frame(Opcode.BINARY, data))


def main() -> None:
    port = int(sys.argv[1])
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    swiftcms_ws.Session = EchoSession  # type: ignore[misc]
    app = Flask(__name__)
    app.config.update(
        SWIFTCMS_WS_MAX_MESSAGE=MAX_MESSAGE,
        # A client that sends many messages before it reads their echoes is not too slow.
        SWIFTCMS_WS_MAX_QUEUE=4 * MAX_MESSAGE,
        SWIFTCMS_WS_RATE=1e9,
        SWIFTCMS_WS_HEARTBEAT=86_400,
        SWIFTCMS_WS_ORIGINS="*",
    )
    app.register_blueprint(swiftcms_ws.blueprint)
    server = make_server("127.0.0.1", port, app, threaded=True)
    try:
        server.serve_forever()
    finally:
        swiftcms_ws.hub.close()


if __name__ == "__main__":
    main()
