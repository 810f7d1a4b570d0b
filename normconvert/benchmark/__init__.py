"""How fast a model is, beside itself converted and beside itself without its norms."""
