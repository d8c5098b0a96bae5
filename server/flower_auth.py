"""Our two plug-ins inside Flower's server: tokens on its control API once more, and the run ids for the audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.common.event_log_plugin import EventLogWriterPlugin
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.event_log.typing import Actor, Event, LogEntry
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

from server.guard import RUNS


class TokenAuthn(NoOpControlAuthnPlugin):  # type: ignore[misc]
    """Validate a control call's token again, behind the guard: a call that went around it still needs one.

    `accepts(token)` says whether it is an operator's or the server's own. All are Flower's one account.
    """

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        super().__init__()
        self._accepts = accepts

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        tokens = [value for key, value in metadata if key == ACCESS_TOKEN_KEY]
        if len(tokens) != 1 or not isinstance(tokens[0], str) or not self._accepts(tokens[0]):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Refuse: tokens are made by the coordinator, and by nobody else."""
        return None, None


class RunNotes(EventLogWriterPlugin):  # type: ignore[misc]
    """Note the run ids of a control or fleet call in the set that the guard put into its scope; log nothing here."""

    def __init__(self) -> None:
        pass

    def compose_log_before_event(self, request: Any, context: Any, account_info: Any, method_name: str) -> LogEntry:
        return _noted(request, context)

    def compose_log_after_event(
        self, request: Any, context: Any, account_info: Any, method_name: str, response: Any
    ) -> LogEntry:
        return _noted(response, context)

    def write_log(self, log_entry: LogEntry) -> None:
        """Nothing: the guard's audit log has one entry for the whole call."""


def _noted(message: Any, context: Any) -> LogEntry:
    context.scope.get(RUNS, set()).update(_runs_of(message))
    actor = Actor(actor_id=None, description=None, ip_address="")
    return LogEntry(timestamp="", actor=actor, event=Event(action="", run_id=None, fab_hash=None), status="")


def _runs_of(message: Any) -> Iterator[int]:
    if run := getattr(message, "run_id", 0):
        yield int(run)
    for inner in getattr(message, "messages_list", ()):
        yield int(inner.metadata.run_id)
