"""What can go wrong, grouped by who can mend it.

FedchorusError                 every error a person may see: one line, no stack trace
├── JobError                   the person who wrote the job file
│   └── BudgetExceeded         ... and asked for more than the budget allows
├── DataError                  the person who holds the data
├── RunError                   the person who names a run folder or runs one
│   └── RoundAborted           ... because too few were left for a secure sum to be shown
├── Refused                    nobody at this site: a request was not what an honest server sends, and nothing left
├── UnsupportedEvent           an event that no accountant here can bound: refused, never approximated
└── LedgerError                a ledger that cannot be written or trusted
    └── LedgerCorrupt          ... because an entry is not what was signed
"""

from __future__ import annotations


class FedchorusError(Exception):
    """An error with a message for a person: what was expected, what came, what to do."""


class JobError(FedchorusError):
    """The job file or an override asks for something that does not exist or cannot work."""


class BudgetExceeded(JobError):
    """The plan would spend more epsilon than the budget allows; raised before any data are touched."""


class DataError(FedchorusError):
    """The data are not what the schema says."""


class RunError(FedchorusError):
    """A run folder is missing, incomplete or of another kind than the command needs."""


class RoundAborted(RunError):
    """A secure sum ended without one: too few were left at some stage. Names the stage, the count and the threshold."""


class Refused(FedchorusError):
    """A client keeps its secrets: what it was asked for, or was to send, is not what its session allows."""


class UnsupportedEvent(FedchorusError):
    """No accountant can bound this event."""


class LedgerError(FedchorusError):
    """A ledger cannot be opened, written or continued."""


class LedgerCorrupt(LedgerError):
    """Entry `entry` (counted from 0) of `site`'s ledger is not what was signed, for the reason `why`."""

    def __init__(self, site: str, entry: int, why: str) -> None:
        super().__init__(f"ledger of {site}, entry {entry}: {why}")
        self.site = site
        self.entry = entry
        self.why = why


_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")


def wants_memory(error: BaseException) -> bool:
    """Whether a program ran out of memory: torch's allocators, of the CPU and of accelerators, say so in more classes
    than one, and some in the text of a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
