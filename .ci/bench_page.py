"""Measure client.js: a live page of 1,000 rows in Chromium, of which one row changes at a time.

    bench_page.py CHECKOUT REFRESHES

It prints {"script_ms": …, "most_ms": …}, the median and the most of the times that client.js needs
for one refresh, from the answer to the last change of the page. The time of the server, and of the
browser's own work (to parse the answer, layout), is not included.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading

from flask import Flask, request
from werkzeug.serving import make_server

ROWS = 1000
TIMEOUT_S = 60
# client.js sets onloadend before it sends the request. The answer is reported after its function.
PAGE = """<!doctype html><html><head><title>Live</title><link rel="icon" href="data:,"><script>
const send = XMLHttpRequest.prototype.send;
XMLHttpRequest.prototype.send = function () {
  const apply = this.onloadend;
  this.onloadend = event => {
    const before = performance.now();
    apply.call(this, event);
    const time = performance.now() - before;
    const texts = [...document.querySelectorAll("b")].map(each => each.textContent).join();
    fetch("/report", { method: "POST", body: JSON.stringify([time, texts]) });
  };
  send.call(this);
};
</script><script src="/ws/client.js"></script></head>
<body><ul id="rows" data-live="content.* rows" data-live-within="0">"""
ROW = '<li id="row-{0}" class="row"><a href="/{0}">Row <b>{1}</b></a> <i>by ana</i> <s>x</s></li>\n'


def main(checkout: str, refreshes: int) -> None:
    sys.path.insert(0, checkout)
    import swiftcms_ws  # noqa: PLC0415

    app = Flask(__name__)
    hub = swiftcms_ws.Hub()
    hub.init_app(app)
    values = [0] * ROWS
    times: list[float] = []
    is_done = threading.Event()

    def change() -> None:
        values[len(times) * 37 % ROWS] += 1
        with app.app_context():
            hub.publish("content.updated", "rows", {})

    @app.get("/")
    def page() -> str:
        rows = (ROW.format(number, value) for number, value in enumerate(values))
        return PAGE + "".join(rows) + "</ul><script>onload = () => fetch('/start')</script>"

    @app.get("/start")
    def start() -> str:
        change()
        return ""

    @app.post("/report")
    def report() -> str:
        time_ms, texts = json.loads(request.get_data())
        if texts != ",".join(map(str, values)):
            raise RuntimeError("the page does not show what the server sent")
        times.append(time_ms)
        if len(times) < refreshes:
            change()
        else:
            is_done.set()
        return ""

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = shutil.which("chromium") or "google-chrome"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.port}/"
        child = subprocess.Popen(
            [chromium, *options, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if not is_done.wait(TIMEOUT_S):
                sys.exit(f"only {len(times)} of {refreshes} refreshes in {TIMEOUT_S} seconds")
        finally:
            child.kill()
            child.wait()
    hub.close()
    figures = {"script_ms": statistics.median(times), "most_ms": max(times)}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
