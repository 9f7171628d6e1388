"""Metrics: `evaluate` measurements, one folder each, and the functions that load them for the stages.

Imports the packages up to `hub`. The module of a measurement imports nothing of dsc_hub if it is published as a Space.
"""
