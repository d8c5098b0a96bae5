"""The `fedchorus` command: composes the command groups, and turns errors that a person can mend into one line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

import client.commands
import client.enrol_commands
import privacy.commands
import server.commands
import server.enrol_commands
import simulations.commands
from privacy.errors import FedchorusError

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
    from client.initial import initial_parameters

    return initial_parameters(job)


simulations.commands.add_to(app)
server.enrol_commands.add_to(app)
client.enrol_commands.add_to(app)
server.commands.add_to(app, build_model=_initial_parameters)
client.commands.add_to(app)
privacy.commands.add_to(app)

# What the smaller installations lack, and the extra that has it.
EXTRAS = {"torch": "train", "pandas": "train", "sklearn": "train", "pyarrow": "train", "ray": "ray"}


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
