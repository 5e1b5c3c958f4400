"""The training command: `accelerate launch pipeline/train.py [--config configs/X.yaml] [key=value ...]`."""

import os

from pipeline.session import main

if __name__ == "__main__":
    code = main()
    if code:
        os._exit(code)  # the other ranks may hang in a collective: leave without waiting for them
