"""The report of a run: one self-contained HTML page for a privacy officer and a researcher alike.

Whatever came from the job or the sites is escaped by `charts.element`, so a site called
`<script>` is a site with a strange name. Figures that a run does not have read "-"; an infinite one reads "∞".
"""

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from numbers import Real
from typing import Any

from simulations import charts, page
from simulations.charts import Markup, element, finite

TAGLINE = "Hear the chorus, never the voice."
MANY_SITES = 12  # Beyond it a line and a label for every site would hide what they show.


_MARK = "M3 10v4M9 6v12M15 2v20M21 7v10M27 10v4"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render_report(*, job_toml: str, summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """Render the whole page; whatever is missing, NaN or infinite is shown as such and never raises.

    `summary` is what `simulate --json` prints plus what every site spent; `rounds` has one mapping a round, in order.
    Deterministic: the same run gives the same text.
    """
    name = str(summary.get("name") or "unnamed run")
    privacy = _Privacy.read(summary)
    if (privacy.whole.get("sampling_rate") or 1) < 1:  # Who took part, and how many did, is the server's secret.
        rounds = [{**entry, "contributors": None, "failures": None} for entry in rounds]
    main = element(
        "main",
        _outcome(summary),
        _spending(summary, rounds, privacy),
        _curves(rounds),
        _spread(summary),
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
    adjacency: str
    seeded: bool

    @classmethod
    def read(cls, summary: Mapping[str, Any]) -> "_Privacy":
        sites = _at(summary, "sites") or {}
        return cls(
            by_site={name: _number(_at(site, "epsilon")) for name, site in sites.items()},
            largest=_largest(_at(summary, "epsilon", "record"), *(_at(site, "epsilon") for site in sites.values())),
            delta=_largest(*(_at(site, "delta") for site in sites.values())),
            whole_site=_number(_at(summary, "epsilon", "client")),
            whole_delta=_largest(
                _at(summary, "client", "delta"), *(_at(site, "client", "delta") for site in sites.values())
            ),
            whole=_at(summary, "client") or {},
            adjacency=str(summary.get("adjacency") or "-").replace("_", " "),
            seeded=summary.get("noise") == "seeded-simulation",
        )

    @property
    def absent(self) -> bool:
        """Whether no epsilon is stated at all, neither for records nor for whole sites."""
        return self.largest is None and self.whole_site is None

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
        f"record-level differential privacy, ε ≤ {_upward(privacy.largest)} at every site": privacy.largest,
        f"client-level differential privacy, ε ≤ {_upward(privacy.whole_site)} for every site": privacy.whole_site,
    }
    bound = " · ".join(told for told, epsilon in bounds.items() if epsilon is not None)
    size = f"Sites: {len(privacy.by_site)} · rounds: {_count(summary.get('rounds'))} · "
    lede = element("p", size, element("strong", alarm) if alarm else bound, class_="lede")
    return element("header", brand, element("h1", name), lede)


def _outcome(summary: Mapping[str, Any]) -> Markup:
    metrics = _at(summary, "metrics") or {}
    private = any(_at(summary, "epsilon", unit) is not None for unit in ("record", "client"))
    exact = ", no privacy" if private else ""
    reached = [
        ("Federated", metrics.get("accuracy"), "one model, no row moved"),
        ("Local only", _at(summary, "baselines", "local", "accuracy"), f"each site alone{exact}"),
        ("Pooled", _at(summary, "baselines", "pooled", "accuracy"), f"all rows in one place{exact}"),
    ]
    if (private := _at(summary, "baselines", "local_private", "accuracy")) is not None:
        reached.insert(1, ("Local, as private", private, "each site alone, same epsilon"))
    figures = []
    for label, share, note in reached:
        figure = element("dd", _share(share), class_="first" if label == "Federated" else None)
        figures.append(element("div", element("dt", label), figure, element("dd", note, class_="note")))
    told = ", ".join(f"{label} {_share(share)}" for label, share, _ in reached)
    shares = {label: finite(share) for label, share, _ in reached}
    bars = charts.bar_chart("reached", "Accuracy reached", told, shares, x_label="accuracy")
    facts = {
        "Rounds": _count(summary.get("rounds")),
        "Sites": _count(len(_at(summary, "sites") or {})),
        **{f"Final {metric}": _figure(value) for metric, value in metrics.items() if metric != "accuracy"},
        "Time": _shown(summary.get("seconds"), lambda seconds: f"{seconds:,.1f} s"),
        "Engine": summary.get("engine") or "-",
        "Seed": _count(summary.get("seed")),
        "Job hash": element("code", summary.get("job_hash") or "-"),
    }
    columns = page.columns(page.captioned("Accuracy on the test rows of all sites", bars), page.facts(facts))
    return page.section("outcome", "What was learnt", element("dl", *figures, class_="figures"), columns)


def _spending(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], privacy: _Privacy) -> Markup:
    parts = []
    if privacy.absent:
        told = "No noise was added, so what a site sent can reveal its rows."
        parts.append(page.notice("This run was not private: every update left its site exact.", told))
    elif privacy.unbounded:
        names = _listed(privacy.unbounded)
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
        units = {"one record (a training row)": privacy.largest, "one site": privacy.whole_site}
        facts = {
            "Largest ε at a site": None if privacy.largest is None else _upward(privacy.largest),
            "δ": None if privacy.delta is None else _upward(privacy.delta),
            "ε for a whole site": None if privacy.whole_site is None else _upward(privacy.whole_site),
            "δ for a whole site": None if privacy.whole_delta is None else _upward(privacy.whole_delta),
            **_server_noise(privacy.whole),
            "Unit": " and ".join(unit for unit, epsilon in units.items() if epsilon is not None),
            "Adjacency": privacy.adjacency,
            "Noise": noise.get(str(summary.get("noise")), "-"),
        }
        parts.append(
            page.columns(
                page.captioned("Privacy spent, in all, after each round", _epsilon_chart(rounds)), page.facts(facts)
            )
        )
    table = [] if privacy.largest is None and privacy.whole_site is not None else [_spending_table(summary, privacy)]
    return page.section("spent", "What was spent", *parts, *table)


def _server_noise(whole: Mapping[str, Any]) -> dict[str, str]:
    """What protects whole sites, where the server adds it."""
    if not whole:
        return {}
    return {
        "Noise multiplier on the sum": _figure(whole.get("noise_multiplier")),
        "Chance of a site to be asked": _share(whole.get("sampling_rate")),
        "Expected cohort": f"{_figure(whole.get('expected_cohort'))} of {_count(whole.get('clients'))}",
        "Clip norm of an update": _figure(whole.get("clip_norm")),
    }


def _spending_table(summary: Mapping[str, Any], privacy: _Privacy) -> Markup:
    heads = ["Site", "Training rows", "Unit", "ε", "δ", "Noise multiplier", "Sampling rate", "Steps", "Adjacency"]
    rows, most = [], []
    for name, epsilon in privacy.by_site.items():
        site = _at(summary, "sites", name)
        rows.append(
            [
                name,
                _count(_at(site, "train_rows")),
                "-" if epsilon is None else "record",
                _upward(epsilon),
                _upward(_at(site, "delta")),
                _figure(_at(site, "noise_multiplier")),
                _figure(_at(site, "sampling_rate")),
                _count(_at(site, "steps")),
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
    told = f"{most} spent most: ε = {_upward(spent[most][-1])} after the last round." if spent else "Nothing is known."
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
        told = f"{told if spent else ''} A whole site: ε = {_upward(whole[-1])} after the last round.".strip()
        lines.append(charts.Line("a whole site", whole, strong=not spent))
    title = "Epsilon over rounds"
    return charts.line_chart("epsilon", title, told, _numbers(rounds), lines, y_label="ε", from_zero=True, band=band)


def _curves(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    figures = []
    for metric, form in (("loss", _figure), ("accuracy", _share)):
        title = f"{metric.capitalize()} of the shared model on test rows"
        whole = [finite(entry.get(metric)) for entry in rounds]
        worst = [finite(_at(entry, "sites", entry.get("worst_site"), metric)) for entry in rounds]
        told = (
            f"From {form(whole[0])} to {form(whole[-1])}; the other line is the worst site." if whole else "No rounds."
        )
        lines = [charts.Line("worst site", worst), charts.Line("all sites", whole, strong=True)]
        share = metric == "accuracy"
        chart = charts.line_chart(metric, title, told, _numbers(rounds), lines, y_label=metric, percent=share)
        figures.append(page.captioned(title, chart))
    return page.section("curves", "How it learnt", page.columns(*figures))


def _spread(summary: Mapping[str, Any]) -> Markup:
    pairs = []
    for name, site in (_at(summary, "sites") or {}).items():
        alone = finite(_at(summary, "baselines", "local", "sites", name, "accuracy"))
        pairs.append(charts.Pair(name, finite(_at(site, "accuracy")), alone, _count(_at(site, "test_rows"))))
    pairs.sort(key=lambda pair: -math.inf if pair.dot is None else pair.dot, reverse=True)
    reached = [(pair.dot, pair.name) for pair in pairs if pair.dot is not None] or [(math.nan, "-")]
    gains = [pair.dot - pair.ring for pair in pairs if pair.dot is not None and pair.ring is not None]
    facts = {
        "Best site": f"{_share(reached[0][0])}, {reached[0][1]}",
        "Median site": _share(statistics.median(share for share, _ in reached)),
        "Worst site": f"{_share(reached[-1][0])}, {reached[-1][1]}",
        "Better than alone": f"{sum(gain > 0 for gain in gains)} of {len(gains)} sites" if gains else "-",
    }
    told = "; ".join(f"{key}: {fact}" for key, fact in facts.items())
    shares = [share for pair in pairs for share in (pair.dot, pair.ring) if share is not None] or [0.0, 1.0]
    marks = charts.ticks(min(shares), max(shares))
    half = len(pairs) if len(pairs) <= 2 * MANY_SITES else math.ceil(len(pairs) / 2)
    figures: list[Markup] = []
    for title, part in (("Accuracy by site", pairs[:half]), ("Accuracy by site, continued", pairs[half:])):
        if part:
            ident, names = f"spread{len(figures)}", ("federated", "local only", "test rows")
            figures.append(page.captioned(title, charts.dot_chart(ident, title, told, part, marks=marks, names=names)))
    drawn = (
        [page.columns(page.facts(facts)), page.columns(*figures)]
        if len(figures) > 1
        else [page.columns(*figures, page.facts(facts))]
    )
    heads = ["Site", "Test rows", "Federated", "Local only", "Rounds taken part"]
    rows = [
        [pair.name, pair.note, _share(pair.dot), _share(pair.ring), _count(_at(summary, "sites", pair.name, "rounds"))]
        for pair in pairs
    ]
    return page.section(
        "spread", "Site by site", *drawn, page.details("The same as a table", page.table("By site", heads, rows))
    )


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    heads = [
        "Round",
        "Loss",
        "Accuracy",
        "Worst site",
        "Contributors",
        "ε (largest)",
        "ε (site)",
        "Seconds",
        "Failures",
    ]
    spent = _spent_so_far(rounds)
    rows = []
    for i, (number, entry) in enumerate(zip(_numbers(rounds), rounds, strict=True)):
        failures = [f"{site} ({reason})" for site, reason in (entry.get("failures") or {}).items()]
        rows.append(
            [
                str(number),
                _figure(entry.get("loss")),
                _share(entry.get("accuracy")),
                entry.get("worst_site") or "-",
                "-" if entry.get("contributors") is None else _count(len(entry["contributors"])),
                _upward(_largest(*(values[i] for values in spent.values()))),
                _upward(entry.get("epsilon_client")),
                _shown(entry.get("seconds"), lambda seconds: f"{seconds:.2f}"),
                _listed(failures) or "-",
            ]
        )
    return page.details(
        f"Every round ({len(rounds)})", page.table("Figures of every round", heads, rows, words={0, 3, 8})
    )


def _guarantee(summary: Mapping[str, Any], privacy: _Privacy) -> Markup:
    says = []
    if privacy.absent:
        says.append("Nothing: no noise was added, so no bound holds on what a site's updates tell about its rows.")
    if privacy.largest is not None:
        factor = f", a factor of {_upward(math.exp(privacy.largest))}" if privacy.largest < 12 else ""
        says.append(
            f"The unit is one record (a training row); the adjacency is “{privacy.adjacency}”. Whatever anyone may "
            "conclude from all that a site sent in this run, one such change of its training rows makes that at most "
            f"e^ε times as likely, plus δ. The largest spending of a site is ε = {_upward(privacy.largest)}{factor}, "
            f"at δ ≤ {_upward(privacy.delta)}."
        )
    if privacy.whole_site is not None:
        where = "the server, which sees each update, adds" if privacy.whole else "each site adds"
        says.append(
            f"With a whole site as the unit (all its rows at once, and whether it took part), ε = "
            f"{_upward(privacy.whole_site)} at δ = {_upward(privacy.whole_delta)}, for all models of this run: {where} "
            "the noise that hides one site's whole update."
        )
        if (privacy.whole.get("sampling_rate") or 1) < 1:
            says.append("This counts on nobody outside the server learning which sites took part in a round.")
    if privacy.seeded:
        says.append("As the noise was seeded, this holds for the same run with secret noise, and not for this one.")
    not_said = (
        "A person with several rows is protected less than one row is; a site as a whole is not protected by a "
        "record-level bound, and facts that hold for a whole population are by none. Row counts of sites are public. "
        "The loss and accuracy figures of this page are the researcher's view of a simulation: computed on test rows, "
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


def _at(tree: object, *path: Any) -> Any:
    """Follow the keys down nested mappings; None where one of them is missing."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _number(value: object) -> float | None:
    """Return the value as a float, infinities included; None for NaN and what is no number."""
    number = float(value) if isinstance(value, Real) else math.nan
    return None if math.isnan(number) else number


def _largest(*values: object) -> float | None:
    return max((number for number in map(_number, values) if number is not None), default=None)


def _numbers(rounds: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(finite(entry.get("round")) or i) for i, entry in enumerate(rounds, 1)]


def _spent_so_far(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return every site's epsilon after each round; a round without the site leaves what it had spent before."""
    spent: dict[str, list[float | None]] = {name: [] for entry in rounds for name in entry.get("epsilon") or {}}
    for entry in rounds:
        for name, values in spent.items():
            value = _number(_at(entry, "epsilon", name))
            values.append(values[-1] if value is None and values else value)
    return spent


# --- figures as text ------------------------------------------------------------------------------------------------


def _shown(value: object, form: Callable[[float], str]) -> str:
    number = _number(value)
    if number is None:
        return "-"
    return form(number) if math.isfinite(number) else ("∞" if number > 0 else "−∞")


def _share(value: object) -> str:
    return _shown(value, lambda number: f"{number:.1%}")


def _figure(value: object) -> str:
    return _shown(value, lambda number: f"{number:.3g}")


def _count(value: object) -> str:
    return _shown(value, lambda number: f"{number:,.0f}")


def _upward(value: object) -> str:
    """Show an epsilon or a delta to three digits, rounded up: the page may not state less than was spent."""

    def form(number: float) -> str:
        up = Context(prec=3, rounding=ROUND_CEILING).create_decimal(f"{number:.9g}")
        if abs(up) >= Decimal("0.01"):
            return f"{up:.{max(0, 2 - up.adjusted())}f}"
        if not up or abs(up) >= Decimal("0.001"):
            return f"{up.normalize():f}"
        digits, _, exponent = f"{up.normalize():e}".partition("e")
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        return power if digits == "1" else f"{digits} × {power}"

    return _shown(value, form)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
