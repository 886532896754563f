"""The `hocket` command. It starts services as processes and imports none of them."""

from __future__ import annotations

import typer

from hocket.cli import generate, mesh, operations, security, workflows
from hocket.cli.up import demo, up

app = typer.Typer(
    name="hocket",
    help="Serves diffusion transformers under latency SLOs, across GPU hosts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up)
app.command("demo")(demo)
app.command("generate")(generate.generate)
app.command("watch")(operations.watch)
app.command("result")(operations.result)
app.command("ls")(operations.ls)
app.command("models")(generate.models)
app.command("status")(mesh.status)
app.command("drain")(mesh.drain)
app.command("cancel")(mesh.cancel)
app.command("trace")(mesh.trace)
app.command("timeline")(mesh.timeline_file)
app.command("certs")(security.certs)
app.add_typer(security.keys, name="keys")
app.add_typer(workflows.workflows, name="workflows")


if __name__ == "__main__":
    app()
