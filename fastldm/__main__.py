"""`python -m fastldm` is the command `fastldm`."""

from fastldm.cli import main

if __name__ == "__main__":
    main(prog_name="fastldm")
