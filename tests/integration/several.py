"""Run under torchrun: training commands one after another in the same processes, which saves their start-up.

Usage: several.py FILE; FILE holds a list of argument lists for pipeline/train.py, as JSON. The end of one that fails is
the end of all.
"""

import json
import os
import sys

import torch.distributed
from accelerate.state import AcceleratorState, GradientState

from pipeline.session import main

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        commands = json.load(file)
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed remembers groups of the first one
    for words in commands:
        if code := main(words):
            os._exit(code)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
