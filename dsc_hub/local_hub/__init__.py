"""The local hub: a small HTTP server with the part of the Hugging Face Hub's API that the public clients use.

The clients are unmodified, so a first run can publish and pull without an account. The rest of the project uses
`server.running()`. Importing this package loads nothing else.
"""
