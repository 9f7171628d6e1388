"""A recipe on this machine: resolved, checked, and its stages run in order.

Imports everything but `api` and `cli`.
"""
