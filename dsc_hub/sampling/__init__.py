"""All chains of a run: prompts in, chains and their numbers out.

Imports the packages up to `inference`.
"""
