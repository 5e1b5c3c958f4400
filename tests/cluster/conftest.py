"""A cluster for the session, and a copy of the project, with spaces in its path, that jobs run from."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import Cluster, copy_tree, ranks_of, wait_for
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if shutil.which("slurmctld") is None:
        pytest.skip("no Slurm here; as root: apt-get install slurm-wlm (make test-cluster does)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the project with the embedded shards and site settings of its own."""
    from pipeline.data.digits import write_digits

    tree = tmp_path_factory.mktemp("a tree with spaces") / "vit pretrain"
    copy_tree(ROOT, tree)
    (tree / "data").mkdir()
    write_digits(str(tree / "data/digits"))
    return tree


class Run:
    """A run directory, and jobs that train there."""

    def __init__(self, cluster: Cluster, tree: Path, folder: Path):
        self.cluster, self.tree, self.folder, self.path = cluster, tree, folder, folder / "run"
        self.output = folder / "job.out"
        self.site(MAX_RESTARTS=3)

    def site(self, *lines: str, **settings) -> None:
        settings = {"PYTHON": sys.executable, **settings}
        lines = (*(f"{key}='{value}'" for key, value in settings.items()), *lines)
        (self.tree / "launch/site.env").write_text("\n".join(lines) + "\n")

    def submit(self, *options: str, words: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> str:
        """`sbatch OPTIONS launch/pretrain.slurm WORDS` from a folder elsewhere. Returns the job's number."""
        command = ["sbatch", "--nodes=2", f"--output={self.output}", *options, f"{self.tree}/launch/pretrain.slurm"]
        command += ["--config", "configs/digits.yaml", *words, f"run.dir={self.path}"]
        text = self.cluster.run(*command, cwd=self.folder, environ=environ)
        found = re.search(r"Submitted batch job (\d+)", text)
        assert found, text
        return found[1]

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, job: str, state: str, seconds: float = 300) -> None:
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"} - {state}

        def there() -> bool:
            now = self.cluster.state(job)
            assert now not in over, f"{now}: {self.said()}"
            return now == state

        wait_for(there, seconds, f"{state} of job {job}; {self.said()}")

    @contextlib.contextmanager
    def paused(self):
        """Halts the ranks where they are: what happens meanwhile comes before their last step on any machine."""
        ranks = ranks_of(self)
        assert ranks
        for rank in ranks:
            rank.suspend()
        try:
            yield
        finally:
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.resume()

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        wait_for(lambda: self.last_step() >= step, seconds, f"step {step}")

    def last_step(self) -> int:
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        try:
            whole, _, _ = (self.path / "metrics.jsonl").read_text().rpartition("\n")
        except FileNotFoundError:
            return {}
        lines = [json.loads(line) for line in whole.splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def metric(self, name: str) -> float:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line[name] for line in lines if name in line][-1]

    def ended(self) -> dict:
        return json.loads((self.path / "exit.json").read_text())

    def samples(self) -> list[tuple[int, str]]:
        """All rows of the batches, whichever rank read them."""
        rows = []
        for path in self.path.glob("samples-rank*.jsonl"):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                rows += [(entry["step"], str(sample)) for sample in entry["samples"]]
        return sorted(rows)


@pytest.fixture
def run(cluster, tree, tmp_path):
    return Run(cluster, tree, tmp_path)
