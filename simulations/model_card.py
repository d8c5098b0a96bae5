"""The model card: what the model is, what it was measured at, and the privacy statement that travels with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from client.data import class_count, feature_names
from client.reading import feature_count
from simulations.secure_sums import who_may_lie, who_saw_what
from strategies import evaluation
from strategies.checkpoint import portable
from strategies.job import Job
from strategies.job_privacy import ClientPrivacy, RecordPrivacy
from strategies.job_task import Tuning
from strategies.measured import SHOWN_BY, measures
from strategies.parameters import Parameters
from strategies.statistics import TASK, blocks_of


def model_card(job: Job, summary: Mapping[str, Any], parameters: Parameters) -> str:
    """Markdown. Figures on test rows are those of the simulation."""
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in summary["metrics"].items())
    if (what := measures(job)) is not None:
        return _measured(job, summary, what, ", ".join(f"`{name}`" for name in _inputs(job)))
    return f"""# {job.name}

A federated `{job.task.name}` model ({job.task.model}), trained by {job.strategy.name} over {summary["rounds"]} rounds
at {len(summary["sites"])} simulated sites. Job `{summary["job_hash"]}`.
{_started_from(job)}
## Figures

On the test rows of all sites together; nobody trained on them.

| metric | value |
|---|---|
{figures}

## Privacy statement

{_privacy(job, summary)}

{_input_and_parameters(job, parameters)}

{LIMITS}
"""


def deployed_card(job: Job, summary: Mapping[str, Any], parameters: Parameters) -> str:
    """Markdown, for a federation's job whose folder was fetched: what its coordinator knows, which is no site's rows
    and none of its figures."""
    return f"""# {job.name}

A federated `{job.task.name}` model ({job.task.model}), trained by {job.strategy.name} over {summary["rounds"]} rounds
at {len(summary["sites"])} sites. Job `{summary["job_hash"]}`.
{_started_from(job)}
## Privacy statement

{_promised(job, summary)}

{_input_and_parameters(job, parameters)}

{LIMITS}
"""


LIMITS = """## Limits

A demonstration of federated training on the named data, not a medical or financial device. The model has not been
examined for bias between groups of people. What it reveals about groups is not limited by differential privacy, which
limits what it reveals about any one record."""


ROWS = """\
Numbers are clipped to the job's public ranges and mapped onto [-1, 1], or standardised where it gives a mean and a
deviation; each category becomes indicators of all its values but the first. `job.toml` has the constants."""
PRETRAINED_ROWS = "`job.toml` says how many tokens of a text are read, or to which size an image is scaled."


def _input_and_parameters(job: Job, parameters: Parameters) -> str:
    shapes = "\n".join(f"| `{name}` | {' x '.join(map(str, shape))} |" for name, shape in parameters.shapes.items())
    classes = class_count(job.data)
    what = f", {classes} classes" if classes and job.data.target_type in (None, "class", "tags") else ""
    features = ", ".join(f"`{name}`" for name in _inputs(job))
    pretrained = job.task.model == "pretrained"
    read = "It reads" if pretrained else f"{feature_count(job)} features, in this order:"
    encoded = PRETRAINED_ROWS if pretrained else ROWS
    return f"""## Input and parameters

Target: `{job.data.target}`{what}. {read}
{features}.

{encoded}

`model.safetensors` of the run holds {parameters.size} float32 parameters:

| name | shape |
|---|---|
{shapes}"""


def _started_from(job: Job) -> str:
    """The paragraph on a pre-trained model's checkpoint, closed by an empty line, or nothing but that line's end."""
    if job.task.checkpoint is None:
        return ""
    method = (job.task.tuning or Tuning()).method
    return f"""
It started from the pre-trained `{portable(job.task.checkpoint)}` (SHA-256 `{job.task.checkpoint_hash}`), of which
`{method}` was tuned. What that model was trained on before, and may tell of it, is no part of the statement below.
"""


def _promised(job: Job, summary: Mapping[str, Any]) -> str:
    """What the job bound its sites to. What each spent stands in its own ledger, which the coordinator never has."""
    parts: list[str] = []
    for own, unit, whom in ((job.privacy.record, "Record", "a record"), (job.privacy.client, "Client", "a whole site")):
        if own is None:
            continue
        most = f" of at most epsilon {own.epsilon:g}" if own.epsilon is not None else ""
        spent = summary.get("epsilon_client") if isinstance(own, ClientPrivacy) else None
        said = f" The server's own ledger charged epsilon {spent:.4f}." if isinstance(spent, float) else ""
        where = "at every site" if isinstance(own, RecordPrivacy) else PLACES[own.placement]
        parts.append(
            f"{unit}-level (epsilon, delta)-differential privacy{most} at delta {own.delta:g} for {whom}, {where}, "
            f"clip norm {own.clip_norm:g}.{said} The signed ledger of whoever added the noise holds what was spent; "
            "`fedchorus audit` recomputes it."
        )
    if not parts:
        parts.append("**None.** Nothing bounds what this model reveals about a record.")
    if job.secure_aggregation is not None:
        parts.append("Updates were summed by secure aggregation: the server saw no site's update.")
    return "\n\n".join(parts)


def _measured(job: Job, summary: Mapping[str, Any], what: str, blocks: str) -> str:
    """Of a run that measured: its model is a vector of figures, and predicts nothing."""
    rows = "the training rows of the job's split" if what == "statistics" else "the test rows of the evaluated job"
    return f"""# {job.name}

Not a model that predicts: the mean of a public function of {rows} at {len(summary["sites"])} simulated sites ({what}).
`fedchorus {SHOWN_BY[what]} RUN` reads it. Job `{summary["job_hash"]}`. Blocks: {blocks}.

## Privacy statement

{_privacy(job, summary)}

The records meant are {rows}.{_ELSEWHERE if what == "evaluation" else ""}
"""


PLACES = {
    "central": "by noise that the server added to the sums",
    "local": "by noise that each site added to its own updates",
    "distributed": "by shares of noise that all sites added before the sums were shown",
}

_ELSEWHERE = " Nothing here bounds what the evaluated model tells about the rows that it was trained on."


def _inputs(job: Job) -> list[str]:
    """The features by name; of a column that becomes very many, or of what is measured, one name for all."""
    if job.evaluation is not None:
        return [f"{block.kind} {block.group}".strip() for block in evaluation.blocks_of(job)]
    if job.task.name == TASK:
        return [f"{block.kind} of {block.column}" for block in blocks_of(job.data, job.task)]
    whole = {
        name: column.type for name, column in job.data.columns.items() if column.type not in ("number", "category")
    }
    names = [name for name in feature_names(job.data) if name.split("[")[0] not in whole]
    return [*names, *(f"{name} ({kind})" for name, kind in whole.items())]


def _privacy(job: Job, summary: Mapping[str, Any]) -> str:
    parts = [_records(job.privacy.record, summary)] if job.privacy.record else []
    if job.privacy.client is not None:
        parts.append(_clients(job.privacy.client, job.cohort.rate, summary))
    sums = summary.get("secure_aggregation")
    secure = [] if sums is None else [_secure(sums)]
    if not parts:
        left = "Updates left the sites exact" if sums is None else "No noise was added to the sums of updates"
        none = f"**None.** {left}. Nothing bounds what this model reveals about a record."
        return "\n\n".join([none, *secure])
    parts += secure
    if summary["noise"] != "os":
        parts.append(
            "**The noise was seeded: this model protects nobody.** The epsilons say what real noise would have cost."
        )
    return "\n\n".join(parts)


def _clients(client: ClientPrivacy, rate: float | None, summary: Mapping[str, Any]) -> str:
    whole = summary["client"]
    if client.placement == "distributed":
        worst = max((site["client"] for site in summary["sites"].values()), key=lambda claim: claim["epsilon"])
        return f"""Client-level (epsilon, delta)-differential privacy for each client as a whole, by the shares of noise
({client.shares}) that all clients added before secure aggregation summed them: epsilon {worst["epsilon"]:.4f} by Rényi
DP at delta {client.delta:g}, under zero-out of a client: its updates become zero, while who takes part is public. Clip
norm {client.clip_norm:g}. The server is not trusted with the noise: it saw only sums that held it, and the shares of
the fewest honest sites that a sum may have suffice for this epsilon."""
    if whole is None:
        worst = max((site["client"] for site in summary["sites"].values()), key=lambda claim: claim["epsilon"])
        return f"""Client-level (epsilon, delta)-differential privacy by noise that each client added to its own update:
epsilon {worst["epsilon"]:.4f} (PLD), {worst["epsilon_rdp"]:.4f} (RDP) at delta {client.delta:g} at most, under
add/remove-one of a client. Clip norm {client.clip_norm:g}."""
    sampled = "" if rate is None else f" Each client was asked with chance {rate:g} a round; "
    if rate is not None and whole["sampling_rate"] < 1:
        sampled += "the bound counts on nobody but the server learning who."
    elif rate is not None:
        sampled += "the bound charges each for every round, as the sites' own ledgers show who took part."
    trusted = "The server is trusted with the noise; it saw no update by itself."
    if summary["secure_aggregation"] is None:
        trusted = "The server is trusted: it saw each update."
    return f"""Client-level (epsilon, delta)-differential privacy for each of the {whole["clients"]} clients as a whole,
by {client.noise} noise that the server added to each round's sum: epsilon {whole["epsilon"]:.4f} (PLD),
{whole["epsilon_rdp"]:.4f} (RDP) at delta {client.delta:g}, under add/remove-one of a client, for all models of the
training. Noise multiplier {whole["noise_multiplier"]:.4g}, clip norm {whole["clip_norm"]:g}, expected cohort
{whole["expected_cohort"]:g}.{sampled} {trusted}"""


def _secure(sums: Mapping[str, Any]) -> str:
    told, lies = who_saw_what(sums), who_may_lie(sums)
    more = "" if lies is None else f" {_sentence(lies)}"
    cost = (
        f" It took {sums['upload_bytes'] / 1000:.1f} KB up and {sums['download_bytes'] / 1000:.1f} KB down a site and "
        f"round besides the model, and {sums['seconds']:.2f} s a round."
        if "upload_bytes" in sums
        else ""
    )
    return f"Updates were summed by secure aggregation: {told}.{more}{cost}"


def _sentence(told: str) -> str:
    return f"{told[0].upper()}{told[1:]}."


def _records(record: RecordPrivacy, summary: Mapping[str, Any]) -> str:
    row = "test row" if summary.get("measures") == "evaluation" else "training row"
    rows = "\n".join(
        f"| {name} | {site['epsilon']:.4f} | {site['epsilon_rdp']:.4f} | {site['noise_multiplier']:.4g} "
        f"| {site['sampling_rate']:.4g} | {site['steps'] or 0} |"
        for name, site in summary["sites"].items()
    )
    return f"""Record-level (epsilon, delta)-differential privacy at every site, for the site's {row}s, under
add/remove-one of a record (the row counts themselves are public: the record that is taken out leaves an empty one).
Clip norm {record.clip_norm:g}, delta {record.delta:g}, DP-SGD with Poisson batches and integer noise; epsilon by
privacy loss distributions (PLD), with Rényi DP as the cross-check. `fedchorus audit` recomputes both.

| site | epsilon (PLD) | epsilon (RDP) | noise multiplier | sampling rate | steps |
|---|---|---|---|---|---|
{rows}"""
