"""`python -m myriad`."""

from myriad.cli import main

if __name__ == "__main__":
    main()
