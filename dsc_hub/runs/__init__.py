"""The run folder, which is the contract between stages: its rows, facts, numbers and markers.

Imports `errors`, `records`, `stats`, `system` and `config`.
"""
