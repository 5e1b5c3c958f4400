"""The container's health: exit code 0 where the newest run below runs/ has ended well or has told of itself lately.

Where no run has begun, the packages must import. HEALTH_SECONDS (900): how long a run may be silent; it must be longer
than an evaluation and a log interval.
"""

import glob
import json
import os
import sys
import time

from pipeline.text import shown


def problem(runs: str, silence_seconds: float) -> str | None:
    names = ("manifest.json", "metrics.jsonl", "exit.json")
    told = [path for name in names for path in glob.glob(f"{glob.escape(runs)}/*/{name}")]
    if not told:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        import webdataset  # noqa: F401

        return None
    newest = max(told, key=os.path.getmtime)
    run, age = os.path.dirname(newest), time.time() - os.path.getmtime(newest)
    if os.path.exists(f"{run}/exit.json"):
        try:
            with open(f"{run}/exit.json") as file:
                end = json.loads(file.read(1 << 20))
            return shown(f"{run}: {end['reason']}") if end["status"] == "failed" else None
        except (OSError, ValueError, KeyError, TypeError):
            return shown(f"{run}/exit.json: not an object with `status` and `reason`")
    return shown(f"{run}: silent for {age:.0f} s") if age > silence_seconds else None


if __name__ == "__main__":
    sys.exit(problem("runs", float(os.environ.get("HEALTH_SECONDS", "900"))))
