"""One self-critique chain, hygiene and text measures. Pure: no I/O, and random numbers are arguments.

Imports `errors`, `records`, `stats`, `acceptance` and `config`.
"""
