"""The contract between teacher and agent: schema, generated stubs, image codec, table of refusals.

Admission test: two processes must agree on it byte for byte.
"""
