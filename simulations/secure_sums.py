"""What a job's secure sums hide and what they cost: the figures before a run, and the words before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from privacy.secagg.channel import NONCE, TAG
from privacy.secagg.roster import Member, Roster
from privacy.secagg.session import Shape
from privacy.secagg.view import BOX
from privacy.secagg.wire import ADVERT, SECRET, SIGNATURE, Kind, u16, write, write_slots, write_table
from strategies.cohort import public_cohort
from strategies.job import Job
from strategies.job_privacy import Robust
from strategies.robust import liars, most_borne
from strategies.secure import SecureSum, groups_of

Figures = Mapping[str, Any]
NAMED = {
    "median": "median",
    "trimmed-mean": "trimmed mean",
    "krum": "Krum choice",
    "multi-krum": "multi-Krum mean",
    "geometric-median": "geometric median",
}


def planned(job: Job, sums: SecureSum, names: Sequence[str]) -> dict[str, Any]:
    """The figures of `sums` among the sites `names`, under the names that a run's summary has for them.

    `upload_bytes` and `download_bytes` are a site's in the first round when nobody fails, as the formats say and the
    run counts them: what carries the messages, and the model that is sent, come on top.
    """
    # Placeholders: only how long the session's text is depends on them.
    roster = Roster(job.name, 1, tuple(Member(slot, name, f"{slot:064x}") for slot, name in enumerate(names, start=1)))
    terms = sums.terms(job, roster)
    asked = public_cohort(sorted(names), job.cohort.size, seed=job.seed, round_number=1)
    up = down = 0
    for group in groups_of(job, asked):
        members = tuple(roster.member(name).slot for name in group)
        blank = "0" * 64
        session = terms.session(members=members, round_number=1, model=blank, server=blank, nonce=blank)
        up += len(group) * (sums.ring.nbytes + _sent_up(session.degree))
        down += len(group) * (len(bytes(session)) + _sent_down(members, session.degree))
    return {**protection(job, sums), "upload_bytes": up / len(asked), "download_bytes": down / len(asked)}


def protection(job: Job, sums: SecureSum) -> dict[str, Any]:
    """Who is hidden among whom, as plan and summary state it."""
    secure, shape = job.secure_aggregation, sums.shape
    assert secure is not None
    return {
        "groups": job.secure_groups,
        **({"regions": list(job.regions)} if job.regions else {}),
        "reduce": job.robust.reduce,
        "sites_in_a_sum": shape.clients,
        "fewest_in_a_sum": shape.minimum,
        "colluders": secure.colluders,
        "hidden_among": hidden_among(shape, secure.colluders),
        "threshold": shape.threshold,
        "neighbours": shape.degree,
        "dropouts": shape.dropouts,
        "bits": secure.bits,
        **({} if job.robust.plain else {"byzantine": liars(job.robust, secure.groups)}),
    }


def hidden_among(shape: Shape, colluders: int) -> int:
    """The fewest honest sites, each one itself included, whose updates are in a sum that is shown."""
    return shape.minimum - colluders


def lying_groups(figures: Figures) -> int:
    """How many groups may lie or be lost before the rest can be moved at will; 0 for a plain sum."""
    groups, reduce = figures.get("groups"), figures.get("reduce")
    if not isinstance(groups, int) or groups < 1:
        return 0
    most, stated = most_borne(str(reduce), groups), figures.get("byzantine")
    if reduce in ("median", "geometric-median"):
        return most
    return min(most, stated if isinstance(stated, int) else liars(Robust(), groups))


def who_saw_what(figures: Figures, count: Callable[[object], str] = str) -> str:
    """Say in words what the server sees and among how many each site is hidden. `count` writes a number."""
    said = {key: count(figures.get(key)) for key in ("sites_in_a_sum", "fewest_in_a_sum", "colluders", "hidden_among")}
    groups = figures.get("groups")
    alone = not isinstance(groups, int) or groups == 1
    seen = (
        f"the server sees one sum of {said['sites_in_a_sum']} sites a round and no update by itself"
        if alone
        else f"the server sees a sum for each of {count(groups)} "
        f"{'regions' if figures.get('regions') else 'groups'} of {said['sites_in_a_sum']} sites or "
        f"{'more' if figures.get('regions') else 'one more'}, and no update by itself"
    )
    where = "" if alone else " of its region, not of all" if figures.get("regions") else " of its group, not of all"
    league = (
        "" if not figures.get("colluders") else f", even with {said['colluders']} of them in league with the server"
    )
    return (
        f"{seen}; a sum of fewer than {said['fewest_in_a_sum']} is never shown, so each site is hidden among at least "
        f"{said['hidden_among']} honest ones{where}, itself included{league}"
    )


def who_may_lie(figures: Figures, count: Callable[[object], str] = str) -> str | None:
    """Say how many groups the reduction bears that lie or are lost; None where everything is one sum."""
    groups, how = figures.get("groups"), NAMED.get(str(figures.get("reduce")))
    if how is None:
        return None
    borne = count(lying_groups(figures))
    return f"the {how} of the groups' means bears up to {borne} of {count(groups)} that lie or are lost"


def _sent_up(degree: int) -> int:
    """Bytes of a client's five answers, but for its masked words, with `degree` neighbours."""
    peers, sealed = range(1, degree + 1), bytes(NONCE + TAG)
    return ADVERT + sum(
        map(
            len,
            (
                write(Kind.SHARES, sealed, write_table(dict.fromkeys(peers, bytes(BOX)))),
                write(Kind.MASKED, sealed),
                write(Kind.AGREEMENT, bytes(SIGNATURE)),
                write(Kind.REVEAL, sealed, write_table(dict.fromkeys(peers, bytes(SECRET)))),
            ),
        )
    )


def _sent_down(members: Sequence[int], degree: int) -> int:
    """Bytes of the server's messages to one client, but for the proposal and the model."""
    peers = range(1, degree + 1)
    return sum(
        map(
            len,
            (
                write(Kind.COHORT, u16(len(members)), bytes(len(members) * ADVERT)),
                write(Kind.BOXES, write_table(dict.fromkeys(peers, bytes(BOX)))),
                write(Kind.SURVIVORS, write_slots(members)),
                write(Kind.EVIDENCE, write_table(dict.fromkeys(peers, bytes(SIGNATURE)))),
            ),
        )
    )
