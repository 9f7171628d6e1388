"""The kept answers of a run -> an adapter: training in processes of its own, its settings, and what is checked before.

Imports `errors`, `system`, `config`, `runs` and `inference`.
"""
