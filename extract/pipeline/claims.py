"""The open drafts of a run: by them other runs see which slides it is at work on."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from extract.pipeline.jobs import Column
from extract.store import Execution, Store
from extract.store.core.draft import LEASE_S, Draft


class Claims:
    """What a run is at work on, by slide and entry.

    Args:
        store: where the drafts lie.
        executions: entry → how its rows are computed.
    """

    def __init__(self, store: Store, executions: Mapping[str, Execution]) -> None:
        self._store, self._executions = store, executions
        self._drafts: dict[tuple[str, str], Draft] = {}

    def __len__(self) -> int:
        return len(self._drafts)

    def open(self, slide_id: str, columns: Sequence[Column]) -> dict[str, Draft]:
        """Claim a slide for every column, or for none.

        Returns:
            Entry → its draft.

        Raises:
            SlideClaimedError: another run is at work on it.
        """
        drafts: dict[str, Draft] = {}
        try:
            for column in columns:
                drafts[column.entry] = self._store.draft(column.entry, slide_id, self._executions[column.entry])
        except BaseException:
            for draft in drafts.values():
                draft.release()
            raise
        self._drafts |= {(slide_id, entry): draft for entry, draft in drafts.items()}
        return drafts

    def take(self, slide_id: str, entry: str) -> Draft:
        """A draft that is no longer this run's: whoever takes it releases or discards it."""
        return self._drafts.pop((slide_id, entry))

    def release(self, slide_id: str, entries: Iterable[str]) -> None:
        """Give a slide back, with the rows that are saved; what was taken already is passed over."""
        for entry in entries:
            if (draft := self._drafts.pop((slide_id, entry), None)) is not None:
                draft.release()

    def release_all(self) -> None:
        """Give back every slide that is left."""
        for draft in self._drafts.values():
            draft.release()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it the leases of the drafts are renewed."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(LEASE_S / 6):
                for draft in list(self._drafts.values()):
                    draft.touch()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
