"""Lists the scripts of this package."""

from workbench.cli import list_scripts

list_scripts("lplr_q")
