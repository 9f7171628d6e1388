"""The Hugging Face Hub: the account, and reading and writing repos.

Imports `errors`, `system`, `config` and `runs`.
"""
