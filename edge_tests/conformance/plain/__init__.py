"""A second decoder of the delta format, written from docs/delta-format.md alone, to hold that document and
`updater.delta` to each other.

Order: delta -> header, block -> stream, instruction -> tensor, program -> record, pool, operation, residual,
skeleton. Rules: plain integers and one element at a time; nothing is imported from the engine; where the
document and the engine differ, this follows the document. It is slow, and holds all files in memory.
"""
