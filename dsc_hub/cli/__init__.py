"""The command `dsc`: arguments, questions and output.

Imports everything; nothing imports it.
"""
