"""The recipe schema, the tables of stages and arms, fingerprints, and what an untrusted recipe may set.

Imports `errors`, `acceptance` and `system`.
"""
