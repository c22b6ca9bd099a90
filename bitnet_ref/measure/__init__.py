"""Memory, energy and speed: what is measured here, modelled from stated constants, or quoted from a named table."""
