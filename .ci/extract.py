"""Write the embedded JavaScript and HTML of swiftcms_ws.py into files, for linters.

    python .ci/extract.py DIRECTORY

`client.js` is what `/ws/client.js` serves, `demo.html` and `inspector.html` are the rendered pages,
and `demo.js` and `inspector.js` are the pages' inline scripts. The inline scripts of a page are one
file, because they share their global names. Its lines have the same numbers as in the page: each
line of markup is an empty comment.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import swiftcms_ws


class InlineScripts(HTMLParser):
    """Collects the inline scripts of a page, each on the lines where it stands."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.script = ""
        self._is_inline = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_inline = tag == "script" and "src" not in dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        self._is_inline = False

    def handle_data(self, data: str) -> None:
        if self._is_inline:
            line, _ = self.getpos()
            missing = line - 1 - self.script.count("\n")
            if self.script:
                # In one file, the directive is valid only at its top.
                data = data.replace('"use strict";', "//", 1)
            # The first character of a script is the end of its tag's line.
            self.script += "//\n" * missing + "//" + data


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    client = swiftcms_ws.demo_app().test_client()
    files = {"client.js": client.get("/ws/client.js").text}
    for name, path in {"demo": "/", "inspector": "/ws"}.items():
        page = client.get(path)
        if page.status_code != 200 or page.mimetype != "text/html":
            sys.exit(f"GET {path} of the demo answers {page.status}, {page.mimetype}")
        files[f"{name}.html"] = page.text
        files[f"{name}.js"] = InlineScripts(page.text).script
    for name, text in files.items():
        # A linter is content with an empty file, so an extraction that failed must not be silent.
        if not text.strip():
            sys.exit(f"{name} is empty")
        (directory / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/extract.py DIRECTORY")
    main(Path(sys.argv[1]))
