"""Write the embedded JavaScript, CSS and HTML of swiftcms_ws.py into files that linters can read.

    python .ci/extract.py DIRECTORY

The demo serves these files: `client.js`, the scripts and the style of the inspector and of the
demo, and the rendered pages `demo.html` and `inspector.html`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import swiftcms_ws

FILES = {
    "client.js": "/ws/client.js",
    "inspector.js": "/ws/inspector.js",
    "inspector.css": "/ws/inspector.css",
    "inspector.html": "/ws",
    "demo.js": "/demo.js",
    "demo.html": "/",
}


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    client = swiftcms_ws.demo_app().test_client()
    for name, path in FILES.items():
        response = client.get(path)
        # Linters accept an empty file, so a failed extraction must stop CI here.
        if response.status_code != 200 or not response.text.strip():
            sys.exit(f"GET {path} of the demo answers {response.status}, {response.mimetype}")
        (directory / name).write_text(response.text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/extract.py DIRECTORY")
    main(Path(sys.argv[1]))
