"""The report of a run: one self-contained HTML page for a privacy officer and a researcher alike.

Whatever came from the job or the sites is escaped by `charts.element`, so a site called
`<script>` is a site with a strange name.
"""

import math
import shlex
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from privacy.events import ADD_OR_REMOVE_ONE, ZERO_OUT
from simulations import charts, page, shown
from simulations.charts import Markup, element, finite
from simulations.headline import Headline, headline
from simulations.secure_sums import lying_groups, who_may_lie, who_saw_what
from strategies.measured import SHOWN_BY

TAGLINE = "Hear the chorus, never the voice."
MANY_SITES = 12  # Beyond it a line and a label for every site would hide what they show.


_MARK = "M3 10v4M9 6v12M15 2v20M21 7v10M27 10v4"


def render_report(*, job_toml: str, summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """Render the whole page; whatever is missing, NaN or infinite is shown as such and never raises.

    `summary` is what `simulate --json` prints plus what every site spent; `rounds` has one mapping a round, in order.
    Deterministic: the same run gives the same text.
    """
    name = str(summary.get("name") or "unnamed run")
    privacy = _Privacy.read(summary, placement=_placement(job_toml))
    if (privacy.whole.get("sampling_rate") or 1) < 1:  # Who took part, and how many did, is the server's secret.
        rounds = [{**entry, "contributors": None, "failures": None} for entry in rounds]
    measures = summary.get("measures")
    main = element(
        "main",
        _measured(summary) if measures else _outcome(summary),
        _spending(summary, rounds, privacy),
        *_sums(summary, privacy),
        *([] if measures else [_curves(rounds), _spread(summary)]),
        page.section("rounds", "Round by round", _rounds_table(rounds)),
        _guarantee(summary, privacy),
        page.section(
            "job", "The job", page.details("The resolved job file", element("pre", element("code", job_toml)))
        ),
    )
    body = element("body", _header(name, summary, privacy), main, _footer(summary))
    return page.document(f"{name} · fedchorus report", body)


@dataclass(frozen=True)
class _Privacy:
    """What the run states about its privacy, read once: three sections speak of it and must not disagree."""

    by_site: Mapping[str, float | None]
    largest: float | None  # Record-level epsilon; infinite where a site has no bound.
    delta: float | None
    whole_site: float | None  # Client-level epsilon.
    whole_delta: float | None
    whole: Mapping[str, Any]  # The server's noise for whole sites, where it adds it.
    shared: bool  # Whether whole sites are protected by shares of noise.
    secure: Mapping[str, Any]  # The figures of the secure sums, where there are any.
    adjacency: str  # Of records, and of whole sites where nothing protects records.
    seeded: bool

    @classmethod
    def read(cls, summary: Mapping[str, Any], *, placement: object) -> "_Privacy":
        sites, secure = _at(summary, "sites") or {}, _at(summary, "secure_aggregation")
        return cls(
            by_site={name: shown.as_number(_at(site, "epsilon")) for name, site in sites.items()},
            largest=_largest(_at(summary, "epsilon", "record"), *(_at(site, "epsilon") for site in sites.values())),
            delta=_largest(*(_at(site, "delta") for site in sites.values())),
            whole_site=shown.as_number(_at(summary, "epsilon", "client")),
            whole_delta=_largest(
                _at(summary, "client", "delta"), *(_at(site, "client", "delta") for site in sites.values())
            ),
            whole=_at(summary, "client") or {},
            shared=placement == "distributed",
            secure=secure if isinstance(secure, Mapping) else {},
            adjacency=shown.words(summary.get("adjacency") or "-"),
            seeded=summary.get("noise") == "seeded-simulation",
        )

    @property
    def absent(self) -> bool:
        """Whether no epsilon is stated at all, neither for records nor for whole sites."""
        return self.largest is None and self.whole_site is None

    @property
    def adjacencies(self) -> str:
        """Of each unit that is protected: noise in shares is for zero-out, also where records have another."""
        if self.largest is None or self.whole_site is None:
            return self.adjacency
        of_sites = shown.words(ZERO_OUT if self.shared else ADD_OR_REMOVE_ONE)
        return self.adjacency if of_sites == self.adjacency else f"{self.adjacency} (a record), {of_sites} (a site)"

    @property
    def unbounded(self) -> list[str]:
        """The sites without a finite record-level epsilon, where records are protected at all."""
        if self.largest is None and self.whole_site is not None:
            return []
        return [name for name, epsilon in self.by_site.items() if finite(epsilon) is None]


# --- the sections, in the order of the page -------------------------------------------------------------------------


def _header(name: str, summary: Mapping[str, Any], privacy: _Privacy) -> Markup:
    mark = element("svg", element("path", d=_MARK), viewBox="0 0 30 24", aria_hidden="true")
    brand = element("p", mark, element("span", "fedchorus"), element("em", TAGLINE), class_="brand")
    alarms = {
        "not private": privacy.absent,
        "seeded noise, no protection": privacy.seeded,
        "records are not protected at every site": bool(privacy.unbounded),
    }
    alarm = next((told for told, holds in alarms.items() if holds), None)
    bounds = {
        f"record-level differential privacy, ε ≤ {shown.upward(privacy.largest)} at every site": privacy.largest,
        f"client-level differential privacy, ε ≤ {shown.upward(privacy.whole_site)} for every site": privacy.whole_site,
    }
    bound = " · ".join(told for told, epsilon in bounds.items() if epsilon is not None)
    size = f"Sites: {len(privacy.by_site)} · rounds: {shown.count(summary.get('rounds'))} · "
    lede = element("p", size, element("strong", alarm) if alarm else bound, class_="lede")
    return element("header", brand, element("h1", name), lede)


def _outcome(summary: Mapping[str, Any]) -> Markup:
    metrics = _at(summary, "metrics") or {}
    metric = headline(metrics)
    private = any(_at(summary, "epsilon", unit) is not None for unit in ("record", "client"))
    exact = ", no privacy" if private else ""
    reached = [("Federated", metrics.get(metric.name), "one model, no row moved")]
    if _at(summary, "baselines"):  # A run may do without them.
        local, pooled = (_at(summary, "baselines", kind, metric.name) for kind in ("local", "pooled"))
        reached.append(("Local only", local, f"each site alone{exact}"))
        reached.append(("Pooled", pooled, f"all rows in one place{exact}"))
    if (private := _at(summary, "baselines", "local_private", metric.name)) is not None:
        reached.insert(1, ("Local, as private", private, "each site alone, same epsilon"))
    if (own := _at(summary, "personal", metric.name)) is not None:
        reached.insert(1, ("Own models", own, "each site's own, of this run"))
    figures = []
    for label, share, note in reached:
        figure = element("dd", metric.form(share), class_="first" if label == "Federated" else None)
        figures.append(element("div", element("dt", label), figure, element("dd", note, class_="note")))
    told = ", ".join(f"{label} {metric.form(share)}" for label, share, _ in reached)
    shares = {label: finite(share) for label, share, _ in reached}
    bars = charts.bar_chart(
        "reached", f"{metric.title} reached", told, shares, x_label=metric.title, percent=metric.share
    )
    facts = {
        **_ran(
            summary, {f"Final {name}": shown.figure(value) for name, value in metrics.items() if name != metric.name}
        )
    }
    better = "" if metric.larger else "; less is better"
    columns = page.columns(
        page.captioned(f"{metric.title} on the test rows of all sites{better}", bars), page.facts(facts)
    )
    return page.section("outcome", "What was learnt", element("dl", *figures, class_="figures"), columns)


def _measured(summary: Mapping[str, Any]) -> Markup:
    """A run that measured trained nothing: its figures are read from its model."""
    command = SHOWN_BY.get(str(summary.get("measures")), "statistics")
    told = element("code", f"fedchorus {command} {shlex.quote(str(summary.get('run') or 'RUN'))}")
    return page.section(
        "outcome", "What was measured", element("p", told, " shows the figures."), page.facts(_ran(summary, {}))
    )


def _ran(summary: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "Rounds": shown.count(summary.get("rounds")),
        "Sites": shown.count(len(_at(summary, "sites") or {})),
        **more,
        "Time": shown.number(summary.get("seconds"), lambda seconds: f"{seconds:,.1f} s"),
        "Engine": summary.get("engine") or "-",
        "Seed": shown.count(summary.get("seed")),
        "Job hash": element("code", summary.get("job_hash") or "-"),
    }


def _spending(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], privacy: _Privacy) -> Markup:
    parts = []
    if privacy.absent:
        told = "No noise was added, so what a site sent can reveal its rows."
        what = "every update left its site exact."
        if privacy.secure:
            told = "The server saw sums alone, but no noise was added, so a sum can reveal rows of those who are in it."
            what = "the sums of updates are exact."
        parts.append(page.notice(f"This run was not private: {what}", told))
    elif privacy.unbounded:
        names = shown.listed(privacy.unbounded)
        told = f"What was sent from here is not bounded for single records: {names}."
        parts.append(
            page.notice(f"No finite record-level ε at {len(privacy.unbounded)} of {len(privacy.by_site)} sites.", told)
        )
    if privacy.seeded:
        told = (
            "Whoever knows the seed can take the noise away. The figures are those of the same run with secret noise."
        )
        parts.append(page.notice("Noise was seeded: a simulation, no protection.", told))
    if not privacy.absent:
        noise = {"os": "secret, from the operating system", "seeded-simulation": "seeded: no protection"}
        row = "test row" if summary.get("measures") == "evaluation" else "training row"
        units = {f"one record (a {row})": privacy.largest, "one site": privacy.whole_site}
        facts = {
            "Largest ε at a site": None if privacy.largest is None else shown.upward(privacy.largest),
            "δ": None if privacy.delta is None else shown.upward(privacy.delta),
            "ε for a whole site": None if privacy.whole_site is None else shown.upward(privacy.whole_site),
            "δ for a whole site": None if privacy.whole_delta is None else shown.upward(privacy.whole_delta),
            **_server_noise(privacy.whole),
            "Unit": " and ".join(unit for unit, epsilon in units.items() if epsilon is not None),
            "Adjacency": privacy.adjacencies,
            "Noise": noise.get(str(summary.get("noise")), "-"),
        }
        parts.append(
            page.columns(
                page.captioned("Privacy spent, in all, after each round", _epsilon_chart(rounds)), page.facts(facts)
            )
        )
    table = [] if privacy.largest is None and privacy.whole_site is not None else [_spending_table(summary, privacy)]
    return page.section("spent", "What was spent", *parts, *table)


def _sums(summary: Mapping[str, Any], privacy: _Privacy) -> list[Markup]:
    """What secure aggregation hid and what it cost; nothing in a run without it."""
    sums = privacy.secure
    if not sums:
        return []
    told = [who_saw_what(sums, shown.count), who_may_lie(sums, shown.count)]
    says = " ".join(f"{said[0].upper()}{said[1:]}." for said in told if said is not None)
    if privacy.shared:
        says += (
            " Each site added a share of the noise before its update was masked: the server is not trusted with the "
            "noise, and the shares of the fewest honest sites that a sum may have are enough for the ε stated here."
        )
    facts = {
        "Sites in a sum": shown.count(sums.get("sites_in_a_sum")),
        "Fewest in a sum that is shown": shown.count(sums.get("fewest_in_a_sum")),
        "Sites in league with the server": f"up to {shown.count(sums.get('colluders'))}",
        "Honest sites to hide among": f"{shown.count(sums.get('hidden_among'))} at least",
        "Sites that may fail in a round": shown.count(sums.get("dropouts")),
    }
    if (sums.get("groups") or 1) != 1:
        facts["Groups"] = f"{shown.count(sums.get('groups'))}, combined by {shown.words(sums.get('reduce') or '-')}"
        facts["Lying groups tolerated"] = shown.count(lying_groups(sums))
    costs = {
        "Bits a number": shown.count(sums.get("bits")),
        "A site's masks": f"any {shown.count(sums.get('threshold'))} of {shown.count(sums.get('neighbours'))} peers",
        "Sent by a site in a round": shown.kilobytes(sums.get("upload_bytes")),
        "Sent to it, besides the model": shown.kilobytes(sums.get("download_bytes")),
        "Time in a round": shown.number(
            sums.get("seconds"), lambda seconds: f"{seconds:.2f} s, all sites and the server"
        ),
    }
    columns = page.columns(page.facts(facts), page.facts(costs))
    return [page.section("sums", "What the server saw", element("p", says), columns)]


def _server_noise(whole: Mapping[str, Any]) -> dict[str, str]:
    """What protects whole sites, where the server adds it."""
    if not whole:
        return {}
    return {
        "Noise multiplier on the sum": shown.figure(whole.get("noise_multiplier")),
        "Chance of a site to be asked": shown.share(whole.get("sampling_rate")),
        "Expected cohort": f"{shown.figure(whole.get('expected_cohort'))} of {shown.count(whole.get('clients'))}",
        "Clip norm of an update": shown.figure(whole.get("clip_norm")),
    }


def _spending_table(summary: Mapping[str, Any], privacy: _Privacy) -> Markup:
    heads = ["Site", "Training rows", "Unit", "ε", "δ", "Noise multiplier", "Sampling rate", "Steps", "Adjacency"]
    rows, most = [], []
    for name, epsilon in privacy.by_site.items():
        site = _at(summary, "sites", name)
        rows.append(
            [
                name,
                shown.count(_at(site, "train_rows")),
                "-" if epsilon is None else "record",
                shown.upward(epsilon),
                shown.upward(_at(site, "delta")),
                shown.figure(_at(site, "noise_multiplier")),
                shown.figure(_at(site, "sampling_rate")),
                shown.count(_at(site, "steps")),
                "-" if epsilon is None else privacy.adjacency,
            ]
        )
        most.append(epsilon is not None and epsilon == privacy.largest)
    table = page.table(
        "Spending by site" + "; the largest in bold" * any(most), heads, rows, words={0, 2, 8}, bold=most
    )
    return table if len(rows) <= MANY_SITES else page.details(f"The spending of all {len(rows)} sites", table)


def _epsilon_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw a line a site, the largest spender's strong; for many sites the largest, the median and the whole range."""
    spent = {name: [finite(value) for value in values] for name, values in _spent_so_far(rounds).items()}
    most = max(spent, key=lambda name: spent[name][-1] or 0.0, default="")
    told = (
        f"{most} spent most: ε = {shown.upward(spent[most][-1])} after the last round."
        if spent
        else "Nothing is known."
    )
    lines = [charts.Line(name, values) for name, values in spent.items() if name != most]
    band = None
    if len(spent) > MANY_SITES:
        known = [[value for value in values if value is not None] for values in zip(*spent.values(), strict=True)]
        low = charts.Line("smallest", [min(values, default=None) for values in known])
        high = charts.Line("largest", [max(values, default=None) for values in known])
        lines = [charts.Line("median", [statistics.median(values) if values else None for values in known]), low]
        band, told = (low, high), f"{told} The shaded band holds every site."
    if spent:
        lines.append(charts.Line(f"largest: {most}" if band else most, spent[most], strong=True))
    whole = [finite(entry.get("epsilon_client")) for entry in rounds]
    if any(value is not None for value in whole):
        told = f"{told if spent else ''} A whole site: ε = {shown.upward(whole[-1])} after the last round.".strip()
        lines.append(charts.Line("a whole site", whole, strong=not spent))
    title = "Epsilon over rounds"
    return charts.line_chart("epsilon", title, told, _numbers(rounds), lines, y_label="ε", from_zero=True, band=band)


def _curves(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    figures = []
    rounds = [entry for entry in rounds if entry.get("worst_site") is not None] or rounds
    for one in (Headline("loss", share=False, larger=False), headline(rounds[-1] if rounds else {})):
        metric, form = one.name, one.form
        title = f"{one.title} of the shared model on test rows"
        whole = [finite(entry.get(metric)) for entry in rounds]
        worst = [finite(_at(entry, "sites", entry.get("worst_site"), metric)) for entry in rounds]
        told = (
            f"From {form(whole[0])} to {form(whole[-1])}; the other line is the worst site." if whole else "No rounds."
        )
        lines = [charts.Line("worst site", worst), charts.Line("all sites", whole, strong=True)]
        chart = charts.line_chart(metric, title, told, _numbers(rounds), lines, y_label=metric, percent=one.share)
        figures.append(page.captioned(title, chart))
    return page.section("curves", "How it learnt", page.columns(*figures))


def _spread(summary: Mapping[str, Any]) -> Markup:
    pairs, metric = [], headline(_at(summary, "metrics") or {})
    for name, site in (_at(summary, "sites") or {}).items():
        alone = finite(_at(summary, "baselines", "local", "sites", name, metric.name))
        pairs.append(charts.Pair(name, finite(_at(site, metric.name)), alone, shown.count(_at(site, "test_rows"))))
    pairs.sort(key=lambda pair: -math.inf if pair.dot is None else metric.gain(pair.dot, 0.0), reverse=True)
    reached = [(pair.dot, pair.name) for pair in pairs if pair.dot is not None] or [(math.nan, "-")]
    gains = [metric.gain(pair.dot, pair.ring) for pair in pairs if pair.dot is not None and pair.ring is not None]
    facts = {
        "Best site": f"{metric.form(reached[0][0])}, {reached[0][1]}",
        "Median site": metric.form(statistics.median(share for share, _ in reached)),
        "Worst tenth of sites": metric.form(worst_tenth([share for share, _ in reached])),
        "Worst site": f"{metric.form(reached[-1][0])}, {reached[-1][1]}",
        "Better than alone": f"{sum(gain > 0 for gain in gains)} of {len(gains)} sites" if gains else "-",
    }
    told = "; ".join(f"{key}: {fact}" for key, fact in facts.items())
    shares = [share for pair in pairs for share in (pair.dot, pair.ring) if share is not None] or [0.0, 1.0]
    marks = charts.ticks(min(shares), max(shares))
    half = len(pairs) if len(pairs) <= 2 * MANY_SITES else math.ceil(len(pairs) / 2)
    figures: list[Markup] = []
    for title, part in (
        (f"{metric.title} by site", pairs[:half]),
        (f"{metric.title} by site, continued", pairs[half:]),
    ):
        if part:
            ident, names = f"spread{len(figures)}", ("federated", "local only", "test rows")
            figures.append(
                page.captioned(
                    title, charts.dot_chart(ident, title, told, part, marks=marks, names=names, percent=metric.share)
                )
            )
    drawn = (
        [page.columns(page.facts(facts)), page.columns(*figures)]
        if len(figures) > 1
        else [page.columns(*figures, page.facts(facts))]
    )
    heads = ["Site", "Test rows", "Federated", "Local only", "Rounds taken part"]
    rows = [
        [
            pair.name,
            pair.note,
            metric.form(pair.dot),
            metric.form(pair.ring),
            shown.count(_at(summary, "sites", pair.name, "rounds")),
        ]
        for pair in pairs
    ]
    return page.section(
        "spread", "Site by site", *drawn, page.details("The same as a table", page.table("By site", heads, rows))
    )


def worst_tenth(best_first: Sequence[float]) -> float:
    """The mean over the last tenth of the sites, one at least."""
    return statistics.fmean(best_first[-max(1, len(best_first) // 10) :])


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    metric = headline(rounds[-1] if rounds else {})
    heads = [
        "Round",
        "Loss",
        metric.title,
        "Worst site",
        "Contributors",
        "ε (largest)",
        "ε (site)",
        "Seconds",
    ]
    secure = any(entry.get("secure") for entry in rounds)
    heads += [*(["KB up", "Secure sum (s)"] if secure else []), "Failures"]
    spent = _spent_so_far(rounds)
    rows = []
    for i, (number, entry) in enumerate(zip(_numbers(rounds), rounds, strict=True)):
        failures = [f"{site} ({reason})" for site, reason in (entry.get("failures") or {}).items()]
        rows.append(
            [
                str(number),
                shown.figure(entry.get("loss")),
                metric.form(entry.get(metric.name)),
                entry.get("worst_site") or "-",
                "-" if entry.get("contributors") is None else shown.count(len(entry["contributors"])),
                shown.upward(_largest(*(values[i] for values in spent.values()))),
                shown.upward(entry.get("epsilon_client")),
                shown.seconds(entry.get("seconds")),
                *([shown.thousands(_at(entry, "secure", "upload_bytes"))] if secure else []),
                *([shown.seconds(_at(entry, "secure", "seconds"))] if secure else []),
                shown.listed(failures) or "-",
            ]
        )
    return page.details(
        f"Every round ({len(rounds)})", page.table("Figures of every round", heads, rows, words={0, 3, len(heads) - 1})
    )


def _guarantee(summary: Mapping[str, Any], privacy: _Privacy) -> Markup:
    says, row = [], "test row" if summary.get("measures") == "evaluation" else "training row"
    if privacy.absent:
        what = "sums of updates tell about a site's rows" if privacy.secure else "a site's updates tell about its rows"
        says.append(f"Nothing: no noise was added, so no bound holds on what {what}.")
    if privacy.largest is not None:
        factor = f", a factor of {shown.upward(math.exp(privacy.largest))}" if privacy.largest < 12 else ""
        says.append(
            f"The unit is one record (a {row}); the adjacency is “{privacy.adjacency}”. Whatever anyone may "
            f"conclude from all that a site sent in this run, one such change of its {row}s makes that at most "
            f"e^ε times as likely, plus δ. The largest spending of a site is ε = {shown.upward(privacy.largest)}"
            f"{factor}, at δ ≤ {shown.upward(privacy.delta)}."
        )
    if privacy.whole_site is not None:
        seen = "the sum alone" if privacy.secure else "each update"
        where = f"the server, which sees {seen}, adds the noise" if privacy.whole else "each site adds the noise"
        unit = "all its rows at once, and whether it took part"
        if privacy.shared:
            where = "each site adds a share, and the server, which is not trusted with it, sees sums alone: the noise"
            zero_out = shown.words(ZERO_OUT)
            unit = f"all its rows at once; “{zero_out}”: its updates become zero, while who takes part is public"
        says.append(
            f"With a whole site as the unit ({unit}), ε = {shown.upward(privacy.whole_site)} at δ = "
            f"{shown.upward(privacy.whole_delta)}, for all models of this run: {where} that hides one site's whole "
            "update."
        )
        if (privacy.whole.get("sampling_rate") or 1) < 1:
            says.append("This counts on nobody outside the server learning which sites took part in a round.")
    if privacy.seeded:
        says.append("As the noise was seeded, this holds for the same run with secret noise, and not for this one.")
    not_said = (
        "The model that was evaluated was trained elsewhere: nothing here bounds what it tells about the rows that it "
        "was trained on. "
        if summary.get("measures") == "evaluation"
        else ""
    ) + (
        "A person with several rows is protected less than one row is; a site as a whole is not protected by a "
        "record-level bound, and facts that hold for a whole population are by none. Row counts of sites are public. "
        "The figures of models on this page are the researcher's view of a simulation: computed on test rows, "
        "exact, and not covered by the guarantee; nor are the models trained alone and pooled that they are compared "
        "with."
    )
    command = element("code", f"fedchorus audit {shlex.quote(str(summary.get('run') or 'RUN'))}")
    return page.section(
        "guarantee",
        "What this guarantee says, and what it does not",
        element("p", element("strong", "What it says. "), " ".join(says)),
        element("p", element("strong", "What it does not say. "), not_said),
        element("p", element("strong", "How to check. "), command, " recomputes what was spent, offline."),
    )


def _footer(summary: Mapping[str, Any]) -> Markup:
    versions = " · ".join(f"{name} {version}" for name, version in (_at(summary, "versions") or {}).items())
    quiet = "This page loads nothing and runs nothing: no script, font, image or request."
    return element("footer", element("p", versions), element("p", quiet))


# --- reading the run ------------------------------------------------------------------------------------------------


def _placement(job_toml: str) -> object:
    """Where the noise for whole sites is added, or None."""
    try:
        return _at(tomllib.loads(job_toml), "privacy", "client", "placement")
    except ValueError:
        return None


def _at(tree: object, *path: Any) -> Any:
    """Follow the keys down nested mappings; None where one of them is missing."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _largest(*values: object) -> float | None:
    return max((number for number in map(shown.as_number, values) if number is not None), default=None)


def _numbers(rounds: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(finite(entry.get("round")) or i) for i, entry in enumerate(rounds, 1)]


def _spent_so_far(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return every site's epsilon after each round; a round without the site leaves what it had spent before."""
    spent: dict[str, list[float | None]] = {name: [] for entry in rounds for name in entry.get("epsilon") or {}}
    for entry in rounds:
        for name, values in spent.items():
            value = shown.as_number(_at(entry, "epsilon", name))
            values.append(values[-1] if value is None and values else value)
    return spent
