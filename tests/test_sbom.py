"""`make sbom`: the bill of materials names every package of constraints.txt. The command itself checks the schema."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_bill_of_materials_lists_every_pin_with_its_package_url(tmp_path):
    rule = re.search(r"\$\(BIN\)/(cyclonedx-py (?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
    assert rule is not None
    command = shlex.split(rule[1].replace("\\\n", "").replace("build/", f"{tmp_path}/"))
    command[0] = str(Path(sys.executable).parent / command[0])
    command.insert(-1, "--no-validate")  # takes seconds
    subprocess.run(command, cwd=ROOT, env={"PYTHONWARNINGS": "ignore"}, check=True, timeout=60)
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "vit-pretrain"
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    expected = {(name, version, f"pkg:pypi/{name.lower().replace('_', '-')}@{version}") for name, version in pins}
    assert {(part["name"], part["version"], part["purl"]) for part in bill["components"]} == expected
    assert len(bill["components"]) == len(pins)
