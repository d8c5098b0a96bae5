"""The report is one page that loads nothing, hides nothing and survives whatever a run or a site hands it."""

import base64
import hashlib
import math
import re
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.charts import WIDTH, Line, apart, element, line_chart, ticks
from simulations.report import MANY_SITES, TAGLINE, render_report

HOSTILE = "<script>alert('1')</script>\"&"


def run(sites: list[str] | int = 3, rounds: int = 4, private: bool = True) -> dict[str, Any]:
    """A small run as `simulate` hands it over; every figure follows from the site's and the round's number."""
    names = [f"site-{i}" for i in range(sites)] if isinstance(sites, int) else sites
    level = {name: i / max(1, len(names)) for i, name in enumerate(names)}
    entries = [
        {
            "round": t,
            "loss": 0.9 / t,
            "accuracy": 0.9 - 0.3 / t,
            "worst_site": names[0] if names else None,
            "sites": {n: {"accuracy": 0.5 + 0.3 * level[n], "loss": 1.0 / t, "rows": 10} for n in names},
            "epsilon": {n: (1 + level[n]) * t / rounds for n in names} if private else {},
            "contributors": names[1:],
            "failures": dict.fromkeys(names[:1], "dropped out"),
            "seconds": 0.125,
        }
        for t in range(1, rounds + 1)
    ]
    spent = {"noise_multiplier": 1.1, "sampling_rate": 0.16, "steps": 4 * rounds, "delta": 1e-5}
    summary = {
        "run": "runs/hospitals",
        "name": "hospitals",
        "rounds": rounds,
        "engine": "inline",
        "seed": 7,
        "job_hash": "ab12cd34",
        "metrics": {"accuracy": 0.951, "loss": 0.2},
        "sites": {
            n: {"train_rows": 150, "test_rows": 50, "accuracy": 0.5 + 0.3 * level[n], "loss": 0.2, "rounds": rounds}
            | {key: value if private else None for key, value in spent.items()}
            | {"epsilon": 1 + level[n] if private else None}
            for n in names
        },
        "baselines": {
            "local": {"accuracy": 0.873, "sites": {n: {"accuracy": 0.45} for n in names}},
            "pooled": {"accuracy": 0.964},
        },
        "epsilon": {"record": 1 + max(level.values(), default=0.0) if private else None, "client": None},
        "noise": "os" if private else None,
        "adjacency": "add_or_remove_one" if private else None,
        "seconds": 12.3,
        "versions": {"fedchorus": "0.1.0"},
    }
    return {"job_toml": 'name = "hospitals"\n', "summary": summary, "rounds": entries}


SUMS = {"groups": 1, "reduce": "sum", "sites_in_a_sum": 31, "fewest_in_a_sum": 22, "colluders": 4, "hidden_among": 18,
        "threshold": 21, "neighbours": 30, "dropouts": 9, "bits": 20, "upload_bytes": 123456.0,
        "download_bytes": 7890.0, "seconds": 0.4321}  # fmt: skip


def secure_run(placement: str | None = None, private: bool = True, **sums: Any) -> dict[str, Any]:
    """The same run with its updates summed securely, and with noise for whole sites where it has a `placement`."""
    case = run(private=private)
    case["summary"] |= {"secure_aggregation": {**SUMS, **sums}}
    for entry in case["rounds"]:
        entry["secure"] = {"upload_bytes": 1000.0 * entry["round"] + 7e6, "download_bytes": 1.0, "seconds": 3.25}
    if placement is not None:
        case["job_toml"] += f'[privacy.client]\nplacement = "{placement}"\n'
        case["summary"]["epsilon"]["client"] = 3.0
        for site in case["summary"]["sites"].values():
            site["client"] = {"epsilon": 3.0, "epsilon_rdp": 3.0, "delta": 1e-3}
    return case


class Page(HTMLParser):
    """Reads a page as a browser would and refuses unbalanced tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data

    def row(self, first: str, width: int) -> list[str]:
        """The one row of `width` cells that begins with `first`."""
        (found,) = (row for row in self.rows if row[0] == first and len(row) == width)
        return found


def drawings(source: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]


def charts(source: str) -> dict[str, ElementTree.Element]:
    return {svg[0].attrib["id"]: svg for svg in drawings(source) if svg.get("class") == "chart"}


@cache
def rendered(sites: int, rounds: int) -> str:
    return render_report(**run(sites, rounds))


SHAPES = [(1, 1), (5, 20), (MANY_SITES, 40), (MANY_SITES + 1, 2), (60, 500)]


@pytest.mark.parametrize(("sites", "rounds"), SHAPES)
def test_the_page_is_balanced_html_and_every_drawing_is_xml(sites: int, rounds: int) -> None:
    source = rendered(sites, rounds)
    assert source.startswith("<!doctype html>\n<html")
    assert TAGLINE in Page(source).text
    assert len(drawings(source)) >= 6


@pytest.mark.parametrize(("sites", "rounds"), SHAPES)
def test_every_chart_has_a_title_and_a_description_and_stays_in_its_frame(sites: int, rounds: int) -> None:
    for ident, svg in charts(rendered(sites, rounds)).items():
        assert [child.tag for child in svg[:2]] == ["title", "desc"]
        assert svg[0].text
        assert svg[1].text
        assert svg.attrib["aria-labelledby"].split()[0] == ident
        height = float(svg.attrib["viewBox"].split()[3])
        for mark in svg.iter():
            for key, value in mark.attrib.items():
                if key in {"x", "x1", "x2", "cx", "width"}:
                    assert 0 <= float(value) <= WIDTH
                elif key in {"y", "y1", "y2", "cy", "height"}:
                    assert 0 <= float(value) <= height


def test_the_page_loads_and_runs_nothing() -> None:
    source = render_report(**run())
    page = Page(source)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "use", "image", "base"}
    )
    for _, attributes in page.tags:
        assert not {"src", "href", "style", "srcset", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(|https?://", source)


def test_the_policy_of_the_page_admits_its_own_style_and_nothing_else() -> None:
    source = render_report(**run())
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    (policy,) = (a["content"] for tag, a in Page(source).tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_hostile_names_are_shown_as_text() -> None:
    case = run([HOSTILE, "city"])
    case["summary"] |= {"name": HOSTILE, "engine": HOSTILE, "versions": {HOSTILE: HOSTILE}, "adjacency": HOSTILE}
    case["job_toml"] = HOSTILE
    source = render_report(**case)
    page = Page(source)
    assert "<script" not in source
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.row(HOSTILE, 9)[1] == "150"
    assert drawings(source)


@given(st.lists(st.text(st.characters(), min_size=1, max_size=30), min_size=1, max_size=4, unique=True))
@settings(max_examples=20, deadline=None)
def test_any_text_may_be_a_site_name(names: list[str]) -> None:
    source = render_report(**run(names, 2))
    source.encode()
    assert len(Page(source).rows) == (1 + len(names)) + (1 + len(names)) + (1 + 2)
    assert drawings(source)


def test_says_that_a_run_without_dp_was_not_private() -> None:
    source = render_report(**run(private=False))
    page = Page(source)
    assert "This run was not private: every update left its site exact" in page.text
    assert "4 · not private" in page.text
    assert "epsilon-title" not in charts(source)
    assert page.row("site-1", 9)[2:] == ["-"] * 7


def test_says_nothing_of_the_kind_about_a_private_run() -> None:
    text = Page(render_report(**run())).text
    assert "not private" not in text
    assert "seeded" not in text
    assert "record-level differential privacy, ε ≤ 1.67 at every site" in text


def test_says_that_seeded_noise_protects_nothing() -> None:
    case = run()
    case["summary"]["noise"] = "seeded-simulation"
    text = Page(render_report(**case)).text
    assert "Noise was seeded: a simulation, no protection." in text
    assert "privacy, ε ≤" not in text


@pytest.mark.parametrize("unbounded", [None, math.inf, math.nan])
def test_names_the_site_that_has_no_bound(unbounded: float | None) -> None:
    case = run()
    case["summary"]["sites"]["site-1"]["epsilon"] = unbounded
    text = Page(render_report(**case)).text
    assert (
        "No finite record-level ε at 1 of 3 sites. What was sent from here is not bounded for single records: site-1."
    )
    assert "records are not protected at every site" in text
    assert "privacy, ε ≤" not in text


def test_a_client_level_bound_alone_is_not_called_not_private() -> None:
    case = run(private=False)
    case["summary"]["epsilon"]["client"] = 3.0
    text = Page(render_report(**case)).text
    assert "not private" not in text
    assert "With a whole site as the unit" in text
    assert "ε = 3.00 at δ" in text
    assert "Unit one site" in text


def test_says_what_the_server_saw_and_what_that_took() -> None:
    page = Page(render_report(**secure_run()))
    assert "The server sees one sum of 31 sites a round and no update by itself" in page.text
    assert "fewer than 22 is never shown" in page.text
    assert "hidden among at least 18 honest ones, itself included, even with 4 of them in league" in page.text
    for fact in ("Sites in a sum 31", "Fewest in a sum that is shown 22", "in league with the server up to 4",
                 "Honest sites to hide among 18 at least", "Sites that may fail in a round 9",
                 "A site's masks any 21 of 30 peers", "Bits a number 20", "Sent by a site in a round 123.5 KB",
                 "Sent to it, besides the model 7.9 KB", "Time in a round 0.43 s"):  # fmt: skip
        assert fact in page.text
    assert "Groups" not in page.text
    assert "share of the noise" not in page.text
    heads = ["Round", "Loss", "Accuracy", "Worst site", "Contributors", "ε (largest)", "ε (site)", "Seconds", "KB up",
             "Secure sum (s)", "Failures"]  # fmt: skip
    assert page.row("Round", 11) == heads
    assert page.row("2", 11)[7:10] == ["0.12", "7,002.0", "3.25"]


def test_groups_hide_a_site_in_its_group_and_say_how_many_may_lie() -> None:
    text = Page(render_report(**secure_run(groups=7, reduce="trimmed-mean"))).text
    assert "a sum for each of 7 groups of 31 sites or one more" in text
    assert "18 honest ones of its group, not of all, itself included" in text
    assert "Lying groups tolerated 2" in text
    assert "The trimmed mean of the groups' means bears up to 2 of 7 that lie or are lost." in text
    assert "Groups 7, combined by trimmed mean" in text


def test_a_run_without_secure_sums_does_not_speak_of_them() -> None:
    text = Page(render_report(**run())).text
    assert "What the server saw" not in text
    assert "KB" not in text


def test_noise_in_shares_is_for_zero_out_and_trusts_the_server_with_nothing() -> None:
    page = Page(render_report(**secure_run("distributed", private=False) | {"rounds": []}))
    assert "the server is not trusted with the noise" in page.text
    assert "“zero out”: its updates become zero, while who takes part is public" in page.text
    assert "whether it took part" not in page.text
    assert "ε = 3.00 at δ = 0.001" in page.text
    local = Page(render_report(**secure_run("local", private=False)))
    assert "not trusted" not in local.text
    assert "zero out" not in local.text


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ("distributed", "add or remove one (a record), zero out (a site)"),
        ("local", "add or remove one"),
    ],
)
def test_each_unit_has_its_own_adjacency(placement: str, said: str) -> None:
    page = Page(render_report(**secure_run(placement)))
    assert f"Adjacency {said} Noise" in page.text
    assert page.row("site-1", 9)[8] == "add or remove one"  # The table of sites is of records.
    assert "the adjacency is “add or remove one”" in page.text


def test_secure_sums_without_noise_are_not_called_private() -> None:
    text = Page(render_report(**secure_run(private=False))).text
    assert "This run was not private: the sums of updates are exact." in text
    assert "so no bound holds on what sums of updates tell about a site's rows" in text
    assert "every update left its site exact" not in text


def test_every_site_and_every_round_has_its_rows() -> None:
    page = Page(render_report(**run(60, 30)))
    site = ["site-30", "150", "record", "1.50", "10⁻⁵", "1.1", "0.16", "120", "add or remove one"]
    assert page.row("site-30", 9) == site
    assert page.row("site-30", 5) == ["site-30", "50", "65.0%", "45.0%", "30"]
    for i in range(60):
        assert page.row(f"site-{i}", 9)
    assert page.row("30", 9) == ["30", "0.03", "89.0%", "site-0", "59", "1.99", "-", "0.12", "site-0 (dropped out)"]
    for t in range(1, 31):
        assert page.row(str(t), 9)


def test_epsilon_is_rounded_up_and_never_down() -> None:
    case = run(["rural"])
    case["summary"]["sites"]["rural"] |= {"epsilon": 1.98001, "delta": 2.001e-6}
    assert Page(render_report(**case)).row("rural", 9)[3:5] == ["1.99", "2.01 × 10⁻⁶"]


def test_a_site_that_sits_out_keeps_what_it_spent() -> None:
    case = run(rounds=2)
    case["rounds"][1]["epsilon"] = {"site-0": 0.6}
    assert Page(render_report(**case)).row("2", 9)[5] == "0.834"  # site-2 spent 5/6 in round 1 and nothing since.


@pytest.mark.parametrize("sites", [1, 5, MANY_SITES])
def test_few_sites_have_a_line_each_with_the_largest_spender_strong(sites: int) -> None:
    svg = charts(render_report(**run(sites)))["epsilon-title"]
    lines = [path.attrib["class"] for path in svg.iter("path") if path.attrib["class"].startswith("line")]
    assert len(lines) == sites
    assert lines.count("line k") == 1
    (strong,) = (text.text for text in svg.iter("text") if text.get("class") == "strong")
    assert strong == f"site-{sites - 1}"


def test_many_sites_share_a_band_with_the_largest_the_median_and_the_smallest() -> None:
    svg = charts(render_report(**run(60)))["epsilon-title"]
    assert len([path for path in svg.iter("path") if path.attrib["class"].startswith("line")]) == 3
    assert len(list(svg.iter("polygon"))) == 1
    assert {"median", "smallest", "largest: site-59"} <= {text.text for text in svg.iter("text")}


BAD = {"none": None, "nan": math.nan, "infinite": math.inf, "negative infinite": -math.inf, "a word": "many"}


def _with_every_figure(tree: Any, value: object) -> Any:
    if isinstance(tree, dict):
        return {key: _with_every_figure(branch, value) for key, branch in tree.items()}
    return value if isinstance(tree, int | float) else tree


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("case", [run, secure_run], ids=["plain", "secure"])
def test_missing_and_infinite_figures_are_shown_as_such(case: Any, value: object) -> None:
    case = case()
    case["summary"] = _with_every_figure(case["summary"], value)
    case["rounds"] = [_with_every_figure(entry, value) for entry in case["rounds"]]
    source = render_report(**case)
    page = Page(source)
    shown = {math.inf: "∞", -math.inf: "−∞"}.get(value, "-") if isinstance(value, float) else "-"
    assert page.row("site-1", 9)[3:8] == [shown] * 5
    (second,) = (row for row in page.rows if row[0] == "2")
    assert second[1:3] == [shown, shown]
    if len(second) > 9:
        assert second[8:10] == [shown, shown]
    assert not re.search(r"\b(nan|inf|None|many)\b", page.text)
    assert drawings(source)


def test_a_run_that_recorded_nothing_still_has_a_page() -> None:
    page = Page(render_report(job_toml="", summary={}, rounds=[]))
    assert "unnamed run" in page.text
    assert "This run was not private" in page.text


def test_a_run_without_baselines_shows_no_figure_for_them() -> None:
    case = run()
    case["summary"]["baselines"] = {}
    source = render_report(**case)
    assert "each site alone" not in Page(source).text
    assert "Pooled" not in Page(source).text
    assert "ring" not in {mark.get("class") for mark in charts(source)["spread0-title"].iter()}


def test_the_command_to_check_can_be_pasted() -> None:
    case = run()
    case["summary"]["run"] = "my runs/a; rm -rf b"
    assert "fedchorus audit 'my runs/a; rm -rf b'" in Page(render_report(**case)).text


def test_the_same_run_gives_the_same_page() -> None:
    assert render_report(**run()) == render_report(**run())


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    values = [1.0, 2.0, None, 4.0, None]
    svg = ElementTree.fromstring(line_chart("a", "b", "c", [1, 2, 3, 4, 5], [Line("line", values)], y_label="y"))
    (path,) = (mark.attrib["d"] for mark in svg.iter("path") if mark.attrib["class"].startswith("line"))
    assert path.count("M") == path.count("L") == 1
    assert len(list(svg.iter("circle"))) == 1


def test_an_element_escapes_what_is_not_markup_and_drops_what_xml_cannot_carry() -> None:
    inner = element("b", "<&\x00\ud800")
    assert inner == "<b>&lt;&amp;\ufffd\ufffd</b>"
    assert element("p", inner, None, class_='"', x=0.25, id=None) == f'<p class="&quot;" x="0.2">{inner}</p>'


magnitudes = st.floats(-1e12, 1e12) | st.floats(-1, 1) | st.sampled_from([0.0, 1.0, 1e-300, 5e-324, 1e299, -1e299])


@given(magnitudes, magnitudes)
@settings(deadline=None)
def test_ticks_ascend_evenly_cover_the_data_and_stay_near_it(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    step = (marks[-1] - marks[0]) / (len(marks) - 1)
    slack = 1e-5 * step
    assert all(abs((after - before) - step) <= slack for before, after in pairwise(marks))
    assert marks[0] <= low + slack
    assert high - slack <= marks[-1]
    if high - low > 1e-9 * max(abs(low), abs(high)) and high - low > 1e-280:
        assert low - step < marks[0] + slack
        assert marks[-1] < high + step + slack
        assert float(f"{step:e}"[:3]) in {1.0, 2.0, 5.0}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 1.98, [0.0, 0.5, 1.0, 1.5, 2.0]),
        (0.83, 0.951, [0.8, 0.85, 0.9, 0.95, 1.0]),
        (1.0, 1.0, [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 500, [0, 100, 200, 300, 400, 500]),
    ],
)
def test_ticks_are_the_round_numbers_that_a_person_would_choose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@given(st.lists(st.floats(30, 236), max_size=40).map(sorted), st.floats(0, 40))
@settings(max_examples=50, deadline=None)
def test_labels_stand_apart_in_order_and_within_the_frame(wanted: list[float], gap: float) -> None:
    placed = apart(wanted, 30, 236, gap)
    assert len(placed) == len(wanted)
    assert all(30 - 1e-6 <= y <= 236 + 1e-6 for y in placed)
    room = min(gap, 206 / max(1, len(wanted) - 1))
    assert all(below - above >= room - 1e-6 for above, below in pairwise(placed))
    if all(below - above >= gap for above, below in pairwise(wanted)):
        assert placed == wanted


def _luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_can_be_read_against_the_paper(theme: int) -> None:
    source = render_report(**run())
    block = re.findall(r":root \{(.*?)\}", source, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block))
    for name in ("ink", "soft", "accent"):
        assert _contrast(colours[name], colours["paper"]) >= 4.5
    assert _contrast(colours["ink"], colours["panel"]) >= 4.5
    assert _contrast(colours["warn"], colours["warn-paper"]) >= 4.5
    assert _contrast(colours["warn"], colours["paper"]) >= 4.5
    for name in ("bar", "k0", "k1", "k2", "k3", "k4"):
        assert _contrast(colours[name], colours["paper"]) >= 3
