"""Recorded numbers for people: words, tables, plots, the page and the cards. Makes no number.

Imports the packages up to `evaluation`.
"""
