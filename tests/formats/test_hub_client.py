"""The Hub's own client, in processes of its own, against a server on this machine that answers as the Hub does."""

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


class Hub(BaseHTTPRequestHandler):
    root, fetched = None, []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        files = sorted(
            p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()
        )
        resolve = f"/{ID}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{ID}/tree/"):
            self.answer(
                json.dumps(
                    [
                        {
                            "type": "file",
                            "path": f,
                            "size": (self.root / f).stat().st_size,
                            "oid": sha1(f.encode()).hexdigest(),
                        }
                        for f in files
                    ]
                ).encode()
            )
        elif path.startswith(f"/api/models/{ID}"):
            self.answer(
                json.dumps(
                    {
                        "_id": "1",
                        "id": ID,
                        "modelId": ID,
                        "sha": COMMIT,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [{"rfilename": f} for f in files],
                    }
                ).encode()
            )
        elif path.startswith(resolve) and path.removeprefix(resolve) in files:
            self.fetched.append(path.removeprefix(resolve))
            self.answer(
                (self.root / path.removeprefix(resolve)).read_bytes(),
                ETag=f'"{sha1(path.encode()).hexdigest()}"',
            )
        else:
            self.answer(
                b'{"error": "Repository not found"}',
                401 if ID not in path else 404,
                **{"X-Error-Code": "RepoNotFound"},
            )

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        standard = {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            "Content-Type": "application/json",
        }
        for key, value in (standard | headers).items():
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
        print("loaded", float(sum(p.double().sum() for name in ("unet", "vae") for p in sdxl.network(name).parameters())))
    except ValueError as error:
        print("refused", error)
"""


def test_a_download_fetches_only_what_is_needed_and_then_works_offline(tmp_path):
    Hub.root, Hub.fetched = write_folder(tmp_path / "repository", vocabulary=True), []
    write_folder(Hub.root, dtype=torch.float16, variant=".fp16")
    for extra in ("unet/diffusion_pytorch_model.bin", "README.md", "model.onnx"):
        (Hub.root / extra).write_bytes(b"not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.upper().endswith("PROXY") and not k.startswith("HF_")
    }
    clean |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def load(*sources, **environment):
        command = [sys.executable, "-c", LOAD, str(Path(alchemy.__file__).parents[1]), *sources]
        done = subprocess.run(command, capture_output=True, text=True, env=clean | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    online, unknown = load(ID, "org/no-such-model")
    server.shutdown()
    server.server_close()
    total = sum(t.double().sum() for name in ("unet", "vae") for t in weights()[name].values())
    assert online.startswith("loaded") and float(online.split()[1]) == pytest.approx(float(total))
    assert sorted(set(Hub.fetched)) == sorted(SETTINGS + weight_names())
    assert unknown.startswith("refused org/no-such-model: not on the Hub, or private")
    asked_before = len(Hub.fetched)
    without, never = load(ID, "org/other")  # the server is gone
    offline = load(ID, HF_HUB_OFFLINE="1")[0]
    assert without == offline == online and len(Hub.fetched) == asked_before
    assert never.startswith("refused org/other: cannot be fetched")
