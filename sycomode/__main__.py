"""List the scripts of this room."""

from workbench.cli import list_scripts

list_scripts("sycomode")
