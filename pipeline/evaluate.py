"""Evaluates a checkpoint: `python -m pipeline.evaluate CHECKPOINT --data URLS`."""

import argparse
import contextlib
import csv
import os
import sys

import torch

from pipeline import checkpoint
from pipeline.config import config_from_tree
from pipeline.data.index import load_index
from pipeline.data.loader import Loader, evaluation_stream
from pipeline.data.source import Source
from pipeline.engine import load_weights
from pipeline.errors import UserError, WorkerDied
from pipeline.runtime import Ranks
from pipeline.text import csv_cell, screen_output, shown
from pipeline.trainer import normalised
from pipeline.weights import find_checkpoint
from vit.model import ViT


@torch.no_grad()
def evaluate(
    path: str, urls: list[str] | None, predictions: str | None, workers: int, ema: bool = False
) -> dict[str, float]:
    """Counts every sample once; writes one CSV line a sample where asked for.

    Raises:
        UserError: no whole checkpoint, bad shards, or no place for the predictions.
    """
    from tqdm import tqdm

    if predictions:
        check_writable(predictions)
    path = find_checkpoint(path)
    checkpoint.require(path)
    facts = checkpoint.load_state(path)
    config = config_from_tree(facts["config"], path)
    names = facts["classes"] or []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ViT(config.model)
    load_weights(model, checkpoint.load_weights(path, ema))
    model.to(device).eval()
    index = load_index(urls or config.data.val, folder=config.data.index, source=Source(config.data.read))
    size, classes = config.model.image_size, config.model.num_classes
    alone = Ranks(0, 1, 0, 1)
    loader = Loader(evaluation_stream(config.data, index, config.augment.val, size, classes, alone), workers, device)
    sums: dict[str, float] = {}
    rows: list[list] = []
    with contextlib.closing(loader), tqdm(total=index.samples, unit="image") as bar:
        for batch in loader:
            logits = model(normalised(batch, torch.float32).images)
            for name, value in config.objective(lambda _, found=logits: found, batch)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if predictions:
                probabilities, best = logits.softmax(1).max(1)
                for row in batch.valid.nonzero()[:, 0].tolist():
                    label, guess = int(batch.labels[row]), int(best[row])
                    named = [names[n] if n < len(names) else str(n) for n in (label, guess)]
                    cells = map(csv_cell, (batch.keys[row], *named))
                    rows.append([next(cells), label, guess, *cells, f"{float(probabilities[row]):.6f}"])
            for bad in batch.bad:
                print(f"bad sample, not counted: {shown(f'{bad.where}: {bad.reason}')}", file=sys.stderr)
            bar.update(batch.valid_rows)
    if predictions:
        with open(predictions, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "prediction", "label_name", "prediction_name", "probability"])
            writer.writerows(rows)
    count = sums.pop("count")
    return {**{f"val/{name}": value / count for name, value in sums.items()}, "val/count": count}


def check_writable(path: str) -> None:
    """Raises UserError where no file can be written at `path`: before minutes of evaluation."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        found = "is a folder" if os.path.isdir(path) else f"there is no folder {folder}"
        raise UserError(f"--predictions {path}: {found}; name a file in a folder that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--predictions {path}: no permission to write there; name another file")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("--data", nargs="+", metavar="URL", help="shards; default: the run's validation shards")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write label and prediction of every sample")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode (2)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optimizer.ema_decay)")
    parsed = parser.parse_args()
    try:
        found = evaluate(parsed.checkpoint, parsed.data, parsed.predictions, parsed.workers, parsed.ema)
        for name, value in found.items():
            print(f"{name} {value:.6g}")
    except (UserError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
