"""The command `dsc`: what is typed, asked and shown.

Imports everything; nothing imports it.
"""
