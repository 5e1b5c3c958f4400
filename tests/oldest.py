"""Prints the oldest accelerate and deepspeed that pyproject.toml allows, as arguments of pip."""

import re
import tomllib
from pathlib import Path

NAMES = ("accelerate", "deepspeed")


def oldest():
    """name -> version"""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    found = (re.match(r"([a-z]+)>=([0-9.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match and match[1] in NAMES}


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in oldest().items()))
