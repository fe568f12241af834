"""`python -m fluxjax`, which is the same as `fluxjax`."""

from fluxjax.cli.main import main

if __name__ == "__main__":
    main()
