"""Recorded numbers for readers: words, tables, plots, the page and the cards. Computes no statistics.

Imports the packages up to `evaluation`.
"""
