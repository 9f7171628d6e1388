"""A finished run on a Hub: what goes up, uploaded, read back, and verified by whoever pulls it.

Imports the packages up to `report`.
"""
