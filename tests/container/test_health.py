"""The container's health follows what the newest run tells of itself. The rest of the container: run.sh."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

AN_HOUR_AGO = time.time() - 3600


def health(folder):
    done = subprocess.run([sys.executable, ROOT / "docker/health.py"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def write(path, text="{}", when=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if when is not None:
        os.utime(path, (when, when))


@pytest.mark.parametrize(
    ("metrics", "end", "expected"),
    [
        (None, None, (0, "")),
        (AN_HOUR_AGO, None, (1, "runs/new: silent for ")),
        (AN_HOUR_AGO, "finished", (0, "")),
        (None, "failed", (1, "runs/new: rank 1: no space left")),
    ],
    ids=["logs", "silent", "finished", "failed"],
)
def test_health_is_that_of_the_newest_run(tmp_path, metrics, end, expected):
    write(tmp_path / "runs/old/metrics.jsonl", when=AN_HOUR_AGO - 3600)
    write(tmp_path / "runs/old/exit.json", '{"status": "failed", "reason": "old"}', AN_HOUR_AGO - 3600)
    write(tmp_path / "runs/new/metrics.jsonl", when=metrics)
    if end is not None:
        write(tmp_path / "runs/new/exit.json", json.dumps({"status": end, "reason": "rank 1: no space left"}), metrics)
    code, message = health(tmp_path)
    assert code == expected[0]
    assert message.startswith(expected[1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"status": "failed", "reason": "a\\u001b[31mb\\u009bc"}', r"runs/new: a\x1b[31mb\x9bc"),
        ("[]", "runs/new/exit.json: not an object with `status` and `reason`"),
        ('{"status": "failed"}', "runs/new/exit.json: not an object with `status` and `reason`"),
        ("not JSON", "runs/new/exit.json: not an object with `status` and `reason`"),
    ],
)
def test_what_exit_json_holds_is_one_printable_line(tmp_path, content, expected):
    write(tmp_path / "runs/new/exit.json", content)
    assert health(tmp_path) == (1, expected)
