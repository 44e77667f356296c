"""The scripts of this package, one line each."""

from workbench.cli import list_scripts

list_scripts("sdm")
