"""The local hub: a small, real HTTP server that speaks the part of the Hugging Face Hub's API which the unmodified
public clients use, so that a first run publishes and pulls for real without an account.

`server.running()` is what the rest of the project uses. Importing this package loads nothing else.
"""
