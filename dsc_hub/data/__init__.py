"""Prompts in, training rows out.

Imports `errors`, `records`, `system`, `config`, `runs`, `chain` and `hub`.
"""
