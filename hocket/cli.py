"""The `hocket` command. It starts services as processes and imports none of them."""

from __future__ import annotations

import typer

from hocket import cli_generate, cli_mesh, cli_operations
from hocket.cli_up import demo, up

app = typer.Typer(
    name="hocket",
    help="Serves diffusion transformers under latency SLOs, across GPU hosts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up)
app.command("demo")(demo)
app.command("generate")(cli_generate.generate)
app.command("watch")(cli_operations.watch)
app.command("result")(cli_operations.result)
app.command("ls")(cli_operations.ls)
app.command("models")(cli_generate.models)
app.command("status")(cli_mesh.status)
app.command("drain")(cli_mesh.drain)
app.command("cancel")(cli_mesh.cancel)
app.command("trace")(cli_mesh.trace)
app.command("timeline")(cli_mesh.timeline_file)


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
