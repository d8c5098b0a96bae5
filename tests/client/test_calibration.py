"""Adapters begin where the inputs of their layers vary in public records, and nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from client.calibration import calibrate, principal
from client.initial import initial_parameters, starting_model
from client.prediction import unlabelled
from client.pretrained import Pretrained
from client.tasks import initial_model, task_for
from privacy.errors import DataError, JobError
from strategies.job import Job, load_job, parse_job
from tests.client.checkpoints import job_of

pytest.importorskip("transformers")
pytest.importorskip("peft")

PUBLIC = "text\ngood film\nthe book is not very good\nit is a bad bad book\nvery\nthe film is the book\n"
IMAGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "public.csv").write_text(PUBLIC)
    pixels = np.random.default_rng(2).integers(0, 256, (IMAGES, 8, 8), dtype=np.uint8)
    np.savez(folder / "public.npz", pixels=pixels)
    return folder


def job(family: str, folder: Path, *settings: str, file: str | None = None) -> Job:
    public = file or str(folder / ("public.npz" if family == "vit" else "public.csv"))
    return job_of(folder / "rows.csv", family, f'task.tuning.calibration="{public}"', *settings, folder=folder)


def made(own: Job) -> Pretrained:
    model = starting_model(own, task_for(own))
    assert isinstance(model, Pretrained)
    return model


def inputs_of(model: Pretrained, rows: Tensor) -> dict[str, Tensor]:
    """What goes into each adapter, of one row after the other: by hooks on the layers themselves."""
    found: dict[str, list[Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: found.setdefault(name, []).append(given[0][0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            tokens = int((row >= 0).sum()) if model.kind != "image" else 10**6
            model(row[None])
            for parts in found.values():
                parts[-1] = parts[-1][:tokens]
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
class TestOfEachFamily:
    def test_an_adapter_answers_with_a_mean_square_of_one_along_each_of_its_directions(
        self, family: str, folder: Path
    ) -> None:
        own = job(family, folder)
        model = made(own)
        rows = torch.from_numpy(unlabelled(Path(own.task.tuning.calibration), own)[0].features)  # type: ignore[union-attr, arg-type]
        seen = inputs_of(model, rows)
        assert len(seen) >= 2
        for name, inputs in seen.items():
            layer: Any = model.get_submodule(name)
            answers = inputs @ layer.lora_A["default"].weight.T
            torch.testing.assert_close(answers.T @ answers / len(answers), torch.eye(2), rtol=0, atol=1e-3)

    def test_no_two_directions_hold_more_of_the_inputs(self, family: str, folder: Path) -> None:
        own = job(family, folder)
        model = made(own)
        rows = torch.from_numpy(unlabelled(Path(own.task.tuning.calibration), own)[0].features)  # type: ignore[union-attr, arg-type]
        for name, inputs in inputs_of(model, rows).items():
            layer: Any = model.get_submodule(name)
            span, _ = torch.linalg.qr(layer.lora_A["default"].weight.T)
            held = float((inputs @ span).square().sum())
            values = np.linalg.eigvalsh(inputs.double().numpy().T @ inputs.double().numpy())
            assert held == pytest.approx(values[-2:].sum(), rel=1e-3)

    def test_the_factors_change_and_nothing_else_does(self, family: str, folder: Path) -> None:
        own = job(family, folder)
        plain: Any = initial_model(task_for(own), features=8 if family != "vit" else 64, classes=2, seed=own.seed)
        before, after = plain.state_dict(), made(own).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "lora_A" in name}

    def test_it_is_the_same_each_time(self, family: str, folder: Path) -> None:
        (_, first), (_, second) = (initial_parameters(job(family, folder)) for _ in range(2))
        assert np.array_equal(first, second)


class TestDirections:
    @given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4))
    def test_whiten_what_they_were_taken_from(self, seed: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn((30, 6), generator=generator) * torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.2])
        answers = inputs @ principal(inputs, rank).T
        torch.testing.assert_close(answers.T @ answers / 30, torch.eye(rank), rtol=0, atol=1e-4)

    def test_along_which_nothing_varies_are_none(self) -> None:
        assert len(principal(torch.randn(30, 1) @ torch.ones(1, 6), 3)) == 1

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_of_what_has_no_direction_there_are_none(self, value: float) -> None:
        assert len(principal(torch.full((5, 4), value), 2)) == 0


class TestTheGradient:
    def test_is_seen_better_than_from_random_directions(self, folder: Path) -> None:
        own = job("bert", folder)
        calibrated: Any = made(own)
        random: Any = initial_model(task_for(own), features=8, classes=2, seed=own.seed)
        rows = torch.from_numpy(unlabelled(folder / "public.csv", own)[0].features)
        sizes = []
        for model in (random, calibrated):
            torch.nn.init.constant_(model.head.weight, 0.1)
            model.head.weight.data[:, ::2] *= -1
            weights = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
            for weight in weights.values():
                weight.requires_grad_(True)
            grads = torch.autograd.grad(model(rows).sum(), list(weights.values()))
            seen = 0.0
            for name, gradient in zip(weights, grads, strict=True):
                factor = model.get_parameter(name.replace("base_layer.weight", "lora_A.default.weight"))
                span, _ = torch.linalg.qr(factor.detach().T)
                seen += float((gradient @ span).square().sum())
            sizes.append(seen / sum(float(g.square().sum()) for g in grads))
        assert sizes[1] > 2 * sizes[0], "of 16 inputs two random directions see an eighth"


class TestAcrossMachines:
    def test_only_the_name_and_the_hash_of_the_file_travel(self, folder: Path) -> None:
        own = job("bert", folder)
        sent = own.portable
        assert sent.task.tuning is not None
        assert sent.task.tuning.calibration == "public.csv"
        assert sent.task.tuning.calibration_hash == own.task.tuning.calibration_hash  # type: ignore[union-attr]
        assert str(folder) not in sent.toml.decode().replace(str(folder / "bert"), "")

    def test_a_site_needs_no_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEDCHORUS_MODELS", str(folder))
        there = parse_job(job("bert", folder).portable.toml.decode(), where="the message")
        arrays = dict(initial_model(task_for(there), features=8, classes=2, seed=there.seed).named_parameters())
        for name in (name for name in arrays if "lora_A" in name):
            rows = arrays[name].detach()
            torch.testing.assert_close(rows @ rows.T, torch.eye(2), msg="a random start, until the model arrives")

    @pytest.mark.parametrize("path", ["/etc/public.csv", "..", "C:\\\\public.csv"])
    def test_a_path_does_not_come_over_the_network(self, path: str, folder: Path) -> None:
        own = job("bert", folder)
        sent = own.portable.toml.decode().replace('"public.csv"', f'"{path}"')
        with pytest.raises(JobError, match="only its name travels"):
            parse_job(sent, where="the message")

    def test_a_file_without_its_hash_does_not_either(self, folder: Path) -> None:
        lines = job("bert", folder).portable.toml.decode().splitlines()
        sent = "\n".join(line for line in lines if not line.startswith("calibration_hash"))
        with pytest.raises(JobError, match="without its hash"):
            parse_job(sent, where="the message")

    def test_what_travels_is_the_same_whatever_was_computed_of_the_job_before(self, folder: Path) -> None:
        first, second = job("bert", folder), job("bert", folder)
        assert second.hash
        assert first.portable.toml == second.portable.toml
        assert str(folder / "public.csv") not in second.portable.toml.decode()


class TestRefuses:
    def test_a_file_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(JobError, match=r"task\.tuning\.calibration: .*nowhere\.csv cannot be read"):
            job("bert", folder, file="nowhere.csv")

    def test_no_other_file_that_is_given_later(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "other.csv").write_text("text\nbad\n")
        own = job("bert", folder)
        (tmp_path / "resolved.toml").write_bytes(own.toml)
        again = load_job(tmp_path / "resolved.toml", ['task.tuning.calibration="other.csv"'])
        assert again.task.tuning is not None
        assert own.task.tuning is not None
        assert again.task.tuning.calibration == str(tmp_path / "other.csv")
        assert again.task.tuning.calibration_hash != own.task.tuning.calibration_hash

    def test_a_file_that_changed_since(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "public.csv").write_text(PUBLIC)
        own = job("bert", folder, file=str(tmp_path / "public.csv"))
        (tmp_path / "public.csv").write_text(PUBLIC + "good\n")
        with pytest.raises(JobError, match="not the file that the job was made with"):
            made(own)

    def test_a_file_without_the_column(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "public.csv").write_text("words\ngood\n")
        with pytest.raises(DataError, match="text"):
            made(job("bert", folder, file=str(tmp_path / "public.csv")))

    def test_a_file_of_fewer_inputs_than_directions(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "public.csv").write_text("text\ngood\n")
        with pytest.raises(JobError, match="give more records, and other ones"):
            made(job("bert", folder, "task.tuning.rank=8", file=str(tmp_path / "public.csv")))

    def test_a_file_of_one_record_again_and_again(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "public.csv").write_text("text\n" + "good film\n" * 8)
        with pytest.raises(JobError, match=r"vary in \d directions, and rank 8 needs as many"):
            made(job("bert", folder, "task.tuning.rank=8", file=str(tmp_path / "public.csv")))

    def test_a_model_that_reads_all_of_a_text_before_it_writes(self, folder: Path) -> None:
        more = ["data.target=answer", "data.target_type=text", "data.target_length=4", "task.name=seq2seq"]
        with pytest.raises(JobError, match=r"task\.tuning\.calibration: what a seq2seq model writes"):
            made(job("t5", folder, *more))

    @pytest.mark.parametrize(("file", "why"), [("a\\u0000b", "not the path of a file"), (".", "is a folder")])
    def test_what_is_no_file(self, file: str, why: str, folder: Path) -> None:
        with pytest.raises(JobError, match=why):
            job("bert", folder, file=file)

    def test_a_file_without_records(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "public.csv").write_text("text\n")
        with pytest.raises((JobError, DataError), match=r"public\.csv"):
            made(job("bert", folder, file=str(tmp_path / "public.csv")))

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            (["task.tuning.method='head'", "task.tuning.rank=none"], 'calibration is for method = "lora"'),
            (["task.tuning.refactor_every=2"], "leave one out"),
            (["task.tuning.calibration=none", f"task.tuning.calibration_hash='{'0' * 64}'"], "belongs to calibration"),
        ],
    )
    def test_what_it_does_not_go_with(self, settings: list[str], why: str, folder: Path) -> None:
        with pytest.raises(JobError, match=why):
            job("bert", folder, *settings)


def test_calibrating_a_model_twice_is_calibrating_it_once(folder: Path) -> None:
    own = job("bert", folder)
    model = made(own)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, own)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "B is zero, so that A changes no input of a layer behind"
