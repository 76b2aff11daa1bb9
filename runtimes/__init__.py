"""runtimes: one interface over the libraries that run models; see docs/architecture.md.

Importing this package, or any module of it, imports no inference library: each is imported when it is
probed or loads its first model, so a box needs only the one that its models want.
"""
