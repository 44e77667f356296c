"""Layer primitives: each file holds one family, `mad.registry.LAYERS` lists them."""
