"""The inline engine: every client in this process, one after the other, on one resident model.

Contributions are added as they are made, so memory is that of one model and one total, whatever the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from privacy.errors import Refused
from server.collect import Failure
from simulations.faults import DroppedOut, Handler
from strategies.messages import Answer, MalformedMessage, Request

OPEN_CLIENTS = 1024  # Kept open between rounds; the others are opened again, so memory does not follow the cohort.


class InlineTransport:
    """A `server.collect.Transport` that calls the clients directly. Bugs in a client surface as what they are."""

    def __init__(self, open_client: Callable[[str], Handler]) -> None:
        self._client = lru_cache(maxsize=OPEN_CLIENTS)(open_client)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        for site, request in requests.items():
            try:
                yield site, self._client(site).handle(request)
            except (DroppedOut, MalformedMessage, Refused) as error:
                yield site, Failure(site, str(error))
