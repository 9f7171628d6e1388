"""What is wanted of a text: `evaluate` measurements, one folder each, and the functions that load them for the stages.

Imports `errors`, `records`, `system`, `config`, `chain` and `hub`. A measurement's own folder imports nothing of dsc_hub where it
is loaded without dsc_hub.
"""
