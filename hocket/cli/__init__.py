"""The `hocket` command."""


def main() -> None:
    """Entry point of the installed command."""
    from hocket.cli.__main__ import app  # noqa: PLC0415  `python -m hocket.cli` loads it itself

    app()
