"""The arms of an evaluation, answered, scored, counted and compared: what may be claimed.

Imports the packages up to `sampling`.
"""
