"""Schema and generated stubs of the wire contract."""
