"""The base model and its adapters: weights, vLLM processes, servers, and the client that sends requests to them.

Imports the packages up to `hub`.
"""
