"""A model that answers: its weights and adapters, the servers that hold it, and the client that asks them.

Imports `errors`, `records`, `system`, `config`, `runs`, `chain` and `hub`.
"""
