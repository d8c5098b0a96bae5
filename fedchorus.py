"""The `fedchorus` command: composes the command groups, and turns errors that a person can mend into one line.

Only what is installed beside this file is composed: a site has no server's commands, a coordinator no client's, an
auditor neither (docker/Dockerfile makes such installations).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

import privacy.commands
from privacy.errors import FedchorusError, RunError

if TYPE_CHECKING:
    from strategies.job import Job
    from strategies.parameters import Parameters, Vector

app = typer.Typer(
    name="fedchorus",
    help="Federated training under differential privacy. Hear the chorus, never the voice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain help: rich would cost half of the 0.3 seconds that help may take.
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _initial_parameters(job: Job) -> tuple[Parameters, Vector]:
    if not _is_installed("client"):
        raise RunError(
            "there are no tasks in this installation, so it cannot make a job's first model: name one with --model, "
            "or do this where all of fedchorus is installed"
        )
    from client.initial import initial_parameters

    return initial_parameters(job)


def _is_installed(package: str) -> bool:
    # Not importlib.util.find_spec: these names are common, and another's `client` must not pass for ours.
    return (Path(__file__).parent / package / "commands.py").exists()


if _is_installed("simulations"):
    import simulations.commands

    simulations.commands.add_to(app)
if _is_installed("server"):
    import server.commands
    import server.enrol_commands

    server.enrol_commands.add_to(app)
    server.commands.add_to(app, build_model=_initial_parameters)
if _is_installed("client"):
    import client.commands
    import client.enrol_commands

    client.enrol_commands.add_to(app)
    client.commands.add_to(app)
privacy.commands.add_to(app)

# What the smaller installations lack, and the extra that has it.
EXTRAS = {
    **dict.fromkeys(("torch", "pandas", "sklearn", "pyarrow"), "train"),
    **dict.fromkeys(("transformers", "peft", "tokenizers", "PIL"), "llm"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "ray": "ray",
}


def main() -> None:
    try:
        app()
    except FedchorusError as error:
        if "--verbose" in sys.argv:
            raise
        _end_with(str(error))
    except OSError as error:
        if "--verbose" in sys.argv:
            raise
        _end_with(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None or "--verbose" in sys.argv:
            raise
        _end_with(f"this command needs {error.name}: install fedchorus with its extra `{extra}`")


def _end_with(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
