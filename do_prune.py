"""`python do_prune.py`: writes the small dense model that computes exactly what the masked one did (`cook reshape`)."""

from __future__ import annotations

from cook import cli


def main() -> None:
    """Runs the command with the options in `sys.argv`, in a program of your own."""
    cli.invoke("reshape")


if __name__ == "__main__":
    cli.main("reshape")
