"""Prompts are loaded and split; chains become training rows.

Imports the packages up to `hub`.
"""
