"""The Hugging Face Hub: who we are there, what repos hold, reading and writing them.

Imports `errors`, `system`, `config` and `runs`.
"""
