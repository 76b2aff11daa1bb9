"""A second decoder of the delta format, which follows docs/delta-format.md and shares no code with
`updater.delta`, to hold that document and the engine to each other.

Order: delta -> header, block -> stream, instruction -> tensor, program -> record, pool, operation, residual,
skeleton. Rules: plain integers and one element at a time; nothing is imported from the engine; where the
document and the engine differ, this follows the document. It is slow, and holds all files in memory.
"""
