"""The command line `fluxjax`: a file for each command. It is not an API."""
