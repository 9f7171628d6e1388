"""Publishing a finished run to a Hub, and verifying what was published.

Imports the packages up to `report`.
"""
