"""What at least two of the five packages share: command line, run record, models, text, figures.

Nothing is imported here, so that `import workbench` costs nothing; take what you need from the
module that holds it, for example `from workbench.run import Run`.
"""
