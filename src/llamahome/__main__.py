"""`python -m llamahome`: the command line."""

from llamahome.cli.app import main

if __name__ == "__main__":
    main()
