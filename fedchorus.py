"""The `fedchorus` command: composes the command groups, and turns errors that a person can mend into one line."""

from __future__ import annotations

import sys

import typer

import privacy.commands
import simulations.commands
from privacy.errors import FedchorusError

app = typer.Typer(
    name="fedchorus",
    help="Federated training under differential privacy. Hear the chorus, never the voice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain help: rich would cost half of the 0.3 seconds that help may take.
    context_settings={"help_option_names": ["-h", "--help"]},
)
simulations.commands.add_to(app)
privacy.commands.add_to(app)


def main() -> None:
    try:
        app()
    except FedchorusError as error:
        if "--verbose" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
