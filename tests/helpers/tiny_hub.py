"""A hub on this machine: the few calls of the Hugging Face HTTP interface by which a data set is listed and read.

`serve(folder)` runs it over files of a folder; a name that starts with `gated/` is refused as the hub refuses it, and the
files named in REFUSED as a hub in trouble does.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"
REFUSED: set[str] = set()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The address of the hub, and what it has sent of the files: (name, bytes)."""
    sent: list[tuple[str, int]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if "/paths-info/" not in self.path:
                return self.answer(404)
            asked = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
            self.json([entry(name) for name in asked if (folder / name).is_file()])

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            if "/gated/" in path:
                return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            if re.fullmatch(r"/api/datasets/\w+/\w+(/revision/\w+)?", path):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                return self.json({"id": path.split("/")[3], "sha": SHA, "siblings": files, "tags": [], "downloads": 0})
            if "/tree/" in path:
                return self.json([entry(file.name) for file in sorted(folder.iterdir())])
            found = re.fullmatch(r"/datasets/\w+/\w+/resolve/\w+/(.+)", path)
            if not found or not (folder / found[1]).is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            if found[1] in REFUSED:
                return self.answer(403)
            data = (folder / found[1]).read_bytes()
            headers = {"ETag": f'"{len(data)}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
            if self.command == "HEAD":
                return self.answer(200, Content_Length=str(len(data)), **headers)
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not span:
                sent.append((found[1], len(data)))
                return self.answer(200, data, **headers)
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            sent.append((found[1], last + 1 - first))
            self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

        do_HEAD = do_GET

    def entry(name: str) -> dict:
        size = (folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": f"{size:040x}"}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
