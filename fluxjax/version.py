"""The version of the package, which files that it writes also carry."""

__version__ = "0.2.0"
