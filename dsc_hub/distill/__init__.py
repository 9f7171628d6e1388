"""Training of the adapter from the kept answers: settings, preflight, launcher and trainer.

Imports `errors`, `system`, `config`, `runs` and `inference`.
"""
