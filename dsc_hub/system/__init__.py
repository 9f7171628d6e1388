"""This machine: files, hashes, the cache, processes, the terminal and the event loop.

Imports nothing of dsc_hub but `errors`.
"""
