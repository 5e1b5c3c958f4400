"""`metrics.jsonl`: one JSON object a log interval."""

import json
import os
from dataclasses import dataclass

from pipeline.monitor.sink import Sink


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return JsonLines(os.path.join(run_dir, "metrics.jsonl"), start_step)


class JsonLines(Sink):
    def __init__(self, path: str, start_step: int):
        drop_lines_after(path, start_step)
        self.file = open(path, "a")  # noqa: SIM115

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def drop_lines_after(path: str, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their lines must not stand twice."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # half a line of a killed run
    with open(path + ".part", "w") as file:
        file.writelines(kept)
    os.replace(path + ".part", path)
