"""Test the WebSocket protocol of swiftcms_ws.py with Autobahn's fuzzing client.

    python .ci/autobahn.py [WSTEST]

WSTEST is the command of Autobahn's test suite, which needs Python 2.7. Without it, the official
Docker image runs the suite. To install the command:

    pip install 'virtualenv<20.22' && virtualenv -p python2.7 DIRECTORY
    DIRECTORY/bin/pip install autobahntestsuite

All cases run except 9.* (large messages and speed) and 12.* and 13.* (compression, which the server
does not offer). A case passes if the verdicts of its messages and of its close are OK. Cases with
the verdict INFORMATIONAL cannot fail. The report of each case is written to .ci/autobahn/.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

PORT = 9001
HERE = Path(__file__).resolve().parent
DOCKER = ["docker", "run", "--rm", "--network", "host", "-v", f"{HERE}:{HERE}"]
IMAGE = "crossbario/autobahn-testsuite"
PASSED = {"OK", "INFORMATIONAL"}


def wait_for_server() -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", PORT)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"the echo server does not listen on port {PORT}")


def main(command: list[str]) -> int:
    reports = HERE / "autobahn"
    reports.mkdir(exist_ok=True)
    spec = reports / "spec.json"
    server = {"agent": "swiftcms_ws", "url": f"ws://127.0.0.1:{PORT}/ws"}
    cases = {"cases": ["*"], "exclude-cases": ["9.*", "12.*", "13.*"], "exclude-agent-cases": {}}
    spec.write_text(json.dumps({"outdir": str(reports), "servers": [server], **cases}))
    with subprocess.Popen([sys.executable, str(HERE / "echo_server.py"), str(PORT)]) as process:
        try:
            wait_for_server()
            subprocess.run([*command, "-m", "fuzzingclient", "-s", str(spec)], check=True)
        finally:
            process.terminate()
    results = json.loads((reports / "index.json").read_text())["swiftcms_ws"]
    verdicts = {case: (each["behavior"], each["behaviorClose"]) for case, each in results.items()}
    for (messages, close), count in Counter(verdicts.values()).items():
        print(f"{count} cases: messages {messages}, close {close}")
    failed = [case for case, pair in verdicts.items() if not PASSED.issuperset(pair)]
    print(f"{len(verdicts)} cases, {len(failed)} failed {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:2] or [*DOCKER, IMAGE, "wstest"]))
