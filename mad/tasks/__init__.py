"""Synthetic tasks: each file holds one family, `mad.registry.TASKS` lists them."""
