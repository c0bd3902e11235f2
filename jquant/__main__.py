"""`python -m jquant`."""

from jquant.cli import main

if __name__ == "__main__":
    main()
