"""Every scenario that ships can be run as it is; a name that is none is answered with the nearest."""

from pathlib import Path

import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from privacy.errors import JobError
from simulations.federation import load_sites
from simulations.scenarios import describe, job_path, scenario_names, scenario_path
from strategies.job import load_job


def test_there_is_one_to_begin_with() -> None:
    assert "hospitals" in scenario_names()


@pytest.mark.parametrize("name", scenario_names())
class TestEveryScenario:
    def test_is_a_valid_job_of_its_own_name(self, name: str) -> None:
        assert load_job(scenario_path(name)).name == name

    def test_has_data_that_give_every_site_what_it_was_promised(self, name: str) -> None:
        job = load_job(scenario_path(name))
        sites = load_sites(job)
        if job.data.client is not None:
            assert len(sites) > 1
            assert all(len(data.train) and len(data.test) for data in sites.values())
            return
        assert job.simulation.partition is not None
        mix = job.simulation.partition.mix
        if mix is None:
            assert len(sites) == job.simulation.partition.clients
            return
        assert {site: len(data.train) + len(data.test) for site, data in sites.items()} == {
            site: each.rows for site, each in sorted(mix.items())
        }
        for data in sites.values():
            assert set(data.train.target.tolist()) == {0, 1}

    def test_clips_no_record_of_a_bundled_data_set(self, name: str) -> None:
        job = load_job(scenario_path(name))
        if job.data.bundled is None:
            pytest.skip("it brings data of its own")
        carried = {"breast-cancer": load_breast_cancer, "digits": load_digits}
        if job.data.bundled not in carried:
            pytest.skip("its numbers are drawn from laws without an end")
        frame = carried[job.data.bundled](as_frame=True).data
        ranges = {column: each.range for column, each in job.data.columns.items() if each.range is not None}
        assert len(ranges) == frame.shape[1]
        clipped = {c: (low, high) for c, (low, high) in ranges.items() if not frame[c].between(low, high).all()}
        assert clipped == {}

    def test_says_what_it_shows_in_one_line(self, name: str) -> None:
        line = describe(name)
        assert 20 < len(line) < 120
        assert line.endswith(".")
        assert not line.startswith("#")

    def test_is_found_by_its_name(self, name: str) -> None:
        assert job_path(name) == scenario_path(name)


def test_no_two_scenarios_are_the_same_job() -> None:
    hashes = {load_job(scenario_path(name)).hash for name in scenario_names()}
    assert len(hashes) == len(scenario_names())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hospital", "no scenario and no job file is called 'hospital'; did you mean 'hospitals'?"),
        ("hospitals-unrelable", "did you mean 'hospitals-unreliable'?"),
        ("zzz", "no scenario and no job file is called 'zzz'; known: banks, banks-text, clinics, devices"),
        ("", "no scenario and no job file is called ''; known: banks, banks-text, clinics, devices"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(JobError) as caught:
        job_path(name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["mine.toml", "jobs/mine", "./mine", "/somewhere/mine.toml"])
def test_what_looks_like_a_path_is_one(name: str) -> None:
    assert job_path(name) == Path(name)


def test_a_file_in_this_folder_is_a_job_but_a_folder_of_a_scenarios_name_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("")
    assert job_path("mine") == Path("mine")
    Path("hospitals").mkdir()  # A run of that scenario, say.
    assert job_path("hospitals") == scenario_path("hospitals")
