"""`python -m backmix`: the command line without an installed script."""

from backmix.train.cli import main

if __name__ == "__main__":
    main()
