"""What a launcher starts on each rank: checks the nodes, then trains. `start.py [--config C] [key=value ...]`."""

import sys

from pipeline.preflight import main
from pipeline.text import screen_output

if __name__ == "__main__":
    screen_output()
    # Ranks come minutes apart where torch is read over a network.
    sys.exit(main(["--then-train", "--timeout-seconds", "120", *sys.argv[1:]]))
