"""``python -m zipvl``: the command line."""

from zipvl.app.cli import app

if __name__ == "__main__":
    app(prog_name="zipvl")
