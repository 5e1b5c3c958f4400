"""Secrets and foreign text: what must never reach a file, a terminal, a spreadsheet or a browser."""

import base64
import contextlib
import csv
import io
import json
import re
import shutil
import sys
import tarfile
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from pipeline import checks, evaluate, shards
from pipeline.config import load_config
from pipeline.data.index import expand_urls, load_index
from pipeline.data.source import Source
from pipeline.errors import UserError
from pipeline.monitor import tensorboard
from pipeline.report import dry_run
from pipeline.runtime import Ranks
from pipeline.text import Screen, base_name, csv_cell, folder_of, inside, mask_secrets, printable, shown
from tests.conftest import ROOT, SMALL, train
from tests.pipeline.test_faults import Handler, Server

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\nerror: forged\u202egpj"
# Of all that a terminal acts on, our output holds newlines and the progress bars' returns only.
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:pw@h/x.tar?token=S: truncated", "http://***@h/x.tar?token=***: truncated"),
        ("https://user:p@ss@h/x.tar", "https://***@h/x.tar"),
        ("http://user:S/S?S@h/x.tar", "http://***@h/x.tar"),
        ("http://h/x?file=a.tar&X-Amz-Signature=S&part=3", "http://h/x?file=a.tar&X-Amz-Signature=***&part=3"),
        ("https://a.blob.core.windows.net/c/x?sv=1&sig=a%2Bb%3D", "https://a.blob.core.windows.net/c/x?sv=***&sig=***"),
        ("['http://h/x?token=S', 'b']", "['http://h/x?token=***', 'b']"),
        ("exceeded with url: /x.tar?token=S (Caused", "exceeded with url: /x.tar?token=*** (Caused"),
        ("http://h/x#access_token=S", "http://h/x#access_token=***"),
        ("s3://KEY:SECRET@bucket/x", "s3://***@bucket/x"),
        ("pipe:curl -H 'Authorization: Bearer S' -u me:S x", "pipe:curl -H 'Authorization: ***' -u *** x"),
        ("pipe:curl --header 'X-Auth-Token: S' x | cat", "pipe:curl --header 'X-Auth-Token: ***' x | cat"),
        ("pipe:AWS_SECRET_ACCESS_KEY=S aws s3 cp s3://b/x -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/x -"),
        ("pipe:tool --password 'S T' --token=S x", "pipe:tool --password *** --token=*** x"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
    ],
)  # fmt: skip
def test_secrets_are_masked(text, masked):
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


@pytest.mark.parametrize(
    "text",
    ["hf://datasets/user/set@main/x.tar", "abfs://container@account.dfs.core.windows.net/x.tar", "s3://bucket/x.tar",
     "cls_token: expected [1, 2], found [3]", "python -u pipeline/train.py data.workers=2 model.depth=3", "a.b@c.org",
     "http://h:80/a@b/x.tar", "http://[::1]:80/a@b",
     "train-{000..127}.tar", "data.train[0]: found 'x'", "pipe:cat x.tar | tar -c --exclude=a"],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert shown(text) == text


@pytest.mark.parametrize(
    "text",
    ["pipe:curl --token=S", "pipe:curl -u me:S", "pipe:curl -u 'me:S'", 'the URL "http://h/x?token=S" is bad',
     "TOKEN=S", "pipe:curl -H 'X-Token: S'", 'curl -H "X-Token: S"', 'curl -H "Cookie: S" | "TOKEN=S" "--token S"',
     "?token=S", r"--token S\$S", r"TOKEN=S\$S x"],
)  # fmt: skip
def test_masked_json_is_json(text):
    """Such as preflight's report, whose texts are masked when they are made and when they are printed."""
    for written in (json.dumps({"text": text, "number": 1}), json.dumps([mask_secrets(text)])):
        found = mask_secrets(written)
        json.loads(found)
        assert "S" not in found.replace("TOKEN=", "")


@pytest.mark.parametrize("piece", ["SECRET", "?a=", "?a=::::", "a.", "a://", "x-token", "&", "-u ", "--secret-", "'"])
def test_masking_takes_time_in_proportion_to_the_text(piece):
    began = time.process_time()
    mask_secrets(piece * (100_000 // len(piece)) + "=")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@bucket/x.tar", "gs://KEY:SEC/RET@bucket/x.tar", "http://u:SECRET/x@h/x.tar"]
)
def test_a_password_in_the_wrong_place_is_refused_before_a_library_prints_it(url):
    with pytest.raises(UserError, match=r"://\*\*\*@.*: no ") as caught:
        expand_urls(url)
    assert "SEC" not in str(caught.value)
    assert expand_urls("http://user:pw@h:80/x@y.tar") == ["http://user:pw@h:80/x@y.tar"]


def test_a_url_that_is_signed_anew_names_the_same_file():
    for url in ("http://user:pw@h/a/x.tar?X-Amz-Signature=1", "http://h/a/x.tar?sig=2&se=3", "http://h/a/x.tar"):
        assert base_name(url) == "x.tar"
    assert base_name("http://h/get?file=x.tar&token=1") == "get?file=x.tar"
    shares = [f"https://cloud.example.org/s/AbC/download?path=%2F&files=train-{number}.tar" for number in range(2)]
    assert len(set(map(base_name, shares))) == 2, "shards of a Nextcloud share differ in their query only"
    assert inside(folder_of("http://u:p@h/a/x.tar?sig=1&file=x"), "index.json") == "http://u:p@h/a/index.json?sig=1"
    assert inside(folder_of("a/x?y=1.tar"), "index.json") == "a/index.json"
    assert folder_of("x.tar") == "."


def test_nothing_that_a_terminal_acts_on_stays():
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[31m\x9b2J\r\nerror: forged\u202egpj"
    assert printable("Zürich 東京 👩\u200d🔬 a\xa0b") == "Zürich 東京 👩\u200d🔬 a\xa0b"
    assert printable("\udcff\u2028\0") == r"\udcff\u2028\x00"
    assert str(UserError(f"http://u:p@h/{EVIL}")) == f"http://***@h/{printable(EVIL)}"
    screen = Screen(io.StringIO())
    print(f"http://u:p@h {EVIL}", end="\r\t\n", file=screen)
    assert not RAW.search(screen.getvalue())
    assert "p@h" not in screen.getvalue()
    assert screen.getvalue().endswith("\r\t\n")


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-2+3", "@SUM(1)", " =1", "=cmd|' /C calc'!A0", "-x"])
def test_what_a_spreadsheet_would_evaluate_is_quoted(text):
    assert csv_cell(text) == "'" + text


@pytest.mark.parametrize("text", ["-0.5", "+3", "1e-4", "cat", "a=b", "n-1", ""])
def test_other_cells_stay_as_they_are(text):
    assert csv_cell(text) == text
    assert not csv_cell("\t=1").startswith("\t")


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
def test_tensorboard_shows_foreign_text_as_text(tmp_path):
    """Rendered by TensorBoard's own code."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    labels = ["<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://evil/x.png)", "a|b\n-|-\n1|2",
              "</code></pre><script>alert(1)</script>", "# title", "http://evil", EVIL]  # fmt: skip
    sink = tensorboard.Config().open(str(tmp_path), 0, 1)
    sink.images(1, torch.zeros(8, 3, 4, 4, dtype=torch.uint8), labels)
    sink.text("config", "\n".join(f"a: {label}" for label in labels))
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in ("inputs/labels/text_summary", "config/text_summary"):
        text = events.Tensors(tag)[0].tensor_proto.string_val[0]
        html = markdown_to_safe_html(text)
        assert set(re.findall(r"<(\w+)", html)) == {"pre", "code"}
        assert "&lt;img src=x onerror=alert(1)&gt;" in html
        assert not RAW.search(html)


# A run on a stranger's shards, from a server that wants a password and a token.

USER, PASSWORD, TOKEN, NEW_TOKEN = "SECRET0user", "SECRET1pw", "SECRET2token", "SECRET3token"
CLASSES = ["=cmd()", f"red{EVIL}", "<img src=x onerror=alert(1)>", *"3456789"]


class Locked(Handler):
    tokens = (TOKEN, NEW_TOKEN)

    def _open(self):
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
        if self.headers["Authorization"] == f"Basic {login}" and query.get("token") in self.tokens:
            self.path = self.path.partition("?")[0]
            return True
        self.server.requests.append("refused")
        self.send_response(403, f"Forbidden \x1b[31m {self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_HEAD(self):
        if self._open():
            super().do_HEAD()

    def do_GET(self):
        if self._open():
            super().do_GET()


@pytest.fixture
def locked(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard, count in (("train-000", 32), ("train-001", 32), ("val-000", 8)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(count):
                image = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(image, "png")
                content = b"no image" if number == 3 else image.getvalue()
                for suffix, data in (("png", content), ("cls", str(number % 10).encode())):
                    member = tarfile.TarInfo(f"={number:02d}{EVIL}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    server = Server(folder)
    server.RequestHandlerClass = Locked
    server.handle_error = lambda request, address: None  # a client that has gone
    yield server
    server.shutdown()
    server.server_close()


def call(capfd, monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with contextlib.suppress(SystemExit):
        main()
    found = capfd.readouterr()
    return found.out + found.err


def test_no_secret_and_no_control_character_leaves_a_run(locked, tmp_path, capfd, monkeypatch):
    base = f"http://{USER}:{PASSWORD}@127.0.0.1:{locked.server_port}"
    index, run = tmp_path / "index", tmp_path / "run"

    def words(token):
        names = {"train": "train-{000..001}", "val": "val-000"}
        urls = [f"data.{split}={base}/{name}.tar?token={token}" for split, name in names.items()]
        return [*SMALL, *urls, f"data.index={index}", f"run.dir={run}", "run.steps=2", "data.global_batch_size=32",
                "data.max_bad_fraction=0.5", "data.log_samples=true", "checkpoint.every_steps=1", "model.depth=1",
                "data.read.deadline_seconds=5", "model.image_size=16"]  # fmt: skip

    urls = [f"{base}/train-{{000..001}}.tar?token={TOKEN}", f"{base}/val-000.tar?token={TOKEN}"]
    said = [call(capfd, monkeypatch, shards.main, "index", "--to", index, "--processes", 1, *urls)]
    report = tmp_path / "report.json"
    said.append(call(capfd, monkeypatch, shards.main, "verify", "--index", index, "--json", report, *urls))
    assert "no readable" in said[-1] or "image" in said[-1]
    config = load_config(str(ROOT / "configs/digits.yaml"), words(TOKEN))
    assert dry_run(config, Ranks(0, 1, 0, 1)) == 0
    said.append(json.dumps(checks.look_at_shards(config, Ranks(0, 1, 0, 1), 5.0)))
    said.append(capfd.readouterr().out)

    code, output = train(*words(TOKEN))
    assert code == 0, output
    said.append(output)
    assert "put your secrets where *** stands" in output
    # Signed anew it is the same data.
    newest = max((run / "checkpoints").iterdir())
    shutil.rmtree(newest)
    code, output = train(*words(NEW_TOKEN))
    assert code == 0, output
    assert "resuming from" in output
    said.append(output)

    # Without the token.
    monkeypatch.setattr(Locked, "tokens", ())
    for read in (
        lambda: load_index(urls, folder=str(index), source=Source(config.data.read)),
        lambda: Source().read(urls[1], 0, 10),
        lambda: Source().read("http://***@h/x.tar?token=***", 0, 10),
    ):
        with pytest.raises(UserError, match=r"the server says 403|secrets were masked") as caught:
            read()
        said.append(str(caught.value))
    monkeypatch.setattr(Locked, "tokens", (TOKEN, NEW_TOKEN))
    assert "refused" in locked.requests

    predictions = tmp_path / "predictions.csv"
    said.append(call(capfd, monkeypatch, evaluate.main, run, "--data", urls[1], "--predictions", predictions,
                     "--workers", 0))  # fmt: skip
    if not predictions.exists():  # the index lies elsewhere
        shutil.copy(index / "index.json", tmp_path / "served")
        shutil.copy(index / "index.bin", tmp_path / "served")
        said.append(call(capfd, monkeypatch, evaluate.main, run, "--data", urls[1], "--predictions", predictions,
                         "--workers", 0))  # fmt: skip
    with predictions.open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 8
    assert {row[3] for row in rows} >= {"'=cmd()", printable(CLASSES[1])}
    assert all(not RAW.search(cell) for row in rows for cell in row)
    said.append(call(capfd, monkeypatch, shards.main, "audit", "--config", ROOT / "configs/digits.yaml", "--run", run,
                     "--set", *words(NEW_TOKEN)))  # fmt: skip
    assert "0 differ" in said[-1], said[-1]

    for text in said:
        assert not RAW.search(text), text
        assert "\nerror: forged" not in text.replace("\r", "\n")
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "served" not in path.parts}
    assert {"config.yaml", "manifest.json", "state.json", "quarantine.jsonl", "index.json", "report.json"} <= {
        path.name for path in kept
    }
    for where, content in [*kept.items(), *((text[:200], text.encode()) for text in said)]:
        for secret in (USER, PASSWORD, TOKEN, NEW_TOKEN, login.decode()):
            assert secret.encode() not in content, where
    assert b"token=***" in kept[run / "config.yaml"]
    for path, content in kept.items():
        if path.suffix in (".jsonl", ".json", ".yaml", ".csv"):
            assert not RAW.search(content.decode()), path
