"""Exports weights: `python -m pipeline.export RUN_OR_CHECKPOINT --layout timm --out vit.safetensors`."""

import argparse
import sys

from pipeline.checkpoint import load_state, require
from pipeline.config import config_from_tree
from pipeline.errors import UserError
from pipeline.weights import find_checkpoint, read_weights, write_weights
from vit.weights import LAYOUTS


def export(path: str, layout: str, out: str) -> None:
    """Writes the weights of a checkpoint, or of a run's newest one, in a layout.

    Raises:
        UserError: no whole checkpoint, a layout that can't hold this model, or a path that can't be written.
    """
    path = find_checkpoint(path)
    require(path)
    facts = load_state(path)
    config = config_from_tree(facts["config"], path)
    write_weights(read_weights(path), config.model, layout, out, facts["classes"] or [])
    print(f"wrote {out}: {config.model.variant} after step {facts['step']}, layout {layout}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose names and shapes")
    parser.add_argument("--out", required=True, help="a .safetensors file; .npz for jax; a folder for hf")
    parsed = parser.parse_args(arguments)
    try:
        export(parsed.checkpoint, parsed.layout, parsed.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
