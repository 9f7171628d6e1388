"""One self-critique chain and what it asks of a text: acceptance rules, hygiene, text measures. Pure: no I/O, and
randomness is passed in.

Imports `errors`, `records`, `stats` and `config`.
"""
