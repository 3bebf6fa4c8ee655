"""The Hub's own client, in a process of its own, against a server that answers as the Hub does."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers.checkpoints import weights, write_folder
from test_hub import COMMIT, ID, SETTINGS, weight_names

import alchemy

MODEL = {"_id": "1", "id": ID, "modelId": ID, "sha": COMMIT, "private": False, "tags": []}
MODEL |= {"downloads": 0, "likes": 0}


class Hub(BaseHTTPRequestHandler):
    root, fetched = None, []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        files = {p.relative_to(self.root).as_posix(): p for p in self.root.rglob("*.*")}
        name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/")
        if path.startswith(f"/api/models/{ID}/tree/"):
            tree = []
            for file, p in files.items():
                oid = sha1(file.encode()).hexdigest()
                tree.append({"type": "file", "path": file, "size": p.stat().st_size, "oid": oid})
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{ID}"):
            siblings = [{"rfilename": file} for file in files]
            self.answer(json.dumps(MODEL | {"siblings": siblings}).encode())
        elif name in files:
            self.fetched.append(name)
            self.answer(files[name].read_bytes(), ETag=f'"{sha1(path.encode()).hexdigest()}"')
        else:
            status = 404 if ID in path else 401
            self.answer(b'{"error": ""}', status, **{"X-Error-Code": "RepoNotFound"})

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        headers |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for key, value in (headers | {"X-Repo-Commit": COMMIT}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import alchemy
for source in sys.argv[2:]:
    try:
        sdxl = alchemy.load(source, "cpu")
        parameters = [*sdxl.unet.parameters(), *sdxl.vae.parameters()]
        print("loaded", float(sum(p.double().sum() for p in parameters)))
    except ValueError as error:
        print("refused", error)
"""


def load_in_process(home, port, *sources, **environment):
    """The lines that LOAD prints of these sources, with the Hub's home folder and this server."""
    clean = {}
    for key, value in os.environ.items():
        if not key.upper().endswith("PROXY") and not key.startswith("HF_"):
            clean[key] = value
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    command = [sys.executable, "-c", LOAD, str(Path(alchemy.__file__).parents[1]), *sources]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_download_fetches_only_what_is_needed_and_then_works_offline(tmp_path):
    Hub.root, Hub.fetched = write_folder(tmp_path / "repository", vocabulary=True), []
    write_folder(Hub.root, dtype=torch.float16, variant=".fp16")
    for extra in ("unet/diffusion_pytorch_model.bin", "README.md", "model.onnx"):
        (Hub.root / extra).write_bytes(b"not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = tmp_path / "home", server.server_port

    online, unknown = load_in_process(*client, ID, "org/no-such-model")
    server.shutdown()
    server.server_close()
    total = 0.0
    for name in ("unet", "vae"):
        total += sum(float(tensor.double().sum()) for tensor in weights()[name].values())
    assert online.startswith("loaded") and float(online.split()[1]) == pytest.approx(total)
    assert sorted(set(Hub.fetched)) == sorted(SETTINGS + weight_names())
    assert unknown.startswith("refused org/no-such-model: not on the Hub, or private")

    # The server is gone.
    count = len(Hub.fetched)
    without, never = load_in_process(*client, ID, "org/other")
    (offline,) = load_in_process(*client, ID, HF_HUB_OFFLINE="1")
    assert without == offline == online and len(Hub.fetched) == count
    assert never.startswith("refused org/other: cannot be fetched")
