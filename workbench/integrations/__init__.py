"""The only home of optional packages: one module each, imported when its feature is asked for."""
