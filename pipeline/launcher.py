"""Starts torchrun or `accelerate launch` without opening ports to machines outside the job.

    python -m pipeline.launcher torchrun --nproc-per-node 2 pipeline/train.py ...
    python -m pipeline.launcher accelerate --multi_gpu --num_processes 2 ... pipeline/train.py ...

Adds two rendezvous backends to torch's own (`--rdzv-backend`). Torch's c10d listens on all addresses, and the launchers
unpickle what they find in its store every few seconds.

fixed (the default, also in place of `static`, --standalone, and c10d on one machine): the number of nodes does not
change. Nothing is pickled. The head's launcher hosts the store, at --rdzv-endpoint; on one machine that is the loopback
interface. --rdzv-conf: is_host=true on the head (one machine: not needed), node_rank=N (default: the head, then by
address), ranks=N of a node (a single process needs no store). Or as for `static`: --master-addr, --master-port and
--node-rank.

elastic: nodes come and go (--nnodes MIN:MAX), and ranks start again (--max-restarts). This is torch's c10d, bound to
the head's address, and its pickled state is signed with RENDEZVOUS_SECRET and checked before it is unpickled.
"""

import argparse
import ipaddress
import os
import socket
import sys
from typing import Any

from torch.distributed import DistError, HashStore, PrefixStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import Token, create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from pipeline.errors import UserError
from pipeline.runtime import LOOPBACK
from pipeline.store import SECRET, connect, listen, seal, serve, unseal
from pipeline.text import screen_output

JOIN_SECONDS = 600  # that nodes wait for each other
READ_SECONDS = 60  # that a node waits for the head of an elastic run


class FixedNodes(RendezvousHandler):
    """Rendezvous for a fixed set of nodes. The head's launcher hosts the store; nothing in it is pickled."""

    def __init__(self, params: RendezvousParameters):
        self.address, self.port = parse_rendezvous_endpoint(params.endpoint, default_port=0)
        self.run_id, self.nodes, self.own_address = params.run_id, params.max_nodes, params.local_addr or ""
        self.is_host = self.nodes == 1 or params.get_as_bool("is_host", False)
        self.node_rank = params.get_as_int("node_rank")
        self.alone = self.nodes == 1 and params.get_as_int("ranks") == 1
        if params.min_nodes != params.max_nodes:
            raise UserError("--rdzv-backend fixed: --nnodes must be one number; MIN:MAX needs --rdzv-backend elastic")

    def get_backend(self) -> str:
        return "fixed"

    @property
    def use_agent_store(self) -> bool:
        return not self.alone

    def next_rendezvous(self) -> RendezvousInfo:
        """Opens a fresh store at each start of the ranks: they must not find addresses of the ranks before."""
        if self.alone:
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, 0))
        if self.nodes == 1:
            store = host(LOOPBACK, 0, JOIN_SECONDS)
            return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, store.port))
        whole = open_head(self.address, self.port, bool(self.is_host), JOIN_SECONDS)
        store = PrefixStore(self.run_id, whole)
        rank = self._find_rank(store) if self.node_rank is None else self.node_rank
        return RendezvousInfo(store, rank, self.nodes, RendezvousStoreInfo(self.address, self.port))

    def _find_rank(self, store: Any) -> int:
        arrival = store.add("arrivals", 1) - 1
        if arrival >= self.nodes:
            raise UserError(f"{self.address}:{self.port}: {self.nodes} nodes have joined already; start no more")
        store.set(f"node/{arrival}", "" if self.is_host else self.own_address)  # the head first
        found = [(store.get(f"node/{number}"), number) for number in range(self.nodes)]  # waits for all
        return [number for _, number in sorted(found)].index(arrival)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


class SignedBackend(C10dRendezvousBackend):
    """torch's backend, which returns only signed state: its callers unpickle what they get."""

    @property
    def name(self) -> str:
        return "elastic"  # torch compares it with --rdzv-backend

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._checked(super().get_state())

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        found = super().set_state(seal(self._key, state), token)
        if found is None:
            return None
        checked = self._checked(found[:2])
        return None if checked is None else (*checked, found[2])

    def _checked(self, found: tuple[bytes, Token] | None) -> tuple[bytes, Token] | None:
        if found is None:
            return None
        try:
            return unseal(self._key, found[0], "a launcher"), found[1]
        except UserError as error:
            raise RendezvousStateError(str(error)) from None


def elastic(params: RendezvousParameters) -> RendezvousHandler:
    address, port = parse_rendezvous_endpoint(params.endpoint, default_port=29400)
    is_host = bool(params.get_as_bool("is_host", False))
    if is_host and not os.environ.get(SECRET):
        warn(
            f"{SECRET} is not set: whoever reaches {address}:{port} can run code as you on all machines of this run;"
            " set it to the same secret on all of them"
        )
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch's own would listen on all addresses
    store = open_head(address, port, is_host, READ_SECONDS)
    return create_handler(store, SignedBackend(store, params.run_id), params)


def open_head(address: str, port: int, is_host: bool, seconds: float) -> Any:
    """The store at the head node, hosted by this process if it is on the head."""
    if is_host:
        store = host(address, port, seconds)
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4][0]
        if not ipaddress.ip_address(str(found)).is_private:
            warn(f"{address} is a public address: close its port {port} to all but the machines of this run")
        return store
    try:
        return connect(address, port, seconds)
    except DistError:
        raise UserError(
            f"no launcher answers at {address}:{port} within {seconds:g} s; start the head node's, and open the port"
            " between the nodes"
        ) from None


def host(address: str, port: int, seconds: float) -> Any:
    try:
        return serve(listen(address, port), address, seconds)
    except OSError as error:
        raise UserError(f"can't listen on {address}:{port}: {error.strerror}; end what listens there") from None


def closed(args: argparse.Namespace) -> argparse.Namespace:
    """Replaces torch's rendezvous by ours in torchrun's options if it would listen on all addresses.

    `accelerate launch` names `static` if nothing was said, and asks for --standalone where port 29500 is taken.
    """
    if args.standalone or args.nnodes in ("1", "1:1"):
        args.standalone, args.rdzv_backend, args.rdzv_endpoint = False, "fixed", f"{LOOPBACK}:0"
    elif args.rdzv_backend == "static":
        args.rdzv_backend = "fixed"
        args.rdzv_endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or 29500}"
        place = f"is_host={args.node_rank == 0},node_rank={args.node_rank}"
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, place)))
    return args


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    rendezvous_handler_registry.register("fixed", FixedNodes)
    rendezvous_handler_registry.register("elastic", elastic)
    if arguments[:1] not in (["torchrun"], ["accelerate"]):
        sys.exit(__doc__)
    run = torchrun.run
    torchrun.run = lambda args: run(closed(args))
    screen_output()  # accelerate prints the failed command, whose URLs may hold secrets
    sys.argv = arguments  # the launchers read it
    try:
        if arguments[0] == "torchrun":
            torchrun.main()
        else:
            from accelerate.commands import launch

            launch.main()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
