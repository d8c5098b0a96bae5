"""An operator's side of the coordinator's API: submit, look, stop, resume, fetch."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from privacy.errors import RunError
from server.operators import Operator

PIECE = 2**22
ANOTHER = "what answers there is not fedchorus; check the address in the operator's file, and the network"
KINDS = ("application/json", "application/octet-stream")  # Of what our API answers.


class Remote:
    """The coordinator's server, as an operator with a token sees it. Every method raises `RunError`, one line."""

    def __init__(self, operator: Operator) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._address = operator.address
        try:
            context.load_verify_locations(cadata=operator.authority)
            self._client = httpx.Client(
                base_url=f"https://{operator.address}/v1/fedchorus",
                headers={"authorization": f"Bearer {operator.token}"},
                verify=context,
                timeout=60.0,
            )
        except (ssl.SSLError, ValueError, TypeError, httpx.InvalidURL):
            raise RunError(
                "the operator's file is damaged (address, certificate or token); ask for a new one"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def submit(self, toml: str, model: bytes, approvals: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Send a job and the model that it starts from; the job's view."""
        digest = hashlib.sha256(model).hexdigest()
        for at in range(0, len(model), PIECE):
            self._call("PUT", f"/models/{digest}?at={at}", content=model[at : at + PIECE])
        record = {"toml": toml, "model": digest, "approvals": [list(pair) for pair in approvals]}
        view: dict[str, Any] = self._json("POST", "/jobs", json=record)
        return view

    def jobs(self) -> list[dict[str, Any]]:
        views: list[dict[str, Any]] = self._json("GET", "/jobs")
        return views

    def job(self, name: str) -> dict[str, Any]:
        view: dict[str, Any] = self._json("GET", f"/jobs/{_in_path(name)}")
        return view

    def sites(self) -> dict[str, Any]:
        found: dict[str, Any] = self._json("GET", "/sites")
        return found

    def events(self, name: str, after: int) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self._json("GET", f"/jobs/{_in_path(name)}/events?after={after}")
        return events

    def stop(self, name: str) -> dict[str, Any]:
        view: dict[str, Any] = self._json("POST", f"/jobs/{_in_path(name)}/stop")
        return view

    def resume(self, name: str) -> dict[str, Any]:
        view: dict[str, Any] = self._json("POST", f"/jobs/{_in_path(name)}/resume")
        return view

    def fetch_folder(self, name: str, folder: Path) -> None:
        """Write a job's `job.toml`, `model.safetensors` and `summary.json` into a new `folder`: what can be read as a
        finished run. Raises `RunError` for one that is not finished, or a folder that is there."""
        found = self._json("GET", f"/jobs/{_in_path(name)}/result")
        toml, summary = found.get("toml"), found.get("summary")
        if not isinstance(toml, str) or not isinstance(summary, dict | None):
            raise RunError(f"{self._address}: {ANOTHER}")
        if summary is None:
            raise RunError(f"job {name}: is not finished; `fedchorus status` says where it stands")
        if folder.exists():
            raise RunError(f"{folder}: is there already; choose another --out")
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            (partial / "job.toml").write_bytes(toml.encode())
            (partial / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
            self.fetch(name, partial / "model.safetensors")
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def fetch(self, name: str, path: Path) -> None:
        """Write the finished job's model to `path`, whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                while piece := self._call("GET", f"/jobs/{_in_path(name)}/model?at={file.tell()}").content:
                    file.write(piece)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _json(self, method: str, path: str, **body: Any) -> Any:
        answer = self._call(method, path, **body)
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise RunError(f"{self._address}: {ANOTHER}") from None

    def _call(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = str(error) or type(error).__name__
            raise RunError(
                f"{self._address}: no answer ({said}); check the address, the network and that `fedchorus server` runs"
            ) from None
        if answer.status_code != 200 or answer.headers.get("content-type") not in KINDS:
            try:
                said = str(answer.json()["error"])
            except (ValueError, KeyError, TypeError, RecursionError):
                said = f"status {answer.status_code}: {ANOTHER}"
            raise RunError(f"{self._address}: {said}")
        return answer


def _in_path(name: str) -> str:
    return quote(name, safe="")
