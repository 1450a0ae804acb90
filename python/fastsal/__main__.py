"""`python -m fastsal` is the command `fastsal`."""

from fastsal.cli import main

if __name__ == "__main__":
    main(prog_name="fastsal")
