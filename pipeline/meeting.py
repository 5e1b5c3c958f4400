"""Where ranks find each other before anything that could hang: a key-value store whose every wait has an end."""

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from pipeline.errors import PeerLost, UserError
from pipeline.runtime import Ranks, Rendezvous, StopSignal
from pipeline.store import open_store, seal, unseal

NEWS_SECONDS = 1.0  # between two looks for a stop on another rank
MEETING_SECONDS = 10.0  # for finding the store
MAX_VALUE_BYTES = 8 << 20  # that torch's store takes at once; who appends could make more of it


class Meeting:
    """Rank 0 hosts the store, unless the launcher does or `hosts` is False. All times are in seconds."""

    def __init__(self, rank: int, world_size: int, place: Rendezvous, timeout: float, hosts: bool = True):
        """Raises UserError where rank 0 can't listen at the address, or where nobody answers there."""
        from torch.distributed import DistError, HashStore, PrefixStore

        self.rank, self.world_size, self.timeout, self.errors = rank, world_size, timeout, DistError
        try:
            store = HashStore() if world_size == 1 else open_store(place, hosts and rank == 0, timeout)
        except DistError:
            raise UserError(
                f"MASTER_ADDR={place.address} MASTER_PORT={place.port}: no answer from rank 0 within {timeout:g} s;"
                " start rank 0, check that the name leads to its node, and that the port is free there and open between"
                " the nodes"
            ) from None
        self.seen: set[int] = set()
        self.name = place.name
        self.store = PrefixStore(place.name, store)

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, seal(f"{self.name}/{key}", json.dumps(value).encode()).decode())

    def _get(self, key: str, writer: str) -> Any:
        """Raises UserError if the value was not written by one of the ranks."""
        value = self.store.get(key)
        if len(value) > MAX_VALUE_BYTES:
            raise UserError(
                f"rendezvous: key {self.name}/{key}, expected from {writer}, has {len(value)} bytes, at most"
                f" {MAX_VALUE_BYTES} are read; close the port to other machines"
            )
        data = unseal(f"{self.name}/{key}", value, writer)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise UserError(
                f"rendezvous: key {self.name}/{key}, expected from {writer}, is not JSON: another program has written"
                " it; close the port to other machines"
            ) from None

    def tell(self, name: str, value: Any) -> None:
        """Raises PeerLost where the store is gone, as all methods but `collect` do."""
        with self._peers():
            self._set(f"{name}/{self.rank}", value)

    def collect(self, name: str, ranks: Iterable[int] | None = None, timeout: float | None = None) -> dict[int, Any]:
        """What ranks have told under this name, of those that did so in time. Raises UserError as `_get` does."""
        end, told = time.monotonic() + (self.timeout if timeout is None else timeout), {}
        for rank in range(self.world_size) if ranks is None else ranks:
            key = f"{name}/{rank}"
            with contextlib.suppress(self.errors):
                left = end - time.monotonic()
                if left > 0:
                    self.store.wait([key], timedelta(seconds=left))
                if self.store.check([key]):
                    told[rank] = self._get(key, f"rank {rank}")
                    self.seen.add(rank)
        return told

    def answer(self, name: str, value: Any) -> None:
        """What rank 0 says to what all have told."""
        with self._peers():
            self._set(f"{name}/answer", value)

    def hear(self, name: str) -> Any:
        """Waits for rank 0's answer, which itself waits for all ranks."""
        with self._peers():
            self.store.wait([f"{name}/answer"], timedelta(seconds=2 * self.timeout + 5))
            return self._get(f"{name}/answer", "rank 0")

    def announce(self, name: str) -> None:
        """Tells all, whoever asks by `announced`."""
        with self._peers():
            self._set(name, True)

    def announced(self, name: str) -> bool:
        with self._peers():
            return self.store.check([name]) and self._get(name, "another rank")

    def leave(self) -> None:
        """Rank 0 leaves last, since the store ends with it."""
        with contextlib.suppress(PeerLost, UserError):
            self.tell("left", True)
            if self.rank == 0:
                self.collect("left", self.seen, timeout=2.0)

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except self.errors:
            raise PeerLost("no word from rank 0; its own message says why") from None


class StopNews:
    """Carries a wish to stop to ranks that can't vote since they wait for data, over the store in which ranks meet."""

    def __init__(self, stop: StopSignal, ranks: Ranks, place: Rendezvous):
        self.stop, self.ranks, self.place = stop, ranks, place
        self.asked = float("-inf")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._carry, name="stop-news", daemon=True)
        if ranks.world_size > 1:
            self.thread.start()

    def close(self) -> None:
        """Before the process ends: Python aborts when a thread is inside the store at that moment."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(timeout=2.0)

    def wanted(self) -> bool:
        """Whether this rank or another one wants to stop. To be asked again and again during a wait."""
        self.asked = time.monotonic()
        return self.stop.wanted()

    def _carry(self) -> None:
        meeting = None
        with contextlib.suppress(UserError, PeerLost):  # without a store a rank is asked at its next vote
            while not self.ended.wait(NEWS_SECONDS):
                waits = time.monotonic() - self.asked < 2 * NEWS_SECONDS
                if meeting is None and (waits or self.stop.wanted()):
                    meeting = Meeting(self.ranks.rank, self.ranks.world_size, self.place, MEETING_SECONDS, hosts=False)
                if meeting is not None and self.stop.wanted():
                    return meeting.announce("stop")
                if meeting is not None and waits and meeting.announced("stop"):
                    return self.stop.request("a stop on another rank")
