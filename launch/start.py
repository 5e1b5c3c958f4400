"""What a launcher starts on each rank: checks the nodes, then trains. `start.py [--config C] [key=value ...]`."""

import sys

from pipeline.preflight import main

if __name__ == "__main__":
    # Ranks come minutes apart where torch is read over a network.
    sys.exit(main(["--then-train", "--timeout-seconds", "120", *sys.argv[1:]]))
