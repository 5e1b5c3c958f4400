"""Prints what `pip install .[EXTRA,...]` would install besides the project: requirements.py EXTRA ..."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + [requirement for name in sys.argv[1:] for requirement in extras[name]]))
