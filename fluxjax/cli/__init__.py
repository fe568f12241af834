"""The command line `fluxjax`: the options and the function of each command. It is not an API."""
