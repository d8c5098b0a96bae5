"""What a job's task makes of a site's table: encoded rows, of which some are for training and some for testing."""

from __future__ import annotations

import pandas as pd

from client.data import Records, SiteData, encode, feature_names, split
from client.statistics import measured, phi, width
from strategies.evaluation import size_of
from strategies.job import Job
from strategies.measured import measures


def records_of(frame: pd.DataFrame, job: Job, *, where: str) -> Records:
    """Check a table against the job's schema and encode its rows. Raises `DataError`."""
    if job.evaluation is not None:
        from client.evaluation import rows_of  # It needs torch.

        return rows_of(frame, job, where=where)
    return phi(frame, job, where=where) if measures(job) == "statistics" else encode(frame, job.data, where=where)


def site_data(records: Records, job: Job, *, site: str) -> SiteData:
    """A site's rows to train on and to test on; of an evaluation `client.evaluation.Judge` makes them.

    Raises `DataError` for a site that cannot train.
    """
    if measures(job) == "statistics":
        return measured(records, job.data, site=site, stratify=job.stratified)
    return split(records, job.data, site=site, stratify=job.stratified)


def feature_count(job: Job) -> int:
    """How many numbers a record becomes."""
    if job.evaluation is not None:
        return size_of(job)
    return width(job) if measures(job) == "statistics" else len(feature_names(job.data))
